#include "support/chaos.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "engine/preload.h"
#include "support/streamed_model.h"
#include "support/witness.h"

namespace wsm::testing {
namespace {

struct Interrupted {};

struct Hold {
  uint32_t unit = 0;
  StreamHandle stream = 0;
};

class Chaos {
 public:
  Chaos(std::span<const uint8_t> bytes, const Terrain& terrain)
      : draws_(bytes),
        terrain_(terrain),
        drawn_(draw_model(draws_, terrain.ground)),
        model_(drawn_.spec, drawn_.memory),
        faults_(draw_faults(draws_, terrain)),
        device_(draw_device(draws_, terrain)),
        gpu_(draw_gpu(draws_)),
        log_(*faults_.log),
        witness_(model_, terrain.ground, faults_) {
    order_ = model_.all_units();
  }

  Outcome run() {
    Outcome outcome;
    try {
      play();
    } catch (const Wrong& wrong) {
      outcome.wrong = wrong.what;
    } catch (const std::exception& error) {
      outcome.wrong = concat("unexpected: ", error.what());
    }
    if (!outcome.wrong.empty()) outcome.wrong += describe();
    log_.calm = true;
    if (gpu_) gpu_->synchronize();
    model_.close();
    witness_.count(tally_);
    outcome.tally = tally_;
    return outcome;
  }

 private:
  void play() {
    tally_.scenarios = 1;
    if (!open()) return;
    for (int i = 0; i < terrain_.most_passes && !draws_.empty(); ++i) {
      i % 2 == 0 ? pass() : traced_pass();
      if (witness_.device_broken()) replace_device();
      between_passes();
    }
    recover();
  }

  // Opens by drawn budgets, or refuses them.
  bool open() {
    limits_ = draw_limits(draws_, model_.spec());
    try {
      const Plan plan = model_.plan(limits_);
      const EngineOptions options = draw_options(draws_, terrain_, faults_);
      std::shared_ptr<Preload> ahead = draw_ahead(options);
      model_.open(plan, options, make_device(), std::move(ahead));
      log_.calm = false;
    } catch (const InvalidArgument& error) {
      must(error.what() != std::string(), "budgets were refused without a reason");
      ++tally_.refused;
      return false;
    }
    start();
    return true;
  }

  std::unique_ptr<Device> make_device() const {
    if (!gpu_) return std::make_unique<FaultyDevice>(device_);
    return std::make_unique<FaultyDevice>(device_, std::make_unique<AsyncDevice>(gpu_));
  }

  // The host device computes on the calling thread, the GPU of tests on one of its streams.
  StreamHandle draw_stream() { return gpu_ ? 2 + draws_.below(AsyncGpu::kStreams - 2) : 0; }

  // All kernels have run, and their memory may go.
  void settle() {
    if (!gpu_) return;
    gpu_->synchronize();
    witness_.check_kernels();
  }

  void check_unit(uint32_t unit, StreamHandle stream) {
    gpu_ ? witness_.check_unit_on(*gpu_, unit, stream) : witness_.check_unit(unit);
  }

  void check_held() {
    for (const Hold& hold : held_) check_unit(hold.unit, hold.stream);
  }

  void start() {
    must(model_.engine().memory().host_bytes <= limits_.host_bytes, "the host budget is exceeded");
    for (int attempt = 0; !witness_.guarded([&] { model_.load_resident(); }); ++attempt) {
      if (witness_.device_broken()) return replace_device();
      if (attempt == 5) log_.calm = true;  // or a drive that is gone would end it here
      must(attempt < 20, "the resident weights cannot be loaded: ", witness_.last_error());
    }
    log_.calm = false;
  }

  // What a broken device has thrown it throws for ever; on another one the model works.
  void replace_device() {
    for (const uint32_t unit : order_) {
      if (!streams(unit)) continue;
      must(!witness_.guarded([&] { model_.engine().acquire(unit, stream_, {}); }),
           "a broken device works again");
    }
    device_ = {};
    witness_.device_replaced();
    reopen();
  }

  void pass() {
    Engine& engine = model_.engine();
    stream_ = draw_stream();
    engine.begin_pass(stream_);
    held_.clear();  // what an aborted pass left acquired
    ++tally_.passes;
    std::optional<Bystander> bystander;
    if (draws_.one_in(8) && terrain_.bystanders) bystander.emplace(model_, witness_);
    for (const uint32_t unit : order_) {
      // An error ends the pass, or is passed over.
      if (!visit(unit) && (draws_.one_in(2) || witness_.device_broken() || engine.closed())) break;
    }
    if (bystander) {
      const std::string wrong = bystander->leave();
      must(wrong.empty(), wrong);
    }
    if (draws_.one_in(12)) {
      ++tally_.aborted_passes;  // neither released nor ended, and its kernels may still run
      for (int kernels = 0; kernels < 3; ++kernels) check_held();
      return;
    }
    while (!held_.empty()) let_go();
    engine.end_pass(stream_);
    if (draws_.one_in(4)) settle();
  }

