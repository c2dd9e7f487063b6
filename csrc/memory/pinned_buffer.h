// Page-locked host memory: mapped, touched in parallel, registered in segments.
//
// Lifecycle: mapped whole at construction, touched and registered then too, or piece by piece by
// `prepare`; unregistered and unmapped by the destructor, after the device was drained. Not
// inherited by a forked child (MADV_DONTFORK). One thread prepares; the figures and the warnings
// may be asked for from any. Failure: where the device refuses a piece, smaller ones are tried;
// what cannot be registered stays pageable, and `warnings` says how much and why. Memory that
// cannot be mapped throws OutOfMemory. The budget counts `mapped_bytes`, and no more than these
// become resident: huge pages are asked for in whole 2 MiB pieces only.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "device/device.h"
#include "memory/mapped_memory.h"
#include "util/mutex.h"

namespace wsm {

class PinnedBuffer {
 public:
  // `segments`: ascending ends of the pieces to register, the last equal to `bytes`; empty: pieces
  // of 256 MiB. Ends are multiples of the page size, but for the last. `threads`: that touch the
  // memory (0: as many as cores, at most 16). No bytes: nothing is mapped, `data` is null.
  PinnedBuffer(Device& device, uint64_t bytes, std::vector<uint64_t> segments = {},
               unsigned threads = 0);
  // Mapped only: memory is taken as it is prepared.
  static std::unique_ptr<PinnedBuffer> unprepared(Device& device, uint64_t bytes,
                                                  std::vector<uint64_t> segments);
  ~PinnedBuffer();
  PinnedBuffer(const PinnedBuffer&) = delete;
  PinnedBuffer& operator=(const PinnedBuffer&) = delete;

  // Touches and registers the next segment; false when there is none.
  bool prepare_next();
  uint64_t prepared_bytes() const { return prepared_; }
  // Gives back what lies behind the first `bytes` (a multiple of the page size). Nothing is
  // prepared meanwhile, and no copy reads from it. What lies before keeps its bytes, and is
  // page-locked.
  void truncate(uint64_t bytes);

  std::byte* data() const { return memory_ ? memory_->data() : nullptr; }
  uint64_t bytes() const { return bytes_; }  // as asked
  // As really taken, once all is prepared.
  uint64_t mapped_bytes() const { return memory_ ? memory_->bytes() : 0; }
  uint64_t pinned_bytes() const { return pinned_; }  // of these, page-locked by now
  std::vector<std::string> warnings() const;

 private:
  struct MapOnly {};
  // Once this constructor is done, the destructor runs even when the public one throws half-way.
  PinnedBuffer(Device& device, uint64_t bytes, std::vector<uint64_t> segments, MapOnly);
  void touch(uint64_t begin, uint64_t end, unsigned threads) const;
  void register_until(uint64_t end);
  void warn();

  Device& device_;
  std::optional<MappedMemory> memory_;  // none: no bytes
  uint64_t bytes_ = 0;
  unsigned threads_ = 0;
  std::vector<uint64_t> segments_;
  size_t next_segment_ = 0;
  std::atomic<uint64_t> prepared_{0};
  std::atomic<uint64_t> pinned_{0};
  // The pieces that are page-locked, ascending: begin and bytes.
  std::vector<std::pair<std::byte*, uint64_t>> registered_;
  // Of the registrations: the end of the last, the most that is tried, the last refusal.
  uint64_t registered_end_ = 0;
  uint64_t most_ = 0;
  uint64_t refused_ = 0;
  bool exhausted_ = false;  // the least piece was refused: the rest stays pageable
  std::string why_;
  mutable Mutex warnings_mutex_;
  std::vector<std::string> warnings_ GUARDED_BY(warnings_mutex_);
};

}  // namespace wsm
