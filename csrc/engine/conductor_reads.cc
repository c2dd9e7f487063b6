// The conductor's reads: what to read next, through which reader, into which slot, and what came
// back.
#include <algorithm>
#include <utility>

#include "engine/conductor.h"
#include "engine/log.h"

namespace wsm {

bool Conductor::reap() {
  bool any = reap_from(*readers_.pool);
  if (readers_.direct) any |= reap_from(*readers_.direct);
  return any;
}

bool Conductor::reap_from(Reader& reader) {
  const size_t count = reader.poll(completions_);
  for (size_t i = 0; i < count; ++i) complete(completions_[i], reader);
  return count > 0;
}

void Conductor::complete(const ReadCompletion& done, const Reader& reader) {
  const Flight flight = std::exchange(flights_[done.tag], Flight{});
  free_tags_.push_back(static_cast<uint32_t>(done.tag));
  const Chunk& chunk = plan_.chunks[flight.chunk];
  if (!shards_[chunk.shard]->memory()) {
    board_.counters.disk_read_bytes += done.bytes;
    if (done.error.empty()) board_.counters.disk_bytes += chunk.payload_bytes;
  }
  if (done.error.empty()) count_use(flight);
  if (board_.trace.on()) trace_read(flight, done);
  if (flight.route == ReadRoute::kPreloaded) {
    preload_->release(flight.chunk);
    preload_bytes_ = preload_->held_bytes();
  }
  // A doomed slot: nobody wants the bytes any more, nor the error.
  if (flight.slot != kNoSlot && !ring_->read_done(flight.slot)) return;
  if (!done.error.empty()) {
    forget_chunk(flight.chunk);
    if (reader.broken()) {  // the other reads it again
      log_once(concat("reading with ", readers_.pool->name(), ": ", readers_.why()));
      return;
    }
    paused_ = true;
    keep_error(KeptError::of<IoError>(
        concat(done.error, "; it was read for unit '", name_of(owner_of(flight.chunk)), "'")));
    return;
  }
  if (flight.slot != kNoSlot) {
    chunks_[flight.chunk].phase = ChunkPhase::kFilled;
    return;
  }
  chunks_[flight.chunk].phase = ChunkPhase::kIdle;
  const MutexLock lock(board_.mutex);
  cache_->mark_filled(flight.chunk);
}

bool Conductor::read() {
  bool moved = false;
  bool blocked = false;
  for (const Waiting& demand : demands_) {
    if (to_serve(demand) && !blocked) moved |= read_unit(demand.unit, true, &blocked);
  }
  for (size_t i = 0; i < window_.size() && !blocked; ++i) {
    if (board_.phase_of(window_[i]) == Phase::kReady) continue;
    moved |= read_unit(window_[i], false, &blocked);
  }
  return moved;
}

bool Conductor::read_unit(uint32_t unit, bool demanded, bool* blocked) {
  bool moved = false;
  const auto [first, count] = chunks_of(unit);
  uint32_t& next = work_[unit].first_unread;
  for (; next < count; ++next) {
    if (!needs_read(first + next)) continue;
    if (!issue(first + next, demanded)) {
      *blocked = true;
      break;
    }
    work_[unit].from_disk |= shards_[plan_.chunks[first + next].shard]->memory() == nullptr;
    work_[unit].read_end = std::max(work_[unit].read_end, next + 1);
    moved = true;
  }
  return moved;
}

bool Conductor::needs_read(uint32_t index) const {
  const ChunkState& state = chunks_[index];
  if (state.copied || state.phase != ChunkPhase::kIdle) return false;
  return plan_.chunks[index].home != Home::kHost || !cache_->filled(index);
}

bool Conductor::issue(uint32_t index, bool demanded) {
  if (free_tags_.empty()) return false;
  const Chunk& chunk = plan_.chunks[index];
  // To ask the page cache is a system call: not again for a chunk that waits.
  if (waiting_chunk_ != index) waiting_route_ = route_of(index);
  waiting_chunk_ = index;
  const ReadRoute route = waiting_route_;
  Reader& reader = route == ReadRoute::kDirect ? readers_.for_direct() : *readers_.pool;
  if (reader.full()) return false;
  uint32_t slot = kNoSlot;
  if (chunk.home == Home::kHost) {
    if (!cache_->ready(chunk)) return false;
  } else {
    slot = acquire_slot(index, demanded);
    if (slot == kNoSlot) return false;
  }
  ReadRequest request;
  request.shard = &source_of(index, route);
  request.offset = chunk.read_offset;
  request.bytes = chunk.read_bytes;
  request.need_bytes = chunk.need_bytes;
  request.target = slot == kNoSlot ? cache_->data(chunk) : ring_->data(slot);
  request.tag = free_tags_.back();
  request.buffered = route != ReadRoute::kDirect;
  check<Error>(reader.submit(request), "a reader that was not full has refused a read");
  waiting_chunk_ = kNone;
  if (route == ReadRoute::kPreloaded) {
    preload_->acquire(index);
    preload_pass_ = passes_over_;
  }
  free_tags_.pop_back();
  flights_[request.tag] = {index, slot, route, Clock::now()};
  chunks_[index] = {ChunkPhase::kReading, false, slot};
  if (slot != kNoSlot) slot_chunk_[slot] = index;
  return true;
}

// Counted when done: a direct read may have been refused on the way, and gone on buffered.
void Conductor::count_use(const Flight& flight) {
  const Chunk& chunk = plan_.chunks[flight.chunk];
  ShardUse& use = uses_[chunk.shard];
  const Shard& shard = *shards_[chunk.shard];
  const bool direct = flight.route != ReadRoute::kBuffered && shard.direct();
  if (flight.route == ReadRoute::kDirect && !direct) {
    log_direct_refused(shard.path(), 0, shard.mode_reason());
  }
  (direct ? use.direct_bytes : use.buffered_bytes) += chunk.payload_bytes;
}

// Told when done, for the same reason.
void Conductor::trace_read(const Flight& flight, const ReadCompletion& done) {
  const Chunk& chunk = plan_.chunks[flight.chunk];
  const bool failed = !done.error.empty();
  const bool refused = flight.route == ReadRoute::kDirect && !shards_[chunk.shard]->direct();
  board_.trace.read({.unit = owner_of(flight.chunk),
                     .bytes = failed ? 0 : chunk.payload_bytes,
                     .shard = chunk.shard,
                     .offset = chunk.read_offset,
                     .read_bytes = done.bytes,
                     .route = refused ? ReadRoute::kBuffered : flight.route,
                     .cached = flight.slot == kNoSlot,
                     .failed = failed},
                    flight.issued);
}

// What of a drive is in nobody's memory is read directly, by the direct reader. All else is read by
// the pool: what the page cache has, what was preloaded, tmpfs and RAM.
ReadRoute Conductor::route_of(uint32_t index) const {
  if (preload_ && preload_->find(index)) return ReadRoute::kPreloaded;
  const Chunk& chunk = plan_.chunks[index];
  const Shard& shard = *shards_[chunk.shard];
  if (shard.memory()) return ReadRoute::kMemory;
  if (!shard.direct()) return ReadRoute::kBuffered;
  if (!readers_.always_direct && shard.in_page_cache(chunk.read_offset, chunk.need_bytes)) {
    return ReadRoute::kBuffered;
  }
  return ReadRoute::kDirect;
}

Shard& Conductor::source_of(uint32_t index, ReadRoute route) const {
  return route == ReadRoute::kPreloaded ? *preload_->find(index)
                                        : *shards_[plan_.chunks[index].shard];
}

// When all was used; or when a whole pass took nothing of it: nobody is known to want the rest.
void Conductor::drop_preload() {
  if (preload_bytes_ > 0 && passes_over_ < preload_pass_ + 2) return;
  const bool read_from = std::ranges::any_of(
      flights_, [](const Flight& flight) { return flight.route == ReadRoute::kPreloaded; });
  if (read_from) return;
  preload_.reset();
  preload_bytes_ = 0;
  waiting_chunk_ = kNone;  // it may have waited for this
}

uint32_t Conductor::acquire_slot(uint32_t chunk, bool demanded) {
  uint32_t slot = ring_->acquire(demanded);
  while (slot == kNoSlot && demanded && discard_for_demand(owner_of(chunk))) {
    slot = ring_->acquire(demanded);
  }
  if (slot == kNoSlot) slots_wanted_ = true;
  return slot;
}

// A copy out of a slot ends, and so does a doomed read, unless it is overdue.
bool Conductor::slot_comes_free() const {
  if (ring_->copies_pending()) return true;
  const auto overdue = Clock::now() - std::chrono::duration<double>(options_.read_timeout_s / 2);
  return std::ranges::any_of(flights_, [&](const Flight& flight) {
    return flight.slot != kNoSlot && flight.issued > overdue &&
           ring_->state(flight.slot) == StagingRing::State::kDoomed;
  });
}

// Frees (or dooms) the slot whose bytes are wanted last: outside the window, else farthest in it.
// Those of older demands stay. False where there is none, or one comes free by itself.
bool Conductor::discard_for_demand(uint32_t demand) {
  if (slot_comes_free()) return false;
  const size_t rank = rank_of(demand);
  uint32_t victim = kNone;
  ptrdiff_t victim_distance = -1;
  for (uint32_t slot = 0; slot < slot_chunk_.size(); ++slot) {
    const uint32_t chunk = slot_chunk_[slot];
    if (chunk == kNone || rank_of(owner_of(chunk)) <= rank) continue;
    const uint32_t unit = owner_of(chunk);
    const bool expected = in_window_[unit] == seen_version_;
    const auto distance = static_cast<ptrdiff_t>(expected ? position_[unit] : window_.size());
    if (distance > victim_distance) {
      victim = chunk;
      victim_distance = distance;
    }
  }
  if (victim != kNone) forget_chunk(victim);
  return victim != kNone;
}

// The order has changed: what was read ahead for units that are no longer expected makes room.
void Conductor::drop_outside_window() {
  for (const uint32_t chunk : slot_chunk_) {
    if (chunk == kNone) continue;
    const uint32_t unit = owner_of(chunk);
    if (!demanded(unit) && in_window_[unit] != seen_version_) forget_chunk(chunk);
  }
}

// The chunk must be read again. Its slot is freed now, or when the read into it has ended.
void Conductor::forget_chunk(uint32_t index) {
  ChunkState& state = chunks_[index];
  if (state.slot != kNoSlot) {
    slot_chunk_[state.slot] = kNone;
    ring_->discard(state.slot);
  }
  state = {ChunkPhase::kIdle, false, kNoSlot};
  work_[owner_of(index)].first_unread = 0;
}

}  // namespace wsm
