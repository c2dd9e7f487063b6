#include "engine/engine.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <thread>
#include <utility>

#include "engine/log.h"
#include "util/abandon.h"

namespace wsm {

namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kInterruptInterval = std::chrono::milliseconds(50);
constexpr size_t kProbePairs = 512;
constexpr const char* kCauseNames[kStallCauses] = {"SSD", "H2D", "arena"};

std::vector<uint64_t> streamed_bytes(const Plan& plan) {
  std::vector<uint64_t> bytes;
  for (const UnitPlan& unit : plan.units) bytes.push_back(unit.streamed_bytes);
  return bytes;
}

bool same_shards(const std::vector<ShardSpec>& a, const std::vector<ShardSpec>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const auto& x, const auto& y) {
    return x.path == y.path && x.bytes == y.bytes;
  });
}

}  // namespace

Engine::Engine(ModelSpec spec, Plan plan, Handoff handoff, std::byte* arena,
               std::vector<HomeMemory> homes, const std::vector<const void*>& memory,
               StreamHandle allocated_on, EngineOptions options)
    : spec_(std::move(spec)),
      plan_(std::move(plan)),
      options_(std::move(options)),
      device_(std::move(handoff.device)),
      inherited_(std::move(handoff.cache)),
      board_(streamed_bytes(plan_), plan_.read_ahead_bytes, plan_.lookahead_units),
      process_(::getpid()) {
  validate(spec_);
  check(plan_.units.size() == spec_.units.size(), "the plan was made for another model");
  check(arena != nullptr || plan_.arena_bytes == 0, "no arena was given, the plan needs ",
        plan_.arena_bytes, " bytes");
  check(homes.size() == plan_.home_blocks.size(), homes.size(),
        " blocks were given for the homes, the plan needs ", plan_.home_blocks.size());
  for (const HomeMemory& block : homes) check(block.data != nullptr, "a home block has no memory");
  open_shards(memory);
  if (inherited_) check_same_files(handoff);
  tell_refused_files();
  choice_without_effect_ = choice_without_effect();
  if (!choice_without_effect_.empty()) log_once(choice_without_effect_);
  board_.units.resize(plan_.units.size() + 1);
  for (UnitState& state : board_.units) {
    board_.ready.push_back(device_->make_event());
    state.released.emplace_back(0, device_->make_event());
  }
  probes_ = std::make_unique<StallProbes>(*device_, board_.counters, kProbePairs);
  for (PassRecord& record : records_) {
    record.begin = device_->make_event(true);
    record.end = device_->make_event(true);
  }
  // Whatever the allocator's stream still does with this memory comes before the first copy.
  device_->record(*records_[0].begin, allocated_on);
  device_->wait(device_->copy_stream(), *records_[0].begin);
  if (handoff.preload) {
    // What was read before there was a plan, as far as the budget has room for it beside the plan.
    const uint64_t taken = plan_.cache_bytes + plan_.staging_bytes();
    const uint64_t budget = plan_.host_budget_bytes;
    handoff.preload->settle(shards_, plan_, budget - std::min(budget, taken));
  }
  conductor_ = std::make_unique<Conductor>(
      spec_, plan_, *device_, board_, shards_,
      make_readers(options_, any_direct(), plan_.chunk_bytes), arena, std::move(homes),
      std::move(inherited_), handoff.kept, std::move(handoff.preload),
      ConductorOptions{options_.poison, options_.verbose, options_.read_timeout_s});
  conductor_->start();
}

Engine::~Engine() {
  close();
  if (abandoned_) abandon_buffers();
}

void Engine::open_shards(const std::vector<const void*>& memory) {
  check(memory.size() == spec_.shards.size(), "one memory pointer (or none) for each shard");
  for (size_t i = 0; i < spec_.shards.size(); ++i) {
    const ShardSpec& shard = spec_.shards[i];
    shards_.push_back(memory[i] ? Shard::from_memory(shard.path, memory[i], shard.bytes)
                                : Shard::open(shard.path, options_.direct));
    check<IoError>(shards_[i]->bytes() == shard.bytes, shard.path, " has ", shards_[i]->bytes(),
                   " bytes now and had ", shard.bytes,
                   " when its header was read; open the checkpoint again");
    check(shard.alignment % shards_[i]->alignment() == 0 || !shards_[i]->direct(), shard.path,
          ": the plan reads at multiples of ", shard.alignment, ", direct reads need ",
          shards_[i]->alignment());
  }
}