  // The trace is often full before the end.
  void traced_pass() {
    Engine& engine = model_.engine();
    engine.start_trace(draw_stream(), 100, {});
    pass();
    const Timeline timeline = engine.stop_trace({});
    must(timeline.records.size() <= 100, "a trace has grown");
    for (const TraceRecord& record : timeline.records) {
      must(0 <= record.begin_ns && record.begin_ns <= record.end_ns, "a trace runs backwards");
      must(record.end_ns <= timeline.length_ns, "a trace is longer than it says");
      const bool is_pass = record.kind == TraceKind::kPass;
      must(is_pass || record.unit <= order_.size(), "a trace names a unit that there is not");
    }
  }

  // False where an error was thrown.
  bool visit(uint32_t unit) {
    switch (draws_.below(20)) {
      case 19:
        return true;  // skipped
      case 18:
        return use(unit) && use(unit);
      case 17:
        return use(random_unit()) && use(unit);
      case 16:
        return hold(unit);  // the next ones lie inside it
      case 15:
        if (!held_.empty()) let_go();
        return use(unit);
      case 14:
        return hold(unit) && hold(unit);
      case 13:
        fetch(random_unit(), static_cast<uint32_t>(draws_.below(6)));
        return use(unit);
      case 12:
        interrupted_use(unit);
        return use(unit);
      case 11:
        log_.calm = draws_.one_in(2);  // lost reads come back; the storage fails again later
        return use(unit);
      case 10:
        if (draws_.one_in(8)) close_in_the_middle();
        return !model_.engine().closed();
      default:
        return use(unit);
    }
  }

  void between_passes() {
    log_.calm = false;
    if (model_.engine().closed()) reopen();
    switch (draws_.below(12)) {
      case 11:
        resize();
        break;
      case 10:
        reopen();
        break;
      case 9:
        for (size_t i = order_.size(); i > 1; --i) {
          std::swap(order_[i - 1], order_[draws_.below(i)]);
        }
        break;
      case 8:
        model_.engine().last_pass({});
        break;
      default:
        break;
    }
  }

  // The storage recovers: all that is left of its errors is thrown, and then a pass is right.
  void recover() {
    if (model_.engine().closed()) reopen();
    log_.calm = true;
    for (uint64_t attempt = 0;; ++attempt) {
      must(attempt <= 2 + log_.errors + log_.lost,
           "no pass works after the storage has recovered: ", witness_.last_error());
      model_.engine().begin_pass(stream_ = draw_stream());
      held_.clear();
      ++tally_.passes;
      const bool good = std::ranges::all_of(order_, [&](uint32_t unit) { return use(unit); });
      while (!held_.empty()) let_go();
      model_.engine().end_pass(stream_);
      settle();
      if (good) break;
      if (witness_.device_broken()) replace_device();
      log_.calm = true;
    }
    for (const uint32_t unit : order_) {
      for (uint32_t t = 0; t < model_.spec().units[unit].tensors.size(); ++t) fetch(unit, t);
    }
    const Counts totals = model_.engine().totals();
    must(totals.demand_loads <= totals.loads, "more units were demanded than loaded");
  }

  // False where an error was thrown, that had to be.
  bool use(uint32_t unit) {
    const StreamHandle stream = draws_.one_in(8) ? draw_stream() : stream_;
    if (!streams(unit)) {
      check_unit(unit, stream);
      return true;
    }
    if (overlaps_held(unit)) {
      refused_nesting(unit);
      return true;
    }
    if (!witness_.guarded([&] { model_.engine().acquire(unit, stream, {}); })) return false;
    check_unit(unit, stream);
    model_.engine().release(unit, stream);
    check_held();
    ++tally_.uses;
    return true;
  }

  bool hold(uint32_t unit) {
    if (!streams(unit) || overlaps_held(unit)) return use(unit);
    const StreamHandle stream = draws_.one_in(8) ? draw_stream() : stream_;
    if (!witness_.guarded([&] { model_.engine().acquire(unit, stream, {}); })) return false;
    held_.push_back({unit, stream});
    check_unit(unit, stream);
    ++tally_.uses;
    return true;
  }

  void let_go() {
    const auto [unit, stream] = held_.back();
    check_unit(unit, stream);
    model_.engine().release(unit, stream);
    held_.pop_back();
  }

  void refused_nesting(uint32_t unit) {
    try {
      model_.engine().acquire(unit, stream_, {});
    } catch (const Error& error) {
      if (!tells(error.what(), "cannot be loaded inside the forward of")) {
        witness_.expect_fault(error);
        return;
      }
      must(tells(error.what(), model_.spec().units[unit].name),
           "a nesting is refused: ", error.what());
      ++tally_.refused_nestings;
      return;
    }
    must(false, "a unit was loaded over one that is held");
  }

