// The staging ring: a fixed pool of equal slots of pinned memory that disk bytes pass through.
//
//   free --acquire--> reading --read_done--> filled --copying--> copying --recycle (copied)--> free
//                     |                     |
//                     +--discard--> doomed  +--discard--> free
//                                     |
//                                     +--read_done--> free
//
// A slot that is being read cannot be freed before its read has completed, even when nobody wants
// it any more: it is doomed until then.
// Lifecycle: owned by the engine, used by the conductor thread alone; freed after the reader is
// gone and the device was drained. Answers kNoSlot when none is left; the caller decides to wait.
// One slot is kept for demands.
// Failure: a step that the drawing does not have throws Error, naming the slot and its state.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "device/device.h"
#include "memory/pinned_buffer.h"

namespace wsm {

inline constexpr uint32_t kNoSlot = UINT32_MAX;

class StagingRing {
 public:
  enum class State : uint8_t { kFree, kReading, kDoomed, kFilled, kCopying };

  // `slot_bytes` is a multiple of the page size, as direct reads and registered segments need.
  StagingRing(Device& device, uint32_t slots, uint64_t slot_bytes);

  // A free slot, now kReading; kNoSlot when none is left. The last free slot goes to demands only
  // (not when the ring has just one).
  uint32_t acquire(bool demand);
  // The read of a slot has completed. False when it was doomed: it is free again, drop the bytes.
  bool read_done(uint32_t slot);
  // kReading -> kDoomed, kFilled -> kFree.
  void discard(uint32_t slot);
  // kFilled -> kCopying: all copies out of it have been enqueued on `stream`; records its event.
  void copying(uint32_t slot, StreamHandle stream);
  // Frees the slots whose copies are done, oldest first; how many.
  uint32_t recycle();

  std::byte* data(uint32_t slot) const;
  State state(uint32_t slot) const;
  uint32_t slots() const { return static_cast<uint32_t>(slots_.size()); }
  uint32_t free_slots() const { return static_cast<uint32_t>(free_.size()); }
  size_t slots_copying() const { return copying_.size(); }
  bool copies_pending() const { return !copying_.empty(); }
  const PinnedBuffer& buffer() const { return buffer_; }

 private:
  struct Slot {
    State state = State::kFree;
    std::unique_ptr<Event> copied;
  };
  void expect(uint32_t slot, State expected, State next) const;  // throws Error where it is not so
  void move(uint32_t slot, State from, State to);
  void release(uint32_t slot);

  Device& device_;
  uint64_t slot_bytes_;
  PinnedBuffer buffer_;
  std::vector<Slot> slots_;
  std::vector<uint32_t> free_;
  std::vector<uint32_t> copying_;  // oldest first: the copy stream is in order
};

}  // namespace wsm
