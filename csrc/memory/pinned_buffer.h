// Page-locked host memory: mmap, huge pages, touched in parallel, registered in segments.
//
// Lifecycle: allocated whole at construction; unregistered and unmapped by the destructor, after
// the device was drained. Not inherited by a forked child (MADV_DONTFORK).
// Failure: where the device refuses a piece, smaller ones are tried; what cannot be registered
// stays pageable, and `warnings` says how much and why. Memory that cannot be mapped throws
// OutOfMemory.
// The budget counts `mapped_bytes`, and no more than these become resident: huge pages are asked
// for in whole 2 MiB pieces only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "device/device.h"

namespace wsm {

class PinnedBuffer {
 public:
  // `segments`: ascending ends of the pieces to register, the last equal to `bytes`; empty: pieces
  // of 256 MiB. Ends are multiples of the page size, but for the last. `threads`: that touch the
  // memory (0: as many as cores, at most 16). No bytes: nothing is mapped, `data` is null.
  PinnedBuffer(Device& device, uint64_t bytes, std::vector<uint64_t> segments = {},
               unsigned threads = 0);
  ~PinnedBuffer();
  PinnedBuffer(const PinnedBuffer&) = delete;
  PinnedBuffer& operator=(const PinnedBuffer&) = delete;

  std::byte* data() const { return data_; }
  uint64_t bytes() const { return bytes_; }          // as asked
  uint64_t mapped_bytes() const { return mapped_; }  // as really taken
  uint64_t pinned_bytes() const { return pinned_; }  // of these, page-locked
  const std::vector<std::string>& warnings() const { return warnings_; }

 private:
  // Once this constructor is done, the destructor runs even when the public one throws half-way.
  explicit PinnedBuffer(Device& device) : device_(device) {}
  void map();
  void touch(unsigned threads) const;
  void register_segments(const std::vector<uint64_t>& segments);

  Device& device_;
  std::byte* data_ = nullptr;
  uint64_t bytes_ = 0;
  uint64_t mapped_ = 0;
  uint64_t pinned_ = 0;
  std::vector<std::byte*> registered_;  // begins of the pieces that are page-locked
  std::vector<std::string> warnings_;
};

}  // namespace wsm
