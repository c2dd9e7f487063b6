#include "engine/engine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <random>
#include <thread>

#include "support/contains.h"
#include "support/failing_device.h"
#include "support/faulty_device.h"
#include "support/streamed_model.h"
#include "util/align.h"

namespace wsm {
namespace {

using testing::contains;
using testing::DeviceLedger;
using testing::FailingDevice;
using testing::FaultyDevice;
using testing::FaultyDeviceOptions;
using testing::ModelShape;
using testing::StreamedModel;

constexpr uint64_t kChunk = 64 * kKiB;

// Budgets by the case: how much device memory, how much host memory, beside small chunks.
PlanLimits limits(uint64_t arena, uint64_t cache, uint64_t staging = 4 * kChunk) {
  PlanLimits l;
  l.device_bytes = 64 * kMiB;
  l.arena_bytes = arena;
  l.home_bytes = 0;
  l.host_bytes = cache + staging;
  l.staging_bytes = staging;
  l.cache_bytes = cache;
  l.chunk_bytes = kChunk;
  return l;
}

struct Case {
  const char* name;
  double arena_units;  // in largest units
  double cached;       // fraction of the model
  uint32_t slots;
};

class EngineCases : public ::testing::TestWithParam<Case> {
 protected:
  PlanLimits limits_of(const StreamedModel& model) const {
    const Case& c = GetParam();
    const auto arena =
        static_cast<uint64_t>(c.arena_units * (model.largest_unit_bytes() + 4 * kKiB));
    const auto cache = static_cast<uint64_t>(c.cached * (model.bytes() + 1 * kMiB));
    return limits(arena, cache, c.slots * kChunk);
  }
};

TEST_P(EngineCases, EveryPassBringsTheRightBytes) {
  StreamedModel model;
  const Plan plan = model.plan(limits_of(model));
  EngineOptions options;
  options.poison = true;
  Engine& engine = model.open(plan, options);
  for (int pass = 0; pass < 5; ++pass) {
    ASSERT_EQ(model.pass(model.all_units()), "") << "pass " << pass;
  }
  EXPECT_EQ(engine.passes(), 5u);
}

TEST_P(EngineCases, NothingIsReadTwiceAndTheCacheStays) {
  StreamedModel model;
  const Plan plan = model.plan(limits_of(model));
  Engine& engine = model.open(plan);
  for (int pass = 0; pass < 6; ++pass) ASSERT_EQ(model.pass(model.all_units()), "");
  model.engine().close();
  const Counts totals = engine.totals();
  // Each pass reads what lives on the disk, the first one also fills the cache; at the end a part
  // of a seventh may have been read ahead, and units that stayed in the arena need no second load.
  EXPECT_LE(totals.disk_bytes, 7 * plan.disk_home_bytes + plan.host_home_bytes);
  EXPECT_GE(totals.disk_bytes, plan.disk_home_bytes + plan.host_home_bytes);
  EXPECT_LE(totals.h2d_bytes, 7 * (plan.disk_home_bytes + plan.host_home_bytes));
}

TEST_P(EngineCases, AnyOrderOfUnitsIsRight) {
  StreamedModel model;
  const Plan plan = model.plan(limits_of(model));
  EngineOptions options;
  options.poison = true;
  model.open(plan, options);
  for (uint64_t seed = 0; seed < 30; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937_64 random(seed);
    std::vector<uint32_t> order = model.all_units();
    std::shuffle(order.begin(), order.end(), random);
    order.resize(1 + random() % order.size());
    for (int i = 0; i < 4; ++i)
      order.push_back(static_cast<uint32_t>(random() % model.spec().units.size()));
    for (int repeat = 0; repeat < 2; ++repeat) ASSERT_EQ(model.pass(order), "");
  }
}

TEST_P(EngineCases, FetchGivesTheBytesAtAnyTime) {
  StreamedModel model;
  const Plan plan = model.plan(limits_of(model));
  model.open(plan);
  for (const uint32_t unit : model.all_units()) EXPECT_EQ(model.wrong_fetch(unit), "") << unit;
  ASSERT_EQ(model.pass(model.all_units()), "");
  for (const uint32_t unit : model.all_units()) EXPECT_EQ(model.wrong_fetch(unit), "") << unit;
}

INSTANTIATE_TEST_SUITE_P(
    Homes, EngineCases,
    ::testing::Values(Case{"AllOnDiskBarelyTwoUnits", 2.05, 0, 4},
                      Case{"AllOnDiskOneUnit", 1.02, 0, 4}, Case{"TwoSlots", 2.05, 0, 2},
                      Case{"ManySlots", 3.1, 0, 64}, Case{"AllInTheCache", 2.05, 1, 4},
                      Case{"HalfInTheCache", 2.05, 0.5, 4}, Case{"RoomForAll", 9, 0.3, 8}),
    [](const auto& info) { return info.param.name; });

TEST(Engine, ResidentTensorsAreLoadedOnceAndStay) {
  StreamedModel model;
  PlanLimits l = limits(3 * model.largest_unit_bytes(), 0);
  l.home_bytes = model.bytes() / 2;
  const Plan plan = model.plan(l);
  ASSERT_GT(plan.device_home_bytes, 0u);
  ASSERT_GT(plan.disk_home_bytes, 0u);
  Engine& engine = model.open(plan);
  engine.load_resident(0, {});
  for (int pass = 0; pass < 3; ++pass) ASSERT_EQ(model.pass(model.all_units()), "");
  engine.close();
  EXPECT_LE(engine.totals().disk_bytes, plan.device_home_bytes + 4 * plan.disk_home_bytes);
}

TEST(Engine, ImagesOfTransformsArriveInScratchOrAreFetched) {
  ModelShape shape;
  shape.transformed = true;
  StreamedModel model(7, shape);
  for (const uint64_t homes : {uint64_t{0}, model.bytes() / 2, model.bytes()}) {
    PlanLimits l = limits(3 * model.largest_unit_bytes(), model.bytes() / 4);
    l.home_bytes = homes;
    EngineOptions options;
    options.poison = true;
    Engine& engine = model.open(model.plan(l), options);
    engine.load_resident(0, {});
    for (int pass = 0; pass < 3; ++pass) ASSERT_EQ(model.pass(model.all_units()), "") << homes;
    for (const uint32_t unit : model.all_units()) ASSERT_EQ(model.wrong_fetch(unit), "") << homes;
  }
}

TEST(Engine, ShardsInMemoryAreNoDiskBytes) {
  ModelShape shape;
  shape.in_memory = true;
  StreamedModel model(3, shape);
  Engine& engine =
      model.open(model.plan(limits(3 * model.largest_unit_bytes(), model.bytes() / 2)));
  for (int pass = 0; pass < 3; ++pass) ASSERT_EQ(model.pass(model.all_units()), "");
  EXPECT_EQ(engine.totals().disk_bytes, 0u);
  EXPECT_GE(engine.totals().h2d_bytes, model.bytes());
}

TEST(Engine, AUnitHeldTwiceStaysUntilBothReleases) {
  StreamedModel model;
  EngineOptions options;
  options.poison = true;
  Engine& engine = model.open(model.plan(limits(9 * model.largest_unit_bytes(), 0)), options);
  engine.begin_pass(0);
  engine.acquire(2, 0, {});
  engine.acquire(2, 0, {});
  engine.release(2, 0);
  EXPECT_EQ(model.use(3), "");
  EXPECT_EQ(model.wrong_bytes(2), "");
  engine.release(2, 0);
  engine.end_pass(0);
}

TEST(Engine, NestedUnitsInOnePlaceAreAnErrorThatNamesBoth) {
  StreamedModel model;
  Engine& engine = model.open(model.plan(limits(model.largest_unit_bytes() + 4 * kKiB, 0)));
  engine.begin_pass(0);
  engine.acquire(1, 0, {});
  try {
    engine.acquire(2, 0, {});
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("'unit2'"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("'unit1'"), std::string::npos) << error.what();
  }
  EXPECT_EQ(model.wrong_bytes(1), "");
  engine.release(1, 0);
  EXPECT_EQ(model.use(2), "");
  engine.end_pass(0);
}

TEST(Engine, AnExclusiveUnitStaysWhileOthersComeAndGo) {
  ModelShape shape;
  shape.encloses_units = {0};
  StreamedModel model(1, shape);
  EngineOptions options;
  options.poison = true;
  Engine& engine = model.open(model.plan(limits(4 * model.largest_unit_bytes(), 0)), options);
  for (int pass = 0; pass < 3; ++pass) {
    engine.begin_pass(0);
    engine.acquire(0, 0, {});
    for (uint32_t unit = 1; unit < 8; ++unit) ASSERT_EQ(model.use(unit), "");
    ASSERT_EQ(model.wrong_bytes(0), "");
    engine.release(0, 0);
    engine.end_pass(0);
  }
}

TEST(Engine, AnAbortedPassIsRecovered) {
  StreamedModel model;
  Engine& engine = model.open(model.plan(limits(model.largest_unit_bytes() + 4 * kKiB, 0)));
  engine.begin_pass(0);
  engine.acquire(3, 0, {});  // never released
  EXPECT_EQ(model.pass(model.all_units()), "");
  engine.release(3, 0);  // too late, and harmless
  EXPECT_EQ(model.pass(model.all_units()), "");
}

TEST(Engine, LookaheadZeroLoadsOnDemandOnly) {
  StreamedModel model;
  PlanLimits l = limits(3 * model.largest_unit_bytes(), 0);
  l.lookahead_units = 0;
  Engine& engine = model.open(model.plan(l));
  for (int pass = 0; pass < 2; ++pass) ASSERT_EQ(model.pass(model.all_units()), "");
  EXPECT_EQ(engine.totals().demand_loads, engine.totals().loads);
  EXPECT_GT(engine.totals().loads, 8u);
}

TEST(Engine, ALearnedOrderIsPrefetched) {
  StreamedModel model;
  Engine& engine = model.open(model.plan(limits(3 * model.largest_unit_bytes(), 0)));
  const std::vector<uint32_t> order{7, 5, 3, 1, 0, 2, 4, 6};
  for (int pass = 0; pass < 2; ++pass) ASSERT_EQ(model.pass(order), "");
  const Counts before = engine.totals();
  for (int pass = 0; pass < 3; ++pass) ASSERT_EQ(model.pass(order), "");
  const Counts learned = engine.totals().since(before);
  EXPECT_EQ(learned.misses, 0u);
  EXPECT_GT(learned.loads, 8u);
  EXPECT_GT(before.misses, 0u);
}

TEST(Engine, AFileThatChangedIsFoundBeforeThePass) {
  StreamedModel model;
  Engine& engine = model.open(model.plan(limits(3 * model.largest_unit_bytes(), 0)));
  ASSERT_EQ(model.pass(model.all_units()), "");
  std::ofstream(model.shard_path(1), std::ios::app) << "grown";
  try {
    engine.begin_pass(0);
    FAIL() << "no error";
  } catch (const IoError& error) {
    EXPECT_NE(std::string(error.what()).find(model.shard_path(1)), std::string::npos);
  }
}

TEST(Engine, AnInterruptEndsTheWaitAndTheEngineGoesOn) {
  StreamedModel model;
  PlanLimits on_demand = limits(3 * model.largest_unit_bytes(), 0);
  on_demand.lookahead_units = 0;  // so that each acquire waits
  on_demand.read_ahead_bytes = 0;
  Engine& engine = model.open(model.plan(on_demand));
  engine.begin_pass(0);
  struct Stop {};
  const auto stop = [] { throw Stop{}; };
  int stopped = 0;
  for (uint32_t unit = 0; unit < 8; ++unit) {
    try {
      engine.acquire(unit, 0, stop);
      engine.release(unit, 0);
    } catch (const Stop&) {
      ++stopped;
    }
  }
  engine.end_pass(0);
  EXPECT_GT(stopped, 0);
  EXPECT_EQ(model.pass(model.all_units()), "");
}

TEST(Engine, CloseWhileLoadsAreUnderWay) {
  for (int i = 0; i < 20; ++i) {
    StreamedModel model(i);
    Engine& engine =
        model.open(model.plan(limits(3 * model.largest_unit_bytes(), model.bytes() / 3)));
    engine.begin_pass(0);
    if (i % 2) {
      EXPECT_EQ(model.use(i % 8), "");
    }
    engine.close();
    EXPECT_TRUE(engine.closed());
    EXPECT_THROW(engine.acquire(0, 0, {}), Error);
    engine.close();
  }
}

TEST(Engine, PassesReportWhatTheyMoved) {
  StreamedModel model;
  const Plan plan = model.plan(limits(3 * model.largest_unit_bytes(), 0));
  Engine& engine = model.open(plan);
  EXPECT_EQ(engine.last_pass({}).seconds, 0);
  for (int pass = 0; pass < 3; ++pass) ASSERT_EQ(model.pass(model.all_units()), "");
  const PassReport report = engine.last_pass({});
  EXPECT_GT(report.seconds, 0);
  EXPECT_GT(report.counts.h2d_bytes, 0u);
  EXPECT_LE(report.counts.h2d_bytes, plan.disk_home_bytes + plan.arena_bytes);
  const PassSums steady = engine.steady_passes();
  EXPECT_EQ(steady.passes, 2u);  // not the first
  EXPECT_GT(steady.seconds, report.seconds);
  EXPECT_GT(steady.counts.h2d_bytes, report.counts.h2d_bytes);
  const auto shards = engine.shards();
  ASSERT_EQ(shards.size(), 2u);
  for (const ShardReport& shard : shards) {
    EXPECT_GT(shard.direct_bytes + shard.buffered_bytes, 0u) << shard.path;
  }
}

// Of a unit that has more chunks than may be copied at once, on a slow link.
TEST(Engine, AWaitForCopiesIsAWaitForTheLink) {
  ModelShape shape{.units = 3, .tensors_per_unit = 1, .encloses_units = {}};
  shape.least_tensor_bytes = shape.most_tensor_bytes = 400 * kChunk;
  StreamedModel model(1, shape);
  PlanLimits wide = limits(2 * model.largest_unit_bytes(), 0, 800 * kChunk);
  wide.device_bytes = 2 * model.bytes();
  EngineOptions options;
  options.direct = DirectMode::kOff;
  Engine& engine =
      model.open(model.plan(wide), options,
                 std::make_unique<FaultyDevice>(FaultyDeviceOptions{.late_bytes = 4 * kMiB}));
  EXPECT_EQ(model.pass(model.all_units()), "");
  const Counts counts = engine.totals();
  const auto waited = [&](Stall cause) { return counts.stall_ns[static_cast<int>(cause)]; };
  EXPECT_GT(waited(Stall::kH2d), 20 * waited(Stall::kArena));
}

// A pread reader whose files refuse direct reads at the first request.
class LateRefusal final : public Reader {
 public:
  bool submit(const ReadRequest& request) override {
    request.shard->refuse_direct("refused late");
    return reader_->submit(request);
  }
  size_t poll(std::span<ReadCompletion> completions) override { return reader_->poll(completions); }
  int ready_fd() const override { return reader_->ready_fd(); }
  uint32_t capacity() const override { return reader_->capacity(); }
  bool full() override { return reader_->full(); }
  const char* name() const override { return "late"; }

