#include "engine/conductor.h"

#include <poll.h>

#include <algorithm>
#include <utility>

#include "engine/log.h"
#include "util/deadline.h"
#include "util/threads.h"

namespace wsm {

namespace {

constexpr int kShortestNapUs = 40;
constexpr int kLongestNapUs = 1000;
constexpr double kLongestSleepS = 0.5;
constexpr double kDevicePatience = 20;  // times the limit of a read

}  // namespace

Conductor::Conductor(const ModelSpec& spec, const Plan& plan, Device& device, UnitBoard& board,
                     std::vector<std::unique_ptr<Shard>>& shards, Readers readers, std::byte* arena,
                     std::vector<HomeMemory> homes, std::unique_ptr<HostCache> cache_before,
                     const KeptCache& kept, std::shared_ptr<Preload> preload,
                     ConductorOptions options)
    : spec_(spec),
      plan_(plan),
      device_(device),
      copies_(device),
      board_(board),
      shards_(shards),
      preload_(std::move(preload)),
      preload_bytes_(preload_ ? preload_->held_bytes() : 0),
      preload_peak_bytes_(preload_bytes_),
      readers_(std::move(readers)),
      arena_(arena),
      homes_(std::move(homes)),
      options_(options),
      ring_(std::make_unique<StagingRing>(device, plan.slot_count, plan.chunk_bytes)),
      cache_(std::make_unique<HostCache>(
          device, plan, [this] { note_change(); }, std::move(cache_before), kept)),
      uses_(spec.shards.size()),
      chunks_(plan.chunks.size()),
      work_(plan.units.size() + 1),
      slot_chunk_(plan.slot_count, kNone),
      in_window_(plan.units.size() + 1, UINT64_MAX),
      position_(plan.units.size() + 1, 0) {
  const uint32_t tags =
      (readers_.direct ? readers_.direct->capacity() : 0) + readers_.pool->capacity();
  flights_.resize(tags);
  for (uint32_t tag = tags; tag-- > 0;) free_tags_.push_back(tag);
  for (uint32_t u = 0; u < work_.size(); ++u) work_[u].left = chunks_of(u).second;
  skip_loaded_homes();
  present_.reserve(plan.units.size() + 1);
  evicted_.reserve(plan.units.size());
}

Conductor::~Conductor() { stop(); }

// A chunk is left out where all that it brings is there; else it brings some once more.
void Conductor::skip_loaded_homes() {
  for (uint32_t c = plan_.first_resident_chunk; c < plan_.chunks.size(); ++c) {
    const Chunk& chunk = plan_.chunks[c];
    bool loaded = true;
    for (uint32_t i = chunk.first_copy; i < chunk.first_copy + chunk.copy_count; ++i) {
      loaded &= homes_[plan_.block_at(plan_.copies[i].target_offset)].loaded;
    }
    if (!loaded) continue;
    chunks_[c].copied = true;
    --work_.back().left;
  }
}

void Conductor::start() {
  thread_ = start_thread("wsm-conductor", "the schedule", [this] { run(); });
}

bool Conductor::stop() {
  if (thread_.joinable()) {
    {
      const MutexLock lock(board_.mutex);
      board_.stop = true;
      ++board_.version;
    }
    board_.changed.notify_all();  // whoever waits in an acquire is told that it ends
    wake();
    thread_.join();
    cache_->stop();
  }
  return !reads_under_way();
}

std::pair<uint32_t, uint32_t> Conductor::chunks_of(uint32_t unit) const {
  if (is_resident_load(unit)) {
    const auto total = static_cast<uint32_t>(plan_.chunks.size());
    return {plan_.first_resident_chunk, total - plan_.first_resident_chunk};
  }
  return {plan_.units[unit].first_chunk, plan_.units[unit].chunk_count};
}

bool Conductor::overlap(uint32_t a, uint32_t b) const {
  if (is_resident_load(a) || is_resident_load(b)) return false;
  return places_overlap(plan_.units[a], plan_.units[b]);
}

void Conductor::run() {
  try {
    while (!stop_) {
      if (step()) {
        idle_steps_ = 0;
      } else {
        sleep();
      }
    }
  } catch (const std::exception& error) {
    // In one step: a waiter that saw the error alone would clear it, as one that passes.
    const MutexLock lock(board_.mutex);
    board_.error = KeptError::of<Error>(error.what());  // before one that would pass
    board_.stop = true;
    board_.changed.notify_all();
  }
  // No buffer is freed under a read. One that does not end in time is the caller's to leak.
  const auto deadline = deadline_after(options_.read_timeout_s);
  try {
    while (reads_under_way() && Clock::now() < deadline) {
      if (!reap()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  } catch (const std::exception& error) {
    log_warning(concat("closing: ", error.what()));
  }
}

bool Conductor::step() {
  look();
  if (stop_) return true;
  bool moved = reap();
  moved |= ring_->recycle() > 0;
  if (discarded_) drop_discarded();
  if (preload_) drop_preload();
  if (options_.poison) poison_released();
  slots_wanted_ = copies_full_ = false;
  moved |= copy();
  if (!paused_) moved |= read();
  account_stall(moved);
  board_.trace.host_waits(stalled_ ? first_missing() : kNone, stall_cause_, stall_mark_);
  return moved;
}

void Conductor::look() {
  {
    const MutexLock lock(board_.mutex);
    if (board_.version == seen_version_) return;
    seen_version_ = board_.version;
    stop_ = board_.stop;
    look_at_demands();
    paused_ = board_.error.has_value();
    discarded_ = !board_.discarded.empty();
    if (passes_over_ != board_.passes_over) waiting_chunk_ = kNone;  // the page cache has moved on
    passes_over_ = board_.passes_over;
    const auto& upcoming = board_.sequence.upcoming();
    window_.assign(upcoming.begin(), upcoming.end());
  }
  for (size_t i = window_.size(); i-- > 0;) {  // a unit that comes twice: its next use counts
    in_window_[window_[i]] = seen_version_;
    position_[window_[i]] = static_cast<uint32_t>(i);
  }
  drop_outside_window();
}

void Conductor::look_at_demands() {
  demands_.clear();
  for (const Demand& demand : board_.demands) {
    const bool held_up = std::ranges::any_of(board_.held, [&](uint32_t held) {
      return held != demand.unit && overlap(demand.unit, held);
    });
    demands_.push_back({demand.unit, demand.posted, held_up, demand.error.has_value()});
  }
}

// How many demands come before this unit's; all, where none is to be served for it.
size_t Conductor::rank_of(uint32_t unit) const {
  const auto found = std::ranges::find_if(
      demands_, [&](const Waiting& demand) { return demand.unit == unit && !demand.held_up; });
  return static_cast<size_t>(found - demands_.begin());
}

// The oldest demand that is not ready yet; none where all are.
uint32_t Conductor::first_missing() const {
  const auto missing = std::ranges::find_if(demands_, [&](const Waiting& demand) {
    return board_.phase_of(demand.unit) != Phase::kReady;
  });
  return missing != demands_.end() ? missing->unit : kNone;
}

// Any thread: there may be more to do.
void Conductor::note_change() {
  {
    const MutexLock lock(board_.mutex);
    ++board_.version;
  }
  wake();
}

void Conductor::sleep() {
  waker_.announce();
  {
    const MutexLock lock(board_.mutex);
    if (board_.version != seen_version_) {
      waker_.cancel();
      return;
    }
  }
  pollfd fds[3] = {
      {waker_.fd(), POLLIN, 0}, {readers_.pool->ready_fd(), POLLIN, 0}, {-1, POLLIN, 0}};
  if (readers_.direct) fds[2].fd = readers_.direct->ready_fd();
  // Not past the time limit, which is looked at when awake.
  const double sleep_s = std::min(kLongestSleepS, options_.read_timeout_s);
  timespec nap{0, static_cast<long>(sleep_s * 1e9)};
  if ((slots_wanted_ || copies_full_) && ring_->copies_pending()) {
    // A copy that ends wakes nobody: look again soon, less often the longer it takes.
    const long us = std::min(kLongestNapUs, kShortestNapUs << std::min(idle_steps_++, 5));
    nap = {0, us * 1000};
  }
  ::ppoll(fds, 3, &nap, nullptr);
  waker_.clear();
}

Stall Conductor::cause_of(uint32_t demand) const {
  if (board_.phase_of(demand) == Phase::kAbsent) return Stall::kArena;
  const UnitWork& work = work_[demand];
  const bool unread = work.first_unread < chunks_of(demand).second;
  // The disk is idle: all slots are held by copies that wait for places in the arena.
  if (unread && !reads_under_way() && slots_wanted_ && ring_->copies_pending()) {
    return Stall::kArena;
  }
  // Its own copies wait for each other: those of other units come after a demand's.
  if (copies_full_ || (!unread && !reads_under_way())) return Stall::kH2d;
  return work.left > 0 ? Stall::kDisk : Stall::kH2d;
}

// Where several acquires wait, the oldest one's wait is counted.
void Conductor::account_stall(bool moved) {
  const auto now = Clock::now();
  const bool was_stalled = stalled_;
  if (stalled_) {
    const auto ns = std::chrono::duration_cast<std::chrono::nanoseconds>(now - stall_mark_).count();
    board_.counters.stall_ns[static_cast<int>(stall_cause_.load())] += static_cast<uint64_t>(ns);
  }
  stall_mark_ = now;
  const uint32_t missing = first_missing();
  stalled_ = missing != kNone && !paused_;
  if (!stalled_) return;
  stall_cause_ = cause_of(missing);
  if (moved || !was_stalled) last_move_ = now;
  for (Waiting& demand : demands_) limit_wait(demand, now);
}

// A demand for which nothing has moved for too long ends in an error.
void Conductor::limit_wait(Waiting& demand, Clock::time_point now) {
  if (demand.given_up || board_.phase_of(demand.unit) == Phase::kReady) return;
  // A device may be busy for long with work of others; a read should end.
  const double limit_s = options_.read_timeout_s * (reads_under_way() ? 1 : kDevicePatience);
  const std::chrono::duration<double> still = now - std::max(last_move_, demand.posted);
  if (still.count() <= limit_s) return;
  KeptError error = KeptError::of<TimeoutError>(describe(demand, now));
  demand.given_up = true;
  const MutexLock lock(board_.mutex);
  const size_t rank = board_.rank_of(demand.unit);
  if (rank < board_.demands.size()) board_.demands[rank].error = std::move(error);
  board_.changed.notify_all();
}

std::string Conductor::describe(const Waiting& demand, Clock::time_point now) const {
  const std::chrono::duration<double> still = now - std::max(last_move_, demand.posted);
  const std::string head = concat("nothing has moved for ", still.count(),
                                  " s while loading unit '", name_of(demand.unit), "': ");
  const std::string holder = holder_of_place(demand.unit);
  if (!holder.empty()) {
    return concat(head, "another thread holds unit '", holder,
                  "', which has its place in the arena. The limit is ", kDevicePatience,
                  " times read_timeout_s.");
  }
  const auto [first, count] = chunks_of(demand.unit);
  for (uint32_t c = first; c < first + count; ++c) {
    if (chunks_[c].copied) continue;
    const Chunk& chunk = plan_.chunks[c];
    const char* what = chunks_[c].phase == ChunkPhase::kReading ? "a read has not ended"
                       : chunks_[c].phase == ChunkPhase::kIdle
                           ? "no slot came free for a read"
                           : "its place did not come free after a read";
    return concat(head, what, ": ", spec_.shards[chunk.shard].path, ", offset ", chunk.read_offset,
                  ", ", chunk.read_bytes,
                  " bytes. Is the drive healthy? The limit is read_timeout_s.");
  }
  return concat(head, "the copies to the device have not been enqueued. Is the device healthy?");
}

// Empty where nobody holds it.
std::string Conductor::holder_of_place(uint32_t unit) const {
  const MutexLock lock(board_.mutex);
  for (const uint32_t held : board_.held) {
    if (held != unit && overlap(unit, held)) return name_of(held);
  }
  return {};
}

void Conductor::keep_error(KeptError error) {
  const MutexLock lock(board_.mutex);
  if (!board_.error) board_.error = std::move(error);
  ++board_.version;
  board_.changed.notify_all();
}

const std::byte* Conductor::cached(uint32_t chunk) const {
  const MutexLock lock(board_.mutex);
  const bool there = plan_.chunks[chunk].home == Home::kHost && cache_->filled(chunk);
  return there ? cache_->data(plan_.chunks[chunk]) : nullptr;
}

KeptCache Conductor::kept_cache() const {
  const MutexLock lock(board_.mutex);
  return cache_->kept(plan_);
}

}  // namespace wsm