void Engine::check_same_files(const Handoff& handoff) const {
  check(same_shards(spec_.shards, handoff.shards),
        "a host cache can only be taken over for the same files");
  for (size_t i = 0; i < shards_.size(); ++i) {
    check<IoError>(shards_[i]->same_file(*handoff.files[i]), shards_[i]->path(),
                   " has changed; load the model again");
  }
}

bool Engine::any_direct() const {
  return std::any_of(shards_.begin(), shards_.end(), [](const auto& s) { return s->direct(); });
}

void Engine::tell_refused_files() const {
  const Shard* first = nullptr;
  size_t count = 0;
  for (const auto& shard : shards_) {
    if (!shard->direct_refused()) continue;
    if (!first) first = shard.get();
    ++count;
  }
  if (first) log_direct_refused(first->path(), count - 1, first->mode_reason());
}

// What was asked for, and can make no difference to these files; empty where all can.
std::string Engine::choice_without_effect() const {
  const bool ring = options_.reader == ReaderChoice::kUring;
  const auto file = std::find_if(shards_.begin(), shards_.end(),
                                 [](const auto& shard) { return shard->memory() == nullptr; });
  if (file == shards_.end()) {
    if (ring) return "reader 'uring' (WSM_READER) has no effect: the weights come from RAM";
    if (options_.direct != DirectMode::kOn) return {};
    return "direct reads (WSM_DIRECT=1) are not done: the weights come from RAM";
  }
  if (!ring || any_direct()) return {};
  return concat("reader 'uring' (WSM_READER) has no effect: it does direct reads, and ",
                (*file)->path(), " is read by threads: ", (*file)->mode_reason());
}

void Engine::check_usable() const {
  check<Error>(::getpid() == process_,
               "this streamed model belongs to another process: after a fork, open it again in the "
               "child (or use the 'spawn' start method)");
  check<Error>(!closed_, "this streamed model is closed");
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
  check_usable();
  const auto unit = static_cast<uint32_t>(plan_.units.size());
  if (conductor_->chunks_of(unit).second == 0) return;
  {
    const MutexLock lock(board_.mutex);
    throw_kept_error();
    wait_ready(unit, interrupt);
  }
  device_->wait(stream, *board_.ready[unit]);
  device_->drain();  // whichever stream uses them first
}

void Engine::begin_pass(StreamHandle stream) {
  check_usable();
  for (const auto& shard : shards_) shard->check_unchanged();
  {
    const MutexLock lock(board_.mutex);
    for (const uint32_t unit : board_.held) {
      record_released(board_.units[unit], stream);
      board_.units[unit].acquired = 0;
    }
    if (!board_.held.empty()) ++board_.version;
    board_.held.clear();
  }
  conductor_->wake();
  const MutexLock lock(reports_mutex_);
  sum_ended_passes();
  probes_->begin_pass(passes_);
  PassRecord& record = record_of(passes_++);
  record.counts = board_.counters.read();
  record.ended = false;
  device_->record(*record.begin, stream);
  board_.trace.begin_pass(stream);
}

void Engine::end_pass(StreamHandle stream) {
  if (closed_) return;  // in the middle of the pass
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
  check_usable();
  check(unit < plan_.units.size(), "there is no unit ", unit);
  check(plan_.units[unit].place_bytes > 0, "unit '", spec_.units[unit].name, "' does not stream");
  const auto begin = Clock::now();
  bool waited = false, loaded = false, first = false;
  {
    const MutexLock lock(board_.mutex);
    throw_kept_error();
    UnitState& state = board_.units[unit];
    for (const uint32_t other : board_.held) {
      check<Error>(other == unit || !conductor_->overlap(unit, other), "unit '",
                   spec_.units[unit].name, "' cannot be loaded inside the forward of unit '",
                   spec_.units[other].name,
                   "': their places in the arena overlap. Make them one unit, or name the outer "
                   "module in units=[...]");
    }
    if (state.acquired == 0 && !board_.sequence.use(unit)) ++board_.counters.misses;
    waited = state.phase != Phase::kReady || (state.discarded && state.acquired == 0);
    if (waited) {
      wait_ready(unit, interrupt);
    } else {
      tell_conductor();
    }
    first = state.acquired++ == 0;
    if (first) board_.held.push_back(unit);
    loaded = !std::exchange(state.used, true);
  }
  {
    const MutexLock lock(reports_mutex_);
    board_.trace.begin_wait(unit, *board_.ready[unit], stream);
    probes_->wait(stream, *board_.ready[unit], passes_ - 1);
    board_.trace.end_wait(stream);
    if (first) board_.trace.begin_forward(unit, stream);
  }
  if (options_.verbose) {
    const std::chrono::duration<double, std::milli> ms = Clock::now() - begin;
    log_acquired(unit, waited, ms.count());
  }
  return loaded;
}

