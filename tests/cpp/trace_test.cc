#include "engine/trace.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "support/failing_calls.h"
#include "support/failing_device.h"
#include "support/streamed_model.h"
#include "util/align.h"

namespace wsm {
namespace {

using testing::Call;
using testing::DeviceLedger;
using testing::FailingCalls;
using testing::FailingDevice;
using testing::StreamedModel;

using Clock = Trace::Clock;
using std::chrono::microseconds;

constexpr uint64_t kChunk = 64 * kKiB;
constexpr int64_t kMs = 1'000'000;
constexpr uint32_t kUnits = 4;

std::shared_ptr<Device> unowned(Device& device) { return {std::shared_ptr<void>(), &device}; }

// Does at once what it is told, which for copies is nothing. Its clock moves with each record and
// each copy, and is read as CUDA's is: in milliseconds, as a float.
class StepDevice : public Device {
 public:
  explicit StepDevice(double record_ms = 1, double copy_ms = 0)
      : record_ms_(record_ms), copy_ms_(copy_ms) {}

  bool slow = false;  // nothing is ever done
  std::atomic<int64_t> copies{0};

  const char* kind() const override { return "steps"; }
  int index() const override { return 0; }
  bool register_host(void*, size_t, std::string*) override { return true; }
  void unregister_host(void*) noexcept override {}
  void copy_to_device(void*, const void*, size_t) override { ++copies; }
  void fill(void*, uint8_t, size_t) override {}
  StreamHandle copy_stream() const override { return 1; }
  std::unique_ptr<Event> make_event(bool) override { return std::make_unique<StepEvent>(); }
  void record(Event& event, StreamHandle) override {
    static_cast<StepEvent&>(event).ms =
        record_ms_ * static_cast<double>(++records_) + copy_ms_ * static_cast<double>(copies);
  }
  void wait(StreamHandle, const Event&) override {}
  bool done(const Event&) override { return !slow; }
  double elapsed_seconds(const Event& begin, const Event& end) override {
    return static_cast<float>(ms_of(end) - ms_of(begin)) * 1e-3;
  }
  void drain() override {}

 private:
  struct StepEvent final : Event {
    double ms = 0;
  };
  static double ms_of(const Event& event) { return static_cast<const StepEvent&>(event).ms; }

  const double record_ms_;
  const double copy_ms_;
  std::atomic<int64_t> records_{0};
};

// Its nth record is not done at the first look, and takes so long at the next one. It knows between
// what the time from one look to the next must lie.
class SlowStepDevice final : public StepDevice {
 public:
  struct Try {
    Clock::time_point recorded{}, looked{}, done{}, next{};
  };
  explicit SlowStepDevice(std::vector<microseconds> takes) : takes_(std::move(takes)) {}

  std::vector<Try> tries;

  void record(Event& event, StreamHandle stream) override {
    if (looks_ > 0) tries.back().next = Clock::now();
    looks_ = tries.size() < takes_.size() ? 0 : kAtOnce;
    StepDevice::record(event, stream);
    if (looks_ == 0) tries.push_back({.recorded = Clock::now()});
  }
  bool done(const Event&) override {
    if (looks_ == kAtOnce) return true;
    Try& last = tries.back();
    if (looks_++ == 0) {
      last.looked = Clock::now();
      return false;
    }
    const auto end = Clock::now() + takes_[tries.size() - 1];
    while (looks_ == 2 && Clock::now() < end) std::this_thread::yield();
    if (looks_ == 2) last.done = Clock::now();
    return true;
  }

