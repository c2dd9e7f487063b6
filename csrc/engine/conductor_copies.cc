// The conductor's copies: which unit to fill next, whose place it takes, and when it is ready.
#include <algorithm>

#include "engine/conductor.h"
#include "engine/log.h"

namespace wsm {
namespace {

// A step's copies end at this cost, and reads are looked after in between: a drive whose requests
// have all ended waits for the conductor. A chunk in a slot is a copy and an event by itself, those
// in the cache are one copy where they touch.
constexpr uint32_t kStepCost = 64;
constexpr uint32_t kSlotCost = 4;
// Slots with copies under way. A stream takes about a thousand operations; one more, and whoever
// enqueues it waits.
constexpr uint32_t kMostCopying = 256;

}  // namespace

bool Conductor::copy() {
  bool moved = false;
  for (const Waiting& demand : demands_) {
    if (to_serve(demand)) moved |= copy_unit(demand.unit, 0, true);
  }
  if (std::ranges::any_of(demands_, [&](const Waiting& demand) { return to_serve(demand); })) {
    return moved;
  }
  const size_t reach = std::min<size_t>(plan_.lookahead_units, window_.size());
  for (size_t ahead = 0; ahead < reach; ++ahead) {
    if (board_.phase_of(window_[ahead]) == Phase::kReady) continue;
    moved |= copy_unit(window_[ahead], ahead, false);
    if (board_.phase_of(window_[ahead]) != Phase::kReady) break;
  }
  return moved;
}

bool Conductor::copy_unit(uint32_t unit, size_t ahead, bool demanded) {
  if (board_.phase_of(unit) == Phase::kAbsent && !begin_load(unit, ahead, demanded)) return false;
  uint32_t moved = 0;
  uint64_t bytes = 0;
  UnitWork& work = work_[unit];
  const auto [first, count] = chunks_of(unit);
  while (work.first_uncopied < count && chunks_[first + work.first_uncopied].copied) {
    ++work.first_uncopied;
  }
  // Of the resident weights there is nothing that was not read for this load.
  const uint32_t end = is_resident_load(unit) ? work.read_end : count;
  uint32_t cost = 0;
  for (uint32_t c = first + work.first_uncopied; c < first + end && cost < kStepCost; ++c) {
    if (chunks_[c].copied) continue;
    const bool in_cache = plan_.chunks[c].home == Home::kHost;
    const bool there = in_cache ? cache_->filled(c) : chunks_[c].phase == ChunkPhase::kFilled;
    if (!there) continue;
    if (!in_cache && ring_->slots_copying() >= kMostCopying) {
      copies_full_ = true;
      break;
    }
    cost += in_cache ? 1 : kSlotCost;
    if (moved++ == 0) board_.trace.begin_copies(unit);
    enqueue(c);
    bytes += plan_.chunks[c].payload_bytes;
    --work.left;
  }
  copies_.flush();
  if (moved > 0) board_.trace.end_copies(bytes);
  if (work.left > 0) return moved > 0;
  finish_load(unit);
  return true;
}

// Takes the unit's place from those that lie in it. The copy stream then waits for their forwards.
bool Conductor::begin_load(uint32_t unit, size_t ahead, bool demanded) {
  {
    const MutexLock lock(board_.mutex);
    for (const uint32_t other : present_) {
      if (overlap(unit, other) && !may_evict(other, unit, ahead, demanded)) return false;
    }
    for (size_t i = present_.size(); i-- > 0;) {
      if (overlap(unit, present_[i])) evict(present_[i]);
    }
    UnitState& state = board_.units[unit];
    state.phase = Phase::kLoading;
    state.used = false;
  }
  work_[unit].demanded = demanded;
  wait_for_evicted();
  present_.push_back(unit);
  return true;
}

// A demand takes the place of all that nobody holds, and that no older one is for: two that want
// the same place take turns. A prefetch leaves what is needed before it, and what is demanded.
bool Conductor::may_evict(uint32_t other, uint32_t unit, size_t ahead, bool demanded) const {
  if (!board_.units[other].holds.empty()) return false;
  const size_t rank = board_.rank_of(other);
  if (demanded) return rank >= board_.rank_of(unit);
  const auto end = window_.begin() + static_cast<ptrdiff_t>(ahead);
  return rank == board_.demands.size() && std::find(window_.begin(), end, other) == end;
}

// The caller calls `wait_for_evicted` then, without the mutex.
void Conductor::evict(uint32_t unit) {
  board_.units[unit].phase = Phase::kAbsent;
  evicted_.push_back(&board_.units[unit]);
  present_.erase(std::find(present_.begin(), present_.end(), unit));
  const auto [first, count] = chunks_of(unit);
  for (uint32_t c = first; c < first + count; ++c) chunks_[c].copied = false;
  work_[unit] = {.left = count};
}

// Makes the copy stream wait for all that the evicted units were used for.
void Conductor::wait_for_evicted() {
  for (UnitState* state : evicted_) {
    for (size_t i = 0; i < state->released_count; ++i) {
      device_.wait(device_.copy_stream(), *state->released[i].second);
    }
    state->released_count = 0;
  }
  evicted_.clear();
}

// Before any copy of this step: what is loaded from now on comes from the disk again.
void Conductor::drop_discarded() {
  {
    const MutexLock lock(board_.mutex);
    std::erase_if(board_.discarded, [this](uint32_t unit) {
      board_.mutex.assert_held();
      UnitState& state = board_.units[unit];
      if (!state.holds.empty()) return false;
      if (state.phase != Phase::kAbsent) evict(unit);
      const auto [first, count] = chunks_of(unit);
      for (uint32_t c = first; c < first + count; ++c) cache_->forget(c);
      work_[unit].first_unread = 0;
      state.discarded = false;
      return true;
    });
    discarded_ = !board_.discarded.empty();
  }
  wait_for_evicted();
}

void Conductor::poison_released() {
  std::vector<uint32_t> idle;
  {
    const MutexLock lock(board_.mutex);
    for (const uint32_t unit : present_) {
      const UnitState& state = board_.units[unit];
      const bool over = state.phase == Phase::kReady && state.used && state.holds.empty();
      if (over && !is_resident_load(unit)) idle.push_back(unit);
    }
    for (const uint32_t unit : idle) evict(unit);
  }
  wait_for_evicted();
  for (const uint32_t unit : idle) {
    const UnitPlan& place = plan_.units[unit];
    device_.fill(arena_ + place.place_offset, 0xFF, place.place_bytes);
  }
}

std::byte* Conductor::target_of(const Chunk& chunk, const Copy& copy) const {
  if (chunk.home != Home::kDevice) return arena_ + copy.target_offset;
  const size_t block = plan_.block_at(copy.target_offset);
  return homes_[block].data + (copy.target_offset - plan_.home_blocks[block].offset);
}

// The caller flushes.
void Conductor::enqueue(uint32_t index) {
  const Chunk& chunk = plan_.chunks[index];
  ChunkState& state = chunks_[index];
  const bool through_slot = chunk.home != Home::kHost;
  const std::byte* source = through_slot ? ring_->data(state.slot) : cache_->data(chunk);
  for (uint32_t i = chunk.first_copy; i < chunk.first_copy + chunk.copy_count; ++i) {
    const Copy& copy = plan_.copies[i];
    copies_.add(target_of(chunk, copy), source + copy.source_offset, copy.bytes);
  }
  board_.counters.h2d_bytes += chunk.payload_bytes;
  if (through_slot) {
    copies_.flush();
    ring_->copying(state.slot, device_.copy_stream());
    slot_chunk_[state.slot] = kNone;
  }
  state = {ChunkPhase::kIdle, true, kNoSlot};
}

void Conductor::finish_load(uint32_t unit) {
  device_.record(*board_.ready[unit], device_.copy_stream());
  ++board_.counters.loads;
  const bool demanded = work_[unit].demanded;
  if (demanded) ++board_.counters.demand_loads;
  if (options_.verbose && !is_resident_load(unit)) {
    log_load(spec_.units[unit].label, demanded, work_[unit].from_disk);
  }
  {
    const MutexLock lock(board_.mutex);
    board_.units[unit].phase = Phase::kReady;
  }
  board_.changed.notify_all();
}

}  // namespace wsm
