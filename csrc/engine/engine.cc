#include "engine/engine.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <thread>
#include <utility>

#include "engine/log.h"

namespace wsm {

namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kInterruptInterval = std::chrono::milliseconds(50);
constexpr const char* kCauseNames[kStallCauses] = {"SSD", "H2D", "arena"};

}  // namespace

void Engine::check_process() const {
  check<Error>(!forked(),
               "this streamed model belongs to another process: after a fork, open it again in the "
               "child (or use the 'spawn' start method)");
}

void Engine::check_inside(const CallGate::Visit& visit) const {
  check<Error>(visit.inside(), "this streamed model is closed");
}

const char* Engine::name_of(uint32_t unit) const {
  return unit == plan_.units.size() ? "(resident weights)" : spec_.units[unit].name.c_str();
}

// An error that ended the conductor stays for every later call.
void Engine::throw_kept_error() {
  if (!board_.error) return;
  const KeptError error = *board_.error;
  if (!board_.stop) board_.error.reset();
  ++board_.version;
  conductor_->wake();
  error.raise(error.message);
}

void Engine::load_resident(StreamHandle stream, const Interrupt& interrupt) {
  check_process();
  CallGate::Visit visit(gate_);
  check_inside(visit);
  const auto unit = static_cast<uint32_t>(plan_.units.size());
  if (conductor_->chunks_of(unit).second == 0) return;
  {
    const MutexLock lock(board_.mutex);
    throw_kept_error();
    wait_ready(visit, unit, interrupt);
  }
  device_->wait(stream, *board_.ready[unit]);
  device_->drain();  // whichever stream uses them first
}

void Engine::begin_pass(StreamHandle stream) {
  check_process();
  const CallGate::Visit visit(gate_);
  check_inside(visit);
  for (const auto& shard : shards_) shard->check_unchanged();
  recover_holds();
  const MutexLock lock(reports_mutex_);
  sum_ended_passes();
  probes_->begin_pass(passes_);
  PassRecord& record = record_of(passes_++);
  record.counts = board_.counters.read();
  record.ended = false;
  device_->record(*record.begin, stream);
  board_.trace.begin_pass(stream);
}

// What an aborted pass left acquired is free when the streams that it was acquired on come here:
// they may still read it. The mutex is not held while the device is called: a call may block.
void Engine::recover_holds() {
  std::vector<uint32_t> units;
  std::vector<std::pair<Event*, StreamHandle>> records;
  {
    const MutexLock lock(board_.mutex);
    units = board_.held;
    for (const uint32_t unit : units) {
      UnitState& state = board_.units[unit];
      const std::vector<Hold> holds = state.holds;
      for (const Hold& hold : holds) {
        records.emplace_back(&released_event(state, hold.stream), hold.stream);
      }
    }
  }
  for (const auto& [event, stream] : records) device_->record(*event, stream);
  const MutexLock lock(board_.mutex);
  for (const uint32_t unit : units) {
    board_.units[unit].holds.clear();
    std::erase(board_.held, unit);
  }
  ++board_.version;
  conductor_->wake();
}

void Engine::end_pass(StreamHandle stream) {
  const CallGate::Visit visit(gate_);
  if (!visit.inside()) return;  // closed in the middle of the pass
  {
    const MutexLock lock(reports_mutex_);
    check(passes_ended_ < passes_, "no pass was begun");
    passes_ended_ = passes_;
    PassRecord& record = record_of(passes_ - 1);
    device_->record(*record.end, stream);
    board_.trace.end_pass(stream);
    record.counts = board_.counters.read().since(record.counts);
    record.ended = true;
  }
  const MutexLock lock(board_.mutex);
  board_.sequence.end_pass();
  ++board_.passes_over;
  ++board_.version;
  conductor_->wake();
}