 private:
  std::unique_ptr<Reader> reader_ = make_pread_reader({});
};

TEST(Engine, ADirectReadThatIsRefusedLateIsSaidOnceForEachFile) {
  StreamedModel model;
  if (!Shard::open(model.shard_path(0))->direct()) GTEST_SKIP() << "no direct reads here";
  EngineOptions options;
  options.make_readers = [] {
    Readers readers;
    readers.direct = std::make_unique<LateRefusal>();
    readers.pool = make_pread_reader({});
    readers.always_direct = true;  // whatever the page cache has of these files
    return readers;
  };
  ::testing::internal::CaptureStderr();
  Engine& engine = model.open(model.plan(limits(3 * model.largest_unit_bytes(), 0)), options);
  for (int pass = 0; pass < 3; ++pass) EXPECT_EQ(model.pass(model.all_units()), "");
  for (const ShardReport& shard : engine.shards()) {
    EXPECT_EQ(shard.direct_bytes, 0u);
    EXPECT_EQ(shard.why, "refused late");
  }
  engine.close();
  const std::string log = ::testing::internal::GetCapturedStderr();
  EXPECT_EQ(std::count(log.begin(), log.end(), '\n'), 2) << log;
  for (const uint32_t shard : {0, 1}) {
    EXPECT_TRUE(contains(log, "no direct reads of " + model.shard_path(shard) + ": refused late"));
  }
}

// Requests beyond what keeps the threads busy would only wait, in slots that grow cold.
TEST(Engine, ThePoolTakesNoMoreThanItsThreadsNeed) {
  EngineOptions options;
  options.read_threads = 16;
  const auto capacity = [&](uint64_t chunk_bytes) {
    return make_readers(options, false, chunk_bytes).pool->capacity();
  };
  EXPECT_EQ(capacity(4 * kMiB), 8u);  // 16 threads with a block of 1 MiB each, twice
  EXPECT_EQ(capacity(16 * kMiB), 3u);
  EXPECT_EQ(capacity(64 * kKiB), 64u);
  EXPECT_EQ(capacity(0), 64u);  // a plan without chunks
}

TEST(Engine, AnAbandonedPassIsNotSummed) {
  StreamedModel model;
  Engine& engine = model.open(model.plan(limits(3 * model.largest_unit_bytes(), 0)));
  ASSERT_EQ(model.pass(model.all_units()), "");
  engine.begin_pass(0);  // without an end
  for (int pass = 0; pass < 6; ++pass) ASSERT_EQ(model.pass(model.all_units()), "");
  const PassSums steady = engine.steady_passes();
  EXPECT_EQ(steady.passes, 6u);
  EXPECT_GT(steady.seconds, 0);
}

// A tensor of many chunks lies in the host cache as in its file: it comes in one copy.
TEST(Engine, WhatLiesTogetherInTheHostCacheIsCopiedTogether) {
  StreamedModel model(1, {.units = 4,
                          .tensors_per_unit = 1,
                          .least_tensor_bytes = 10 * kChunk,
                          .most_tensor_bytes = 10 * kChunk,
                          .encloses_units = {}});
  DeviceLedger ledger;
  const Plan plan = model.plan(limits(2 * model.largest_unit_bytes(), 2 * model.bytes()));
  ASSERT_GE(plan.chunks.size(), 40u);
  model.open(plan, {}, std::make_unique<FailingDevice>(make_host_device(), ledger));
  for (int pass = 0; pass < 2; ++pass) ASSERT_EQ(model.pass(model.all_units()), "");
  const uint64_t loads = model.engine().totals().loads, copies = ledger.copies;
  for (int pass = 0; pass < 3; ++pass) ASSERT_EQ(model.pass(model.all_units()), "");
  model.engine().last_pass({});
  // A load may have been counted whose copies came before, or the other way round.
  EXPECT_LE(ledger.copies - copies, model.engine().totals().loads - loads + 1);
  model.close();
}

// Each unit has a place of its own, so nothing but a discard makes one be loaded again.
TEST(Engine, ADiscardedUnitIsReadAgainWhereverItsBytesLay) {
  for (const bool cached : {false, true}) {
    SCOPED_TRACE(cached);
    ModelShape shape;
    for (uint32_t u = 0; u < shape.units; ++u) shape.encloses_units.push_back(u);
    StreamedModel model(1, shape);
    Engine& engine =
        model.open(model.plan(limits(2 * model.bytes(), cached ? 2 * model.bytes() : 0)));
    for (int pass = 0; pass < 2; ++pass) ASSERT_EQ(model.pass(model.all_units()), "");
    const Counts before = engine.totals();
    engine.begin_pass(0);
    EXPECT_FALSE(engine.acquire(3, 0, {}));
    engine.discard(3);
    engine.discard(3);
    EXPECT_FALSE(engine.acquire(3, 0, {}));  // its holder has it until it lets go
    engine.release(3, 0);
    EXPECT_EQ(engine.totals().loads, before.loads);
    engine.release(3, 0);
    EXPECT_TRUE(engine.acquire(3, 0, {}));
    EXPECT_EQ(model.wrong_bytes(3), "");
    engine.release(3, 0);
    EXPECT_FALSE(engine.acquire(3, 0, {}));
    EXPECT_FALSE(engine.acquire(4, 0, {}));
    engine.release(3, 0);
    engine.release(4, 0);
    engine.end_pass(0);
    const Counts moved = engine.totals().since(before);
    EXPECT_EQ(moved.loads, 1u);
    EXPECT_EQ(moved.disk_bytes, engine.plan().units[3].streamed_bytes);
  }
}

TEST(Engine, WrongArgumentsAreErrors) {
  StreamedModel model;
  const Plan plan = model.plan(limits(3 * model.largest_unit_bytes(), 0));
  Engine& engine = model.open(plan);
  EXPECT_THROW(engine.acquire(8, 0, {}), InvalidArgument);
  EXPECT_THROW(engine.end_pass(0), InvalidArgument);
  std::byte byte{};
  EXPECT_THROW(engine.fetch(8, 0, &byte), InvalidArgument);
  EXPECT_THROW(engine.fetch(0, 3, &byte), InvalidArgument);
  EXPECT_THROW(Engine(model.spec(), plan, Handoff{make_host_device()}, nullptr, {},
                      {nullptr, nullptr}, 0, {}),
               InvalidArgument);
}

}  // namespace
}  // namespace wsm