 private:
  static constexpr int kAtOnce = -1;
  const std::vector<microseconds> takes_;
  int looks_ = kAtOnce;  // at the last record
};

// One call of each kind.
void write_all(Trace& trace, Device& device) {
  const auto ready = device.make_event(false);
  trace.begin_pass(0);
  if (trace.on()) trace.read({.unit = 1, .bytes = 10}, Clock::now());
  trace.begin_copies(1);
  trace.end_copies(10);
  trace.begin_wait(1, *ready, 0);
  trace.end_wait(0);
  trace.begin_forward(1, 0);
  trace.end_forward(1, 0);
  trace.host_waits(2, Stall::kDisk, Clock::now());
  trace.host_waits(kNone, Stall::kDisk, Clock::now());
  trace.end_pass(0);
}

std::vector<TraceRecord> of_kind(const Timeline& timeline, TraceKind kind) {
  std::vector<TraceRecord> found;
  std::ranges::copy_if(timeline.records, std::back_inserter(found),
                       [kind](const TraceRecord& record) { return record.kind == kind; });
  return found;
}

TEST(Trace, OffItAllocatesNothingAndAsksTheDeviceNothing) {
  DeviceLedger ledger;
  FailingDevice device(std::make_unique<StepDevice>(), ledger);
  const auto ready = device.make_event(false);
  Trace trace;
  const uint64_t calls = ledger.calls;
  const FailingCalls allocations(Call::kNew, UINT64_MAX);
  trace.begin_pass(0);
  trace.begin_copies(1);
  trace.end_copies(10);
  trace.begin_wait(1, *ready, 0);
  trace.end_wait(0);
  trace.begin_forward(1, 0);
  trace.end_forward(1, 0);
  trace.host_waits(2, Stall::kDisk, Clock::now());
  trace.end_pass(0);
  EXPECT_FALSE(trace.on());
  EXPECT_EQ(allocations.calls(), 0u);
  EXPECT_EQ(ledger.calls, calls);
}

TEST(Trace, OnItAllocatesEventsAlone) {
  StepDevice device;
  Trace trace;
  trace.start(unowned(device), 0, kUnits, 100, {});
  uint64_t allocated = 0;
  {
    const FailingCalls allocations(Call::kNew, UINT64_MAX);
    for (int i = 0; i < 30; ++i) write_all(trace, device);  // it is full before the end
    allocated = allocations.calls();
  }
  const std::vector<TraceRecord> records = trace.stop({}).records;
  ASSERT_EQ(records.size(), 100u);
  const auto on_stream = std::ranges::count_if(records, [](const TraceRecord& record) {
    return record.kind != TraceKind::kRead && record.kind != TraceKind::kHostWait;
  });
  EXPECT_EQ(allocated, 30u + 2 * on_stream);  // 30: the `ready` events of the test
}

TEST(Trace, WhatHappensOnAStreamHasTheTimesOfItsEvents) {
  StepDevice device;
  Trace trace;
  trace.start(unowned(device), 0, kUnits, 100, {});
  trace.begin_pass(0);        // 1 ms after the event that sets the clock
  trace.begin_forward(0, 0);  // 2
  trace.begin_copies(3);      // 3
  trace.begin_forward(2, 0);  // 4
  trace.end_forward(2, 0);    // 5
  trace.end_copies(1000);     // 6
  trace.end_forward(0, 0);    // 7
  trace.end_pass(0);          // 8
  const Timeline timeline = trace.stop({});
  struct Expected {
    TraceKind kind;
    uint32_t unit;
    int64_t begin_ms, end_ms;
    uint64_t bytes;
  };
  const std::array<Expected, 4> expected = {{{TraceKind::kPass, kNone, 1, 8, 0},
                                             {TraceKind::kForward, 0, 2, 7, 0},
                                             {TraceKind::kCopy, 3, 3, 6, 1000},
                                             {TraceKind::kForward, 2, 4, 5, 0}}};
  ASSERT_EQ(timeline.records.size(), expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    SCOPED_TRACE(i);
    EXPECT_EQ(timeline.records[i].kind, expected[i].kind);
    EXPECT_EQ(timeline.records[i].unit, expected[i].unit);
    EXPECT_EQ(timeline.records[i].begin_ns, expected[i].begin_ms * kMs);
    EXPECT_EQ(timeline.records[i].end_ns, expected[i].end_ms * kMs);
    EXPECT_EQ(timeline.records[i].bytes, expected[i].bytes);
  }
  EXPECT_EQ(timeline.length_ns, 8 * kMs);  // the device was late
  EXPECT_EQ(timeline.dropped, 0u);
}

TEST(Trace, TheClockIsSetByTheClosestTry) {
  std::vector<microseconds> takes(10, microseconds(4000));
  takes[3] = microseconds(100);  // not so close that it is the last
  SlowStepDevice device(takes);
  Trace trace;
  trace.start(unowned(device), 0, kUnits, 100, {});
  ASSERT_EQ(device.tries.size(), takes.size());
  trace.begin_pass(0);
  trace.end_pass(0);
  const Timeline timeline = trace.stop({});
  ASSERT_EQ(timeline.records.size(), 1u);
  const std::chrono::nanoseconds window(2 * timeline.clock_error_ns);
  for (const auto& each : device.tries) EXPECT_LE(window, each.next - each.recorded);
  // And what happens is timed from this one.
  const size_t kept = takes.size() - static_cast<size_t>(timeline.records[0].begin_ns / kMs);
  ASSERT_LT(kept, takes.size());
  EXPECT_GE(window + std::chrono::nanoseconds(1),
            device.tries[kept].done - device.tries[kept].looked);
}

// From the start, half an hour later, a float of 24 bits tells steps of 0.1 ms.
TEST(Trace, NeighboursAreExactHoweverLongItTakes) {
  const double step_ns = 400'001'234;
  StepDevice device(/*record_ms=*/step_ns / kMs);
  Trace trace;
  trace.start(unowned(device), 0, kUnits, 2000, {});
  for (int i = 0; i < 2000; ++i) {
    trace.begin_forward(0, 0);
    trace.end_forward(0, 0);
  }
  const Timeline timeline = trace.stop({});
  ASSERT_EQ(timeline.records.size(), 2000u);
  int64_t before_ns = 0;
  for (const TraceRecord& record : timeline.records) {
    ASSERT_NEAR(static_cast<double>(record.begin_ns - before_ns), step_ns, 1000);
    ASSERT_NEAR(static_cast<double>(record.end_ns - record.begin_ns), step_ns, 1000);
    before_ns = record.end_ns;
  }
}

TEST(Trace, AFullOneKeepsTheFirstAndCountsTheRest) {
  StepDevice device;
  Trace trace;
  trace.start(unowned(device), 0, kUnits, 3, {});
  for (uint32_t unit = 0; unit < 3; ++unit) {
    trace.begin_forward(unit, 0);
    if (unit < 2) trace.end_forward(unit, 0);
  }
  trace.begin_forward(3, 0);
  trace.end_forward(2, 0);  // begun while there was room
  trace.end_forward(3, 0);
  trace.read({.unit = 0}, Clock::now());
  for (int i = 0; i < 5; ++i) trace.host_waits(1, Stall::kArena, Clock::now());  // one wait
  const Timeline timeline = trace.stop({});
  ASSERT_EQ(timeline.records.size(), 3u);
  for (uint32_t unit = 0; unit < 3; ++unit) EXPECT_EQ(timeline.records[unit].unit, unit);
  EXPECT_EQ(timeline.dropped, 3u);
  EXPECT_LE(timeline.full_ns, timeline.length_ns);
}

TEST(Trace, AWaitOfTheHostIsCutWhereItsCauseChanges) {
  StepDevice device;
  Trace trace;
  trace.start(unowned(device), 0, kUnits, 100, {});
  const Clock::time_point begin = Clock::now();
  const auto at = [begin](int us) { return begin + microseconds(us); };
  for (const int us : {0, 10, 20}) trace.host_waits(1, Stall::kArena, at(us));
  for (const int us : {30, 40}) trace.host_waits(1, Stall::kDisk, at(us));
  for (const int us : {100, 110}) trace.host_waits(kNone, Stall::kDisk, at(us));
  trace.host_waits(2, Stall::kDisk, at(150));
  trace.host_waits(3, Stall::kDisk, at(170));
  trace.host_waits(kNone, Stall::kDisk, at(175));
  const auto waits = of_kind(trace.stop({}), TraceKind::kHostWait);
  struct Expected {
    uint32_t unit;
    Stall cause;
    int begin_us, us;
  };
  const std::array<Expected, 4> expected = {{{1, Stall::kArena, 0, 30},
                                             {1, Stall::kDisk, 30, 70},
                                             {2, Stall::kDisk, 150, 20},
                                             {3, Stall::kDisk, 170, 5}}};
  ASSERT_EQ(waits.size(), expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    SCOPED_TRACE(i);
    EXPECT_EQ(waits[i].unit, expected[i].unit);
    EXPECT_EQ(waits[i].cause, expected[i].cause);
    EXPECT_EQ(waits[i].begin_ns - waits[0].begin_ns, expected[i].begin_us * 1000);
    EXPECT_EQ(waits[i].end_ns - waits[i].begin_ns, expected[i].us * 1000);
  }
}

TEST(Trace, WhatHasBegunBeforeItOrNotEndedInItIsLeftOut) {
  StepDevice device;
  const auto ready = device.make_event(false);
  Trace trace;
  trace.begin_pass(0);
  trace.begin_copies(1);
  trace.begin_forward(1, 0);
  trace.start(unowned(device), 0, kUnits, 100, {});
  trace.end_copies(10);
  trace.end_forward(1, 0);
  trace.end_pass(0);
  trace.begin_wait(2, *ready, 0);  // is done: no wait
  trace.end_wait(0);
  trace.begin_forward(2, 0);
  trace.host_waits(3, Stall::kDisk, Clock::now());
  const Timeline timeline = trace.stop({});
  ASSERT_EQ(timeline.records.size(), 1u);  // a wait that goes on ends with the trace
  EXPECT_EQ(timeline.records[0].kind, TraceKind::kHostWait);
  EXPECT_EQ(timeline.records[0].end_ns, timeline.length_ns);
}

TEST(Trace, OneAtATimeAndEachBeginsEmpty) {
  StepDevice device;
  Trace trace;
  EXPECT_THROW(trace.stop({}), Error);
  for (int i = 0; i < 2; ++i) {
    trace.start(unowned(device), 0, kUnits, 100, {});
    EXPECT_THROW(trace.start(unowned(device), 0, kUnits, 100, {}), Error);
    write_all(trace, device);
    EXPECT_EQ(trace.stop({}).records.size(), 5u);  // nothing was waited for on the device
    EXPECT_FALSE(trace.on());
  }
  EXPECT_THROW(trace.stop({}), Error);
}

TEST(Trace, AWaitForTheDeviceCanBeInterrupted) {
  StepDevice device;
  Trace trace;
  const Trace::Interrupt interrupt = [] { throw Error("Ctrl-C"); };
  device.slow = true;
  EXPECT_THROW(trace.start(unowned(device), 0, kUnits, 100, interrupt), Error);
  device.slow = false;
  trace.start(unowned(device), 0, kUnits, 100, interrupt);
  write_all(trace, device);
  device.slow = true;
  EXPECT_THROW(trace.stop(interrupt), Error);
  EXPECT_FALSE(trace.on());
}

TEST(Trace, ThreadsWriteWhileItStartsAndStops) {
  const auto device = make_host_device();
  Trace trace;
  std::atomic<bool> over{false};
  std::vector<std::thread> threads;
  // As the engine calls it: the conductor, and a caller.
  threads.emplace_back([&] {
    while (!over) {
      trace.begin_copies(1);
      trace.end_copies(10);
      if (trace.on()) trace.read({.unit = 1}, Clock::now());
      trace.host_waits(1, Stall::kDisk, Clock::now());
      trace.host_waits(kNone, Stall::kDisk, Clock::now());
    }
  });
  threads.emplace_back([&] {
    while (!over) {
      trace.begin_pass(0);
      trace.begin_forward(2, 0);
      trace.end_forward(2, 0);
      trace.end_pass(0);
    }
  });
  for (int i = 0; i < 20; ++i) {
    trace.start(unowned(*device), 0, kUnits, 200, {});
    std::this_thread::yield();
    const Timeline timeline = trace.stop({});
    EXPECT_LE(timeline.records.size(), 200u);
    for (const TraceRecord& record : timeline.records) {
      ASSERT_LE(record.begin_ns, record.end_ns);
      ASSERT_LE(record.end_ns, timeline.length_ns);
    }
  }
  over = true;
  for (std::thread& thread : threads) thread.join();
}

// Two units at once, of several chunks each.
PlanLimits limits_of(const StreamedModel& model, uint64_t cache = 0) {
  PlanLimits limits;
  limits.device_bytes = 64 * kMiB;
  limits.arena_bytes = 2 * model.largest_unit_bytes() + 8 * kKiB;
  limits.home_bytes = 0;
  limits.staging_bytes = 4 * kChunk;
  limits.cache_bytes = cache;
  limits.host_bytes = cache + 4 * kChunk;
  limits.chunk_bytes = kChunk;
  return limits;
}

// No byte moves but for an acquire that waits.
PlanLimits on_demand(PlanLimits limits) {
  limits.lookahead_units = 0;
  limits.read_ahead_bytes = 0;
  return limits;
}

int count(const std::vector<TraceRecord>& records, uint32_t unit) {
  return static_cast<int>(std::ranges::count(records, unit, &TraceRecord::unit));
}

uint64_t bytes(const std::vector<TraceRecord>& records) {
  uint64_t sum = 0;
  for (const TraceRecord& record : records) sum += record.bytes;
  return sum;
}

// In between its unit was loaded: read, then copied, then used. Reads have the host's clock, all
// else the device's, which are tied as closely as the host looks.
void check_was_loaded(const Timeline& timeline, const TraceRecord& pass,
                      const TraceRecord& forward) {
  const int64_t slack_ns = timeline.clock_error_ns;
  const auto of_the_unit = [&](TraceKind kind) {
    std::vector<TraceRecord> records = of_kind(timeline, kind);
    std::erase_if(records, [&](const TraceRecord& record) {
      return record.unit != forward.unit || record.begin_ns < pass.begin_ns - slack_ns ||
             record.begin_ns > pass.end_ns + slack_ns;
    });
    return records;
  };
  int64_t read_ns = INT64_MAX, copied_ns = 0;
  for (const TraceRecord& read : of_the_unit(TraceKind::kRead)) {
    read_ns = std::min(read_ns, read.end_ns);
  }
  for (const TraceRecord& copy : of_the_unit(TraceKind::kCopy)) {
    EXPECT_GE(copy.begin_ns + slack_ns, read_ns);
    copied_ns = std::max(copied_ns, copy.end_ns);
  }
  EXPECT_LE(copied_ns, forward.begin_ns);
  EXPECT_GT(copied_ns, 0);
}

TEST(EngineTrace, PassesOnDemandShowEveryReadCopyAndForward) {
  StreamedModel model;
  Engine& engine = model.open(model.plan(on_demand(limits_of(model))));
  ASSERT_EQ(model.pass(model.all_units()), "");
  const Counts before = engine.totals();
  engine.start_trace(0, 10'000, {});
  for (int pass = 0; pass < 2; ++pass) ASSERT_EQ(model.pass(model.all_units()), "");
  const Timeline timeline = engine.stop_trace({});
  const Counts moved = engine.totals().since(before);

  const auto reads = of_kind(timeline, TraceKind::kRead);
  const auto copies = of_kind(timeline, TraceKind::kCopy);
  const auto forwards = of_kind(timeline, TraceKind::kForward);
  const auto passes = of_kind(timeline, TraceKind::kPass);
  EXPECT_EQ(timeline.dropped, 0u);
  EXPECT_EQ(bytes(reads), moved.disk_bytes);
  EXPECT_EQ(bytes(copies), moved.h2d_bytes);
  ASSERT_EQ(passes.size(), 2u);
  for (const uint32_t unit : model.all_units()) {
    EXPECT_GE(count(reads, unit), 2) << unit;
    EXPECT_GE(count(copies, unit), 2) << unit;
    EXPECT_EQ(count(forwards, unit), 2) << unit;
  }
  ASSERT_EQ(forwards.size(), 16u);
  for (size_t i = 0; i < forwards.size(); ++i) {
    SCOPED_TRACE(i);
    const TraceRecord& forward = forwards[i];
    EXPECT_EQ(forward.unit, i % 8);
    const TraceRecord& pass = passes[i / 8];
    EXPECT_GE(forward.begin_ns, pass.begin_ns);
    EXPECT_LE(forward.end_ns, pass.end_ns);
    if (i > 0) {
      EXPECT_GE(forward.begin_ns, forwards[i - 1].end_ns);
    }
    check_was_loaded(timeline, pass, forward);
  }
  for (const TraceRecord& record : timeline.records) {
    EXPECT_LE(record.begin_ns, record.end_ns);
    EXPECT_LE(record.end_ns, timeline.length_ns);
  }
  for (const TraceRecord& read : reads) {
    EXPECT_LE(read.bytes, read.read_bytes);
    EXPECT_LT(read.offset, model.spec().shards[read.shard].bytes);
    EXPECT_FALSE(read.cached || read.failed);
  }
  EXPECT_FALSE(of_kind(timeline, TraceKind::kHostWait).empty());
}

TEST(EngineTrace, CopiesLieBetweenTheirBeginAndTheirEnd) {
  StreamedModel model;
  for (const uint64_t cache : {uint64_t{0}, model.bytes() + kMiB}) {
    SCOPED_TRACE(cache);
    auto device = std::make_unique<StepDevice>(/*record_ms=*/0, /*copy_ms=*/1);
    const std::atomic<int64_t>& copies = device->copies;
    Engine& engine =
        model.open(model.plan(on_demand(limits_of(model, cache))), {}, std::move(device));
    engine.start_trace(0, 10'000, {});
    model.pass(model.all_units());
    const Timeline timeline = engine.stop_trace({});
    int64_t copied_ns = 0;
    for (const TraceRecord& copy : of_kind(timeline, TraceKind::kCopy)) {
      copied_ns += copy.end_ns - copy.begin_ns;
    }
    EXPECT_GE(copies, 8);
    EXPECT_EQ(copied_ns, copies * kMs);
  }
}

TEST(EngineTrace, ReadsIntoTheCacheSaySoAndComeOnce) {
  StreamedModel model;
  Engine& engine = model.open(model.plan(on_demand(limits_of(model, model.bytes() + kMiB))));
  engine.start_trace(0, 10'000, {});
  for (int pass = 0; pass < 2; ++pass) ASSERT_EQ(model.pass(model.all_units()), "");
  const Timeline timeline = engine.stop_trace({});
  std::map<std::pair<uint32_t, uint64_t>, int> seen;
  for (const TraceRecord& read : of_kind(timeline, TraceKind::kRead)) {
    EXPECT_TRUE(read.cached);
    EXPECT_EQ(++seen[std::pair(read.shard, read.offset)], 1);
  }
  EXPECT_GE(seen.size(), 8u);
  EXPECT_EQ(of_kind(timeline, TraceKind::kForward).size(), 16u);
}

TEST(EngineTrace, AnErrorOfTheDeviceLeavesItOff) {
  StreamedModel model;
  DeviceLedger ledger;
  const auto device = [&] { return std::make_unique<FailingDevice>(make_host_device(), ledger); };
  Engine& engine = model.open(model.plan(on_demand(limits_of(model))), {}, device());
  ASSERT_EQ(model.pass(model.all_units()), "");
  const int64_t events = ledger.events;
  // The conductor may ask the device at any time, but makes no events any more.
  ledger.fail_at_made = ledger.made + 1;
  EXPECT_THROW(engine.start_trace(0, 100, {}), Error);
  EXPECT_EQ(ledger.events, events);
  engine.start_trace(0, 1000, {});
  ASSERT_EQ(model.pass(model.all_units()), "");
  engine.close();  // and with it the conductor
  ledger.fail_at = ledger.calls + 5;
  EXPECT_THROW(engine.stop_trace({}), Error);
  EXPECT_EQ(ledger.events, events);
  EXPECT_THROW(engine.stop_trace({}), Error);  // none is being taken
}

TEST(EngineTrace, WhatFindsNoEventIsCountedAndThePassGoesOn) {
  StreamedModel model;
  DeviceLedger ledger;
  Engine& engine = model.open(model.plan(limits_of(model)), {},
                              std::make_unique<FailingDevice>(make_host_device(), ledger));
  engine.start_trace(0, 1000, {});
  ledger.fail_at_made = ledger.made + 20;
  ASSERT_EQ(model.pass(model.all_units()), "");
  EXPECT_GT(engine.stop_trace({}).dropped, 0u);
}

TEST(EngineTrace, ItEndsWithItsEngine) {
  StreamedModel model;
  Engine& engine = model.open(model.plan(limits_of(model)));
  engine.start_trace(0, 1000, {});
  ASSERT_EQ(model.pass(model.all_units()), "");
  Engine& next = model.resize(limits_of(model));
  EXPECT_THROW(next.stop_trace({}), Error);
  next.start_trace(0, 1000, {});
  ASSERT_EQ(model.pass(model.all_units()), "");
  next.close();
  EXPECT_EQ(of_kind(next.stop_trace({}), TraceKind::kForward).size(), 8u);
  EXPECT_THROW(next.start_trace(0, 1000, {}), Error);
}

TEST(EngineTrace, ItsEventsAreGoneBeforeTheDeviceIsHandedOver) {
  StreamedModel model;
  DeviceLedger ledger;
  auto device = std::make_unique<FailingDevice>(make_host_device(), ledger);
  Engine& engine = model.open(model.plan(limits_of(model)), {}, std::move(device));
  engine.start_trace(0, 1000, {});
  ASSERT_EQ(model.pass(model.all_units()), "");
  const Handoff handoff = engine.hand_over();
  EXPECT_EQ(ledger.events, 0);
  model.close();
}

TEST(EngineTrace, RoomForNoneOrForTooManyIsRefused) {
  StreamedModel model;
  Engine& engine = model.open(model.plan(limits_of(model)));
  EXPECT_THROW(engine.start_trace(0, 0, {}), InvalidArgument);
  EXPECT_THROW(engine.start_trace(0, UINT32_MAX, {}), InvalidArgument);
}

}  // namespace
}  // namespace wsm