  void interrupted_use(uint32_t unit) {
    if (!streams(unit) || overlaps_held(unit)) return;
    try {
      witness_.guarded([&] {
        model_.engine().acquire(unit, stream_, [] { throw Interrupted{}; });
        model_.engine().release(unit, stream_);
      });
    } catch (const Interrupted&) {
      ++tally_.interrupted_waits;
    }
  }

  void fetch(uint32_t unit, uint32_t draw) {
    if (witness_.fetch(unit, draw)) ++tally_.fetches;
  }

  void close_in_the_middle() {
    log_.calm = true;  // a read that never ends would keep its buffers: see engine_faults_test
    model_.engine().close();
    held_.clear();
    try {
      model_.engine().acquire(random_unit(), stream_, {});
    } catch (const Error& error) {
      must(tells(error.what(), "closed"), "after close: ", error.what());
      return;
    }
    must(false, "a closed engine goes on");
  }

  // Some of the shards may have been read before there is an engine; without faults, as nobody is
  // told of an error there.
  std::shared_ptr<Preload> draw_ahead(EngineOptions options) {
    if (!draws_.one_in(2)) return nullptr;
    log_.calm = true;
    options.direct = DirectMode::kOn;  // the shards lie in the page cache
    options.read_timeout_s = 30;       // nothing gets lost
    std::vector<std::string> paths;
    for (const ShardSpec& shard : model_.spec().shards) paths.push_back(shard.path);
    const uint64_t most_bytes = draws_.between(1, 3) * (4 << 20);
    auto ahead = std::make_shared<Preload>(paths, options, most_bytes);
    for (int i = 0; i < 50 && ahead->held_bytes() == 0; ++i) {
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
    if (ahead->held_bytes() > 0) ++tally_.read_ahead;
    return ahead;
  }

  void reopen() {
    log_.calm = true;
    if (draws_.one_in(2)) model_.engine().close();  // while kernels run
    settle();
    model_.close();
    held_.clear();
    const PlanLimits before = limits_;
    limits_ = draw_limits(draws_, model_.spec());
    const EngineOptions options = draw_options(draws_, terrain_, faults_);
    std::optional<Plan> plan;
    try {
      plan = model_.plan(limits_);
    } catch (const InvalidArgument&) {
      limits_ = before;
      plan = model_.plan(limits_);
    }
    std::shared_ptr<Preload> ahead = draw_ahead(options);
    model_.open(*plan, options, make_device(), std::move(ahead));
    start();
  }

  void resize() {
    log_.calm = true;  // so that all reads end, and the memory can be handed over
    const PlanLimits limits = draw_limits(draws_, model_.spec());
    const EngineOptions options = draw_options(draws_, terrain_, faults_);
    settle();
    try {
      model_.resize(limits, options);
    } catch (const InvalidArgument&) {
      ++tally_.refused;
      log_.calm = false;
      return;  // nothing has changed
    }
    ++tally_.resizes;
    held_.clear();
    limits_ = limits;
    start();
  }

  bool streams(uint32_t unit) const { return model_.engine().plan().units[unit].place_bytes > 0; }
  bool overlaps_held(uint32_t unit) const {
    const std::vector<UnitPlan>& units = model_.engine().plan().units;
    return std::ranges::any_of(held_, [&](const Hold& hold) {
      return hold.unit != unit && places_overlap(units[unit], units[hold.unit]);
    });
  }
  uint32_t random_unit() { return static_cast<uint32_t>(draws_.below(order_.size())); }

  std::string describe() const {
    return concat(" [", model_.spec().units.size(), " units, ", model_.bytes(), " bytes; arena ",
                  limits_.arena_bytes.value_or(0), ", homes ", limits_.home_bytes.value_or(0),
                  ", cache ", limits_.cache_bytes.value_or(0), ", staging ",
                  limits_.staging_bytes.value_or(0), ", chunks ", limits_.chunk_bytes.value_or(0),
                  "; faults so far ", log_.total(), ", pass ", tally_.passes, "]");
  }

  Draws draws_;
  const Terrain& terrain_;
  DrawnModel drawn_;
  StreamedModel model_;
  FaultyOptions faults_;
  FaultyDeviceOptions device_;
  const std::shared_ptr<AsyncGpu> gpu_;  // null: the host device
  FaultLog& log_;
  PlanLimits limits_;
  std::vector<uint32_t> order_;
  std::vector<Hold> held_;   // as often as they were acquired
  StreamHandle stream_ = 0;  // of the pass
  Tally tally_;
  Witness witness_;
};

}  // namespace

Outcome run_chaos(std::span<const uint8_t> bytes, const Terrain& terrain) {
  return Chaos(bytes, terrain).run();
}

}  // namespace wsm::testing
