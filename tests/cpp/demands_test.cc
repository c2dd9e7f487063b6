// Several threads in one pass: each acquire is served, or ends in an error of its own.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "engine/engine.h"
#include "support/async_device.h"
#include "support/contains.h"
#include "support/faulty_reader.h"
#include "support/kernels.h"
#include "support/streamed_model.h"
#include "util/align.h"

namespace wsm {
namespace {

using testing::AsyncDevice;
using testing::AsyncGpu;
using testing::contains;
using testing::FaultLog;
using testing::FaultyOptions;
using testing::FaultyReader;
using testing::Kernels;
using testing::StreamedModel;

constexpr uint64_t kChunk = 64 * kKiB;
constexpr int kManyLooks = 400;  // of 50 ms each: a wait that is longer is lost

PlanLimits limits_of(const StreamedModel& model, double arena_units, double cached = 0,
                     uint32_t slots = 4) {
  PlanLimits limits;
  limits.device_bytes = 64 * kMiB;
  const uint64_t unit = model.largest_unit_bytes() + 4 * kKiB;
  limits.arena_bytes = static_cast<uint64_t>(arena_units * static_cast<double>(unit));
  limits.home_bytes = 0;
  limits.chunk_bytes = kChunk;
  limits.staging_bytes = slots * kChunk;
  limits.cache_bytes = static_cast<uint64_t>(cached * static_cast<double>(model.bytes()));
  limits.host_bytes = *limits.staging_bytes + *limits.cache_bytes;
  limits.lookahead_units = arena_units < 2 ? 0 : 1;  // or the arena would have one place
  return limits;
}

EngineOptions faulty(const FaultyOptions& faults, double timeout_s = 30) {
  EngineOptions options;
  options.read_timeout_s = timeout_s;
  options.make_readers = [faults] {
    Readers readers;
    readers.pool = std::make_unique<FaultyReader>(1, faults);
    return readers;
  };
  return options;
}

// Gives up a wait that nobody serves.
Engine::Interrupt patience() {
  const auto looks = std::make_shared<int>(0);
  return [looks] { check<Error>(++*looks < kManyLooks, "the demand is lost"); };
}

// What the acquire of a unit threw, or empty. It is released again.
std::string error_of_use(Engine& engine, uint32_t unit) {
  try {
    engine.acquire(unit, 0, patience());
    engine.release(unit, 0);
    return {};
  } catch (const Error& error) {
    return error.what();
  }
}

uint32_t overlapping(const Engine& engine, uint32_t unit) {
  const std::vector<UnitPlan>& units = engine.plan().units;
  for (uint32_t other = 0; other < units.size(); ++other) {
    if (other != unit && places_overlap(units[unit], units[other])) return other;
  }
  return kNone;
}

TEST(Demands, TwoThatWaitAtOnceAreBothServed) {
  for (int round = 0; round < 10; ++round) {
    StreamedModel model;
    FaultyOptions faults;
    faults.stall_chance = 1;
    faults.stall_us = 20'000;  // so that both wait
    Engine& engine = model.open(model.plan(limits_of(model, 4)), faulty(faults));
    engine.begin_pass(0);
    std::string errors[2];
    std::thread other([&] { errors[1] = error_of_use(engine, 5); });
    errors[0] = error_of_use(engine, 2);
    other.join();
    EXPECT_EQ(errors[0], "");
    EXPECT_EQ(errors[1], "");
  }
}

TEST(Demands, TwoForTheSameUnitAreServedByOneLoad) {
  StreamedModel model;
  FaultyOptions faults;
  faults.stall_chance = 1;
  faults.stall_us = 20'000;
  Engine& engine = model.open(model.plan(limits_of(model, 4)), faulty(faults));
  engine.begin_pass(0);
  std::thread other([&] { EXPECT_EQ(error_of_use(engine, 3), ""); });
  EXPECT_EQ(error_of_use(engine, 3), "");
  other.join();
  EXPECT_EQ(engine.totals().loads, 1u);
}

TEST(Demands, EachHasATimeLimitAndAnErrorOfItsOwn) {
  StreamedModel model;
  FaultyOptions faults;
  faults.lost_chance = 1;
  Engine& engine = model.open(model.plan(limits_of(model, 4)), faulty(faults, 0.3));
  engine.begin_pass(0);
  std::string errors[2];
  std::thread other([&] { errors[1] = error_of_use(engine, 5); });
  errors[0] = error_of_use(engine, 2);
  other.join();
  EXPECT_TRUE(contains(errors[0], "while loading unit 'unit2'")) << errors[0];
  EXPECT_TRUE(contains(errors[1], "while loading unit 'unit5'")) << errors[1];
}

TEST(Demands, APlaceThatAnotherThreadHoldsIsWaitedFor) {
  StreamedModel model;
  Engine& engine = model.open(model.plan(limits_of(model, 1.02)));
  engine.begin_pass(0);
  engine.acquire(0, 0, {});
  std::atomic<bool> waits{false}, served{false};
  std::thread other([&] {
    engine.acquire(1, 0, [&] { waits = true; });
    served = true;
    EXPECT_EQ(model.wrong_bytes(1), "");
    engine.release(1, 0);
  });
  while (!waits) std::this_thread::yield();
  EXPECT_FALSE(served);
  EXPECT_EQ(model.wrong_bytes(0), "");
  engine.release(0, 0);
  other.join();
  EXPECT_TRUE(served);
}

// A place that is held does not keep the slots from what its holder needs next.
TEST(Demands, WhoHoldsThePlaceGoesOnFirst) {
  StreamedModel model;
  Engine& engine = model.open(model.plan(limits_of(model, 2.05, 0, 2)));
  const uint32_t outer = 0, waiting = overlapping(engine, outer);
  ASSERT_NE(waiting, kNone);
  engine.begin_pass(0);
  engine.acquire(outer, 0, {});
  std::atomic<bool> waits{false};
  std::thread other([&] {
    engine.acquire(waiting, 0, [&] { waits = true; });
    EXPECT_EQ(model.wrong_bytes(waiting), "");
    engine.release(waiting, 0);
  });
  while (!waits) std::this_thread::yield();
  int nested = 0;
  for (int round = 0; round < 3; ++round) {
    for (uint32_t unit = 1; unit < 8; ++unit) {
      const std::vector<UnitPlan>& units = engine.plan().units;
      if (places_overlap(units[outer], units[unit])) continue;
      ASSERT_EQ(error_of_use(engine, unit), "") << unit;
      ++nested;
    }
  }
  EXPECT_GT(nested, 0);
  engine.release(outer, 0);
  other.join();
}

// Each of the two holds what the other one wants.
TEST(Demands, AWaitThatCannotEndIsAnErrorAtOnce) {
  StreamedModel model;
  Engine& engine = model.open(model.plan(limits_of(model, 2.05)));
  const std::vector<UnitPlan>& units = engine.plan().units;
  const uint32_t first = 0;
  uint32_t second = 1;
  while (places_overlap(units[first], units[second])) ++second;
  engine.begin_pass(0);
  engine.acquire(first, 0, {});
  std::atomic<bool> holds{false}, waits{false};
  std::thread other([&] {
    engine.acquire(second, 0, {});
    holds = true;
    engine.acquire(overlapping(engine, first), 0, [&] { waits = true; });
    engine.release(overlapping(engine, first), 0);
    engine.release(second, 0);
  });
  while (!holds || !waits) std::this_thread::yield();
  const std::string error = error_of_use(engine, overlapping(engine, second));
  EXPECT_TRUE(contains(error, "cannot be loaded inside the forward of unit '" +
                                  model.spec().units[second].name + "'"))
      << error;
  engine.release(first, 0);
  other.join();
}

// Threads with a stream each, in any order, over places that all units want.
TEST(Demands, ManyThreadsAtOnceReadTheRightBytes) {
  const uint64_t first = testing::test_seed();
  for (uint64_t seed = first; seed < first + 8; ++seed) {
    SCOPED_TRACE(seed);
    const auto gpu = std::make_shared<AsyncGpu>(seed);
    StreamedModel model(seed);
    Kernels kernels(gpu, model);
    EngineOptions options;
    options.poison = seed % 2 == 0;
    Engine& engine =
        model.open(model.plan(limits_of(model, 1.02 + static_cast<double>(seed % 3),
                                        0.5 * static_cast<double>(seed % 2), 2 + seed % 4)),
                   options, std::make_unique<AsyncDevice>(gpu));
    engine.begin_pass(2);
    std::atomic<int> refused{0};
    const auto work = [&](StreamHandle stream) {
      std::mt19937_64 random(seed * 10 + stream);
      const auto draw = [&] { return static_cast<uint32_t>(random() % 8); };
      for (int use = 0; use < 60; ++use) {
        const uint32_t unit = draw();
        engine.acquire(unit, stream, patience());
        kernels.read(unit, stream);
        if (random() % 4 == 0) {
          const uint32_t nested = draw();
          try {
            engine.acquire(nested, stream, patience());
            kernels.read(nested, stream);
            engine.release(nested, stream);
          } catch (const Error& error) {
            if (!contains(error.what(), "cannot be loaded inside")) throw;
            ++refused;
          }
        }
        kernels.read(unit, stream);
        engine.release(unit, stream);
      }
    };
    std::vector<std::thread> threads;
    for (const StreamHandle stream : {2, 3, 4}) {
      threads.emplace_back([&, stream] { EXPECT_NO_THROW(work(stream)); });
    }
    for (std::thread& thread : threads) thread.join();
    engine.end_pass(2);
    EXPECT_EQ(kernels.wrong(), "");
    EXPECT_GE(kernels.ran(), 3 * 60 * 6u);
    EXPECT_GT(refused, 0);
    model.close();
  }
}

}  // namespace
}  // namespace wsm