// Posts the unit as the demand and waits until it is ready. The mutex is released while waiting.
void Engine::wait_ready(uint32_t unit, const Interrupt& interrupt) {
  board_.demand = unit;
  ++board_.version;
  conductor_->wake();
  const auto withdraw = [&] {
    board_.mutex.assert_held();
    board_.demand = kNone;
    ++board_.version;
    conductor_->wake();
  };
  try {
    const UnitState& state = board_.units[unit];
    while (state.phase != Phase::kReady || state.discarded) {
      board_.changed.wait_for(board_.mutex, kInterruptInterval);
      throw_kept_error();
      check<Error>(!board_.stop, "this streamed model was closed while unit '",
                   conductor_->name_of(unit), "' was awaited");
      if (!interrupt) continue;
      const MutexUnlock unlocked(board_.mutex);
      interrupt();
    }
  } catch (...) {
    withdraw();
    throw;
  }
  withdraw();
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

void Engine::release(uint32_t unit, StreamHandle stream) {
  check(unit < plan_.units.size(), "there is no unit ", unit);
  if (closed_) return;
  const MutexLock lock(board_.mutex);
  UnitState& state = board_.units[unit];
  if (state.acquired == 0) return;  // recovered by begin_pass since
  record_released(state, stream);
  if (--state.acquired == 0) {
    std::erase(board_.held, unit);
    board_.trace.end_forward(unit, stream);
  }
  tell_conductor();
}

// Where all that is expected is there, the conductor may sleep on:
// to wake a thread costs more than all else that an acquire does.
void Engine::tell_conductor() {
  ++board_.version;
  if (options_.poison || board_.wants_more()) conductor_->wake();
}

void Engine::discard(uint32_t unit) {
  check_usable();
  check(unit < plan_.units.size(), "there is no unit ", unit);
  const MutexLock lock(board_.mutex);
  if (std::exchange(board_.units[unit].discarded, true)) return;
  board_.discarded.push_back(unit);
  ++board_.version;
  conductor_->wake();
}

void Engine::record_released(UnitState& state, StreamHandle stream) {
  size_t i = 0;
  while (i < state.released_count && state.released[i].first != stream) ++i;
  if (i == state.released_count) ++state.released_count;
  if (i == state.released.size()) state.released.emplace_back(stream, device_->make_event());
  state.released[i].first = stream;
  device_->record(*state.released[i].second, stream);
}

void Engine::close() {
  if (closed_.exchange(true)) return;
  if (::getpid() != process_) {
    abandoned_ = true;  // the threads and the device context are the parent's
    return;
  }
  const bool reads_ended = conductor_->stop();
  try {
    device_->drain();
  } catch (const std::exception& error) {
    log_warning(concat("closing: ", error.what()));
  }
  if (!reads_ended) {
    log_warning(concat("closing: a read has not ended in ", options_.read_timeout_s,
                       " s; its memory is left to the process"));
    abandoned_ = true;
  }
}

KeptCache Engine::kept_cache() const {
  check<Error>(::getpid() == process_ && conductor_, "this streamed model has no host cache here");
  for (const auto& shard : shards_) shard->check_unchanged();
  return conductor_->kept_cache();
}

Handoff Engine::hand_over() {
  check<Error>(::getpid() == process_, "this streamed model belongs to another process");
  close();
  check<Error>(!abandoned_ && conductor_, "this streamed model has nothing to hand over");
  Handoff handoff{.shards = spec_.shards};
  handoff.kept = conductor_->kept_cache();
  handoff.cache = conductor_->release_cache();
  // Events, and all that has them, go before the device.
  conductor_.reset();
  board_.trace.detach();
  board_.ready.clear();
  {
    const MutexLock reports(reports_mutex_);
    const MutexLock lock(board_.mutex);
    probes_.reset();
    for (UnitState& state : board_.units) state = {};
    for (PassRecord& record : records_) record = {};
  }
  handoff.device = std::move(device_);
  handoff.files = std::move(shards_);
  return handoff;
}

// Never freed: something outside our control may still write into them.
void Engine::abandon_buffers() {
  abandon(conductor_);
  abandon(probes_);
  auto trace = std::make_unique<std::shared_ptr<Trace::Recording>>(board_.trace.detach());
  abandon(trace);
  for (auto& shard : shards_) abandon(shard);
  for (auto& event : board_.ready) abandon(event);
  for (UnitState& state : board_.units) {
    for (auto& [stream, event] : state.released) abandon(event);
  }
  for (PassRecord& record : records_) {
    abandon(record.begin);
    abandon(record.end);
  }
  abandon(device_);
}

}  // namespace wsm