bool Engine::acquire(uint32_t unit, StreamHandle stream, const Interrupt& interrupt) {
  check_process();
  CallGate::Visit visit(gate_);
  check_inside(visit);
  check(unit < plan_.units.size(), "there is no unit ", unit);
  check(plan_.units[unit].place_bytes > 0, "unit '", spec_.units[unit].name, "' does not stream");
  const auto begin = Clock::now();
  bool waited = false, loaded = false, first = false;
  {
    const MutexLock lock(board_.mutex);
    throw_kept_error();
    check_nesting(unit);
    UnitState& state = board_.units[unit];
    if (state.holds.empty() && !board_.sequence.use(unit)) ++board_.counters.misses;
    waited = state.phase != Phase::kReady || (state.discarded && state.holds.empty());
    if (waited) {
      wait_ready(visit, unit, interrupt);
    } else {
      tell_conductor();
    }
    first = state.holds.empty();
    if (first) board_.held.push_back(unit);
    state.holds.push_back({stream, std::this_thread::get_id()});
    loaded = !std::exchange(state.used, true);
  }
  try {
    wait_for_copies(unit, stream, first);
  } catch (...) {  // the caller has nothing to release
    const MutexLock lock(board_.mutex);
    drop_hold(unit, stream);
    if (loaded) board_.units[unit].used = false;
    tell_conductor();
    throw;
  }
  if (options_.verbose) {
    const std::chrono::duration<double, std::milli> ms = Clock::now() - begin;
    log_acquired(unit, waited, ms.count());
  }
  return loaded;
}

// A place that another thread holds comes free, and is waited for. One that this thread holds does
// not, nor one whose holder waits for this thread.
void Engine::check_nesting(uint32_t unit) const {
  const uint32_t holder = never_released(unit, board_.demands.size());
  if (holder == kNone) return;
  throw Error(concat("unit '", spec_.units[unit].name,
                     "' cannot be loaded inside the forward of unit '", spec_.units[holder].name,
                     "': their places in the arena overlap. Make them one unit, or name the outer "
                     "module in units=[...]"));
}

// The unit in this one's place that is held until this thread goes on; none where there is none.
// `steps`: how many waits may lie in between.
uint32_t Engine::never_released(uint32_t unit, size_t steps) const {
  const auto never_goes_on = [&](std::thread::id thread) {
    board_.mutex.assert_held();
    if (thread == std::this_thread::get_id()) return true;
    return steps > 0 && std::ranges::any_of(board_.demands, [&](const Demand& demand) {
             board_.mutex.assert_held();
             return std::ranges::count(demand.waiters, thread) > 0 &&
                    never_released(demand.unit, steps - 1) != kNone;
           });
  };
  for (const uint32_t other : board_.held) {
    if (other == unit || !conductor_->overlap(unit, other)) continue;
    const std::vector<Hold>& holds = board_.units[other].holds;
    if (std::ranges::any_of(holds, never_goes_on, &Hold::thread)) return other;
  }
  return kNone;
}

// What `stream` runs from now on comes after the unit's copies. `first`: nobody else holds it.
void Engine::wait_for_copies(uint32_t unit, StreamHandle stream, bool first) {
  const Event& ready = *board_.ready[unit];
  const MutexLock lock(reports_mutex_);
  board_.trace.begin_wait(unit, ready, stream);
  probes_->wait(stream, ready, passes_ - 1);
  board_.trace.end_wait(stream);
  if (first) board_.trace.begin_forward(unit, stream);
}

// Posts a demand for the unit and waits until it is ready. The mutex is released while waiting.
void Engine::wait_ready(CallGate::Visit& visit, uint32_t unit, const Interrupt& interrupt) {
  post_demand(unit);
  try {
    const UnitState& state = board_.units[unit];
    while (state.phase != Phase::kReady || state.discarded) {
      board_.changed.wait_for(board_.mutex, kInterruptInterval);
      throw_kept_error();
      const Demand& demand = board_.demands[board_.rank_of(unit)];
      if (demand.error) demand.error->raise(demand.error->message);
      if (interrupt) {
        const MutexUnlock unlocked(board_.mutex);
        const CallGate::Absence absence(visit);
        interrupt();
      }
      check<Error>(visit.inside() && !board_.stop, "this streamed model was closed while unit '",
                   name_of(unit), "' was awaited");
    }
  } catch (...) {
    if (visit.inside()) withdraw_demand(unit);
    throw;
  }
  withdraw_demand(unit);
}

