#include "memory/staging_ring.h"

#include <unistd.h>

#include <algorithm>

#include "plan/plan.h"
#include "util/align.h"
#include "util/check.h"

namespace wsm {
namespace {

// Whole slots to a segment: a copy out of a slot crosses none.
std::vector<uint64_t> slot_segments(uint32_t slots, uint64_t slot_bytes) {
  const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  check(slot_bytes > 0 && slot_bytes % page == 0, "a staging slot of ", slot_bytes,
        " bytes is not a multiple of the page size (", page, ")");
  const uint64_t step = std::max(slot_bytes, align_down(kSegmentBytes, slot_bytes));
  const uint64_t bytes = slots * slot_bytes;
  std::vector<uint64_t> ends;
  for (uint64_t end = 0; end < bytes;) ends.push_back(end = std::min(bytes, end + step));
  return ends;
}

const char* text(StagingRing::State state) {
  switch (state) {
    case StagingRing::State::kFree:
      return "free";
    case StagingRing::State::kReading:
      return "reading";
    case StagingRing::State::kDoomed:
      return "doomed";
    case StagingRing::State::kFilled:
      return "filled";
    case StagingRing::State::kCopying:
      return "copying";
  }
  return "unknown";
}

}  // namespace

StagingRing::StagingRing(Device& device, uint32_t slots, uint64_t slot_bytes)
    : device_(device),
      slot_bytes_(slot_bytes),
      buffer_(device, slots * slot_bytes,
              slots ? slot_segments(slots, slot_bytes) : std::vector<uint64_t>()),
      slots_(slots) {
  free_.reserve(slots);
  copying_.reserve(slots);
  for (Slot& slot : slots_) slot.copied = device_.make_event();
  for (uint32_t slot = slots; slot > 0; --slot) free_.push_back(slot - 1);
}

uint32_t StagingRing::acquire(bool demand) {
  const size_t kept = demand || slots() == 1 ? 0 : 1;
  if (free_.size() <= kept) return kNoSlot;
  const uint32_t slot = free_.back();
  move(slot, State::kFree, State::kReading);
  free_.pop_back();
  return slot;
}

bool StagingRing::read_done(uint32_t slot) {
  if (state(slot) == State::kDoomed) {
    release(slot);
    return false;
  }
  move(slot, State::kReading, State::kFilled);
  return true;
}

void StagingRing::discard(uint32_t slot) {
  if (state(slot) == State::kFilled) {
    release(slot);
  } else {
    move(slot, State::kReading, State::kDoomed);
  }
}

void StagingRing::copying(uint32_t slot, StreamHandle stream) {
  expect(slot, State::kFilled, State::kCopying);
  // First: if it throws, the slot must not look like one whose copy is done.
  device_.record(*slots_[slot].copied, stream);
  move(slot, State::kFilled, State::kCopying);
  copying_.push_back(slot);
}

uint32_t StagingRing::recycle() {
  uint32_t count = 0;
  while (count < copying_.size() && device_.done(*slots_[copying_[count]].copied)) {
    release(copying_[count++]);
  }
  copying_.erase(copying_.begin(), copying_.begin() + count);
  return count;
}

StagingRing::State StagingRing::state(uint32_t slot) const {
  check<Error>(slot < slots(), "the staging ring has no slot ", slot, ": it has ", slots());
  return slots_[slot].state;
}

std::byte* StagingRing::data(uint32_t slot) const { return buffer_.data() + slot * slot_bytes_; }

void StagingRing::expect(uint32_t slot, State expected, State next) const {
  check<Error>(state(slot) == expected, "staging slot ", slot, " is ", text(state(slot)), ", not ",
               text(expected), ": it cannot become ", text(next));
}

void StagingRing::move(uint32_t slot, State from, State to) {
  expect(slot, from, to);
  slots_[slot].state = to;
}

void StagingRing::release(uint32_t slot) {
  slots_[slot].state = State::kFree;
  free_.push_back(slot);
}

}  // namespace wsm