void Engine::post_demand(uint32_t unit) {
  const size_t rank = board_.rank_of(unit);
  if (rank == board_.demands.size()) board_.demands.push_back({unit, Clock::now()});
  board_.demands[rank].waiters.push_back(std::this_thread::get_id());
  ++board_.version;
  conductor_->wake();
}

// The last of those who wait for the unit takes the demand back.
void Engine::withdraw_demand(uint32_t unit) {
  const auto demand = board_.demands.begin() + static_cast<ptrdiff_t>(board_.rank_of(unit));
  std::vector<std::thread::id>& waiters = demand->waiters;
  waiters.erase(std::ranges::find(waiters, std::this_thread::get_id()));
  if (waiters.empty()) board_.demands.erase(demand);
  ++board_.version;
  conductor_->wake();
}

void Engine::log_acquired(uint32_t unit, bool waited, double waited_ms) {
  if (waited) {
    const int cause = static_cast<int>(conductor_->last_stall());
    log_wait(spec_.units[unit].label, waited_ms, kCauseNames[cause]);
  }
  std::vector<std::string> ahead;
  bool loading = false;
  {
    const MutexLock lock(board_.mutex);
    const auto& upcoming = board_.sequence.upcoming();
    for (size_t i = 0; i < upcoming.size() && i < plan_.lookahead_units; ++i) {
      ahead.push_back(spec_.units[upcoming[i]].label);
      loading |= board_.units[upcoming[i]].phase != Phase::kReady;
    }
  }
  if (loading) log_prefetch(ahead);
}

// The hold goes only when the event is recorded: until then nobody takes the place. The mutex is
// not held while the device is called: a call may block.
void Engine::release(uint32_t unit, StreamHandle stream) {
  check(unit < plan_.units.size(), "there is no unit ", unit);
  const CallGate::Visit visit(gate_);
  if (!visit.inside()) return;
  Event* event = nullptr;
  {
    const MutexLock lock(board_.mutex);
    UnitState& state = board_.units[unit];
    if (state.holds.empty()) return;  // recovered by begin_pass since
    event = &released_event(state, stream);
  }
  device_->record(*event, stream);
  bool last = false;
  {
    const MutexLock lock(board_.mutex);
    last = drop_hold(unit, stream);
    tell_conductor();
  }
  if (last) board_.trace.end_forward(unit, stream);
}

// Drops the unit's hold of this stream, or of another one where it was acquired on another one.
// Whether it was the last.
bool Engine::drop_hold(uint32_t unit, StreamHandle stream) {
  std::vector<Hold>& holds = board_.units[unit].holds;
  if (holds.empty()) return false;  // recovered by begin_pass since
  const auto found = std::ranges::find(holds, stream, &Hold::stream);
  holds.erase(found != holds.end() ? found : holds.end() - 1);
  if (!holds.empty()) return false;
  std::erase(board_.held, unit);
  return true;
}

// The event that stands for what `stream` has read of the unit since it was loaded. The mutex is
// released while one is made.
Event& Engine::released_event(UnitState& state, StreamHandle stream) {
  std::unique_ptr<Event> fresh;
  while (true) {
    for (size_t i = 0; i < state.released_count; ++i) {
      if (state.released[i].first == stream) return *state.released[i].second;
    }
    if (fresh && state.released_count == state.released.size()) {
      state.released.emplace_back(stream, std::move(fresh));
    }
    if (state.released_count < state.released.size()) {
      auto& [of, event] = state.released[state.released_count++];
      of = stream;
      return *event;
    }
    const MutexUnlock unlocked(board_.mutex);
    fresh = device_->make_event();
  }
}

// Where all that is expected is there, the conductor may sleep on:
// to wake a thread costs more than all else that an acquire does.
void Engine::tell_conductor() {
  ++board_.version;
  if (options_.poison || board_.wants_more()) conductor_->wake();
}

void Engine::discard(uint32_t unit) {
  check_process();
  const CallGate::Visit visit(gate_);
  check_inside(visit);
  check(unit < plan_.units.size(), "there is no unit ", unit);
  const MutexLock lock(board_.mutex);
  if (std::exchange(board_.units[unit].discarded, true)) return;
  board_.discarded.push_back(unit);
  ++board_.version;
  conductor_->wake();
}

}  // namespace wsm
