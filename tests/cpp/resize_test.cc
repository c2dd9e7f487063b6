// An engine that follows another: what stays is neither read nor copied again.
#include <gtest/gtest.h>

#include <random>

#include "engine/engine.h"
#include "support/streamed_model.h"
#include "util/align.h"
#include "util/check.h"

namespace wsm {
namespace {

using testing::ModelShape;
using testing::StreamedModel;

constexpr ModelShape kShape{.units = 24,
                            .tensors_per_unit = 3,
                            .shards = 2,
                            .least_tensor_bytes = 300'000,
                            .most_tensor_bytes = 600'000,
                            .in_memory = false,
                            .encloses_units = {}};

PlanLimits limits(uint64_t device, uint64_t host) {
  return {.device_bytes = device, .host_bytes = host, .chunk_bytes = 128 * kKiB};
}

void load(StreamedModel& model) { model.load_resident(); }

// What was read: these bytes, and what is there already for the pass to come.
void expect_read(Engine& engine, uint64_t bytes) {
  const Plan& plan = engine.plan();
  EXPECT_GE(engine.totals().disk_bytes, bytes);
  EXPECT_LE(engine.totals().disk_bytes, bytes + plan.staging_bytes() + plan.arena_bytes);
}

// Bytes that stream after the resize and were resident before it.
uint64_t no_longer_resident(const ModelSpec& spec, const Plan& before, const Plan& after) {
  std::vector<bool> stays(spec.tensors.size(), false), was(spec.tensors.size(), false);
  for (const HomeBlock& block : before.home_blocks) {
    for (const uint32_t t : block.tensors) was[t] = true;
  }
  for (const HomeBlock& block : after.home_blocks) {
    for (const uint32_t t : block.tensors) stays[t] = true;
  }
  uint64_t bytes = 0;
  for (size_t t = 0; t < was.size(); ++t) bytes += was[t] && !stays[t] ? spec.tensors[t].bytes : 0;
  return bytes;
}

TEST(Resize, MoreDeviceMemoryReadsOnlyWhatBecomesResident) {
  StreamedModel model(1, kShape);
  model.open(model.plan(limits(16 * kMiB, 48 * kMiB)));
  load(model);
  for (int i = 0; i < 2; ++i) EXPECT_EQ(model.pass(model.all_units()), "");
  const Plan before = model.engine().plan();
  ASSERT_EQ(before.disk_home_bytes, 0u);
  Engine& engine = model.resize(limits(24 * kMiB, 48 * kMiB));
  load(model);
  const uint64_t more = engine.plan().device_home_bytes - before.device_home_bytes;
  EXPECT_GT(more, 0u);
  for (int i = 0; i < 2; ++i) EXPECT_EQ(model.pass(model.all_units()), "");
  // The one block of these small homes has changed, so it is loaded whole.
  EXPECT_EQ(no_longer_resident(model.spec(), before, engine.plan()), 0u);
  expect_read(engine, engine.plan().device_home_bytes);
}

TEST(Resize, MoreHostMemoryKeepsTheCache) {
  StreamedModel model(2, kShape);
  model.open(model.plan(limits(16 * kMiB, 8 * kMiB)));
  load(model);
  for (int i = 0; i < 2; ++i) EXPECT_EQ(model.pass(model.all_units()), "");
  const Plan before = model.engine().plan();
  ASSERT_GT(before.host_home_bytes, 0u);
  ASSERT_GT(before.disk_home_bytes, 0u);
  Engine& engine = model.resize(limits(16 * kMiB, 16 * kMiB));
  EXPECT_EQ(model.pass(model.all_units()), "");
  const Plan& after = engine.plan();
  const uint64_t added = after.host_home_bytes - before.host_home_bytes;
  EXPECT_GT(added, 6 * kMiB);
  expect_read(engine, after.disk_home_bytes + added);
  EXPECT_EQ(model.pass(model.all_units()), "");
  expect_read(engine, 2 * after.disk_home_bytes + added);
}

TEST(Resize, LessHostMemoryGivesItBack) {
  StreamedModel model(3, kShape);
  model.open(model.plan(limits(16 * kMiB, 48 * kMiB)));
  load(model);
  for (int i = 0; i < 2; ++i) EXPECT_EQ(model.pass(model.all_units()), "");
  Engine& engine = model.resize(limits(16 * kMiB, 12 * kMiB));
  EXPECT_LE(engine.memory().host_bytes, 12 * kMiB);
  EXPECT_EQ(model.pass(model.all_units()), "");
  expect_read(engine, engine.plan().disk_home_bytes);
}

TEST(Resize, TheSameBudgetsReadNothing) {
  StreamedModel model(4, kShape);
  model.open(model.plan(limits(16 * kMiB, 48 * kMiB)));
  load(model);
  EXPECT_EQ(model.pass(model.all_units()), "");
  Engine& engine = model.resize(limits(16 * kMiB, 48 * kMiB));
  EXPECT_EQ(model.pass(model.all_units()), "");
  EXPECT_EQ(engine.totals().disk_bytes, 0u);
}

TEST(Resize, RandomBudgetsOneAfterAnother) {
  for (uint64_t seed = 0; seed < 4; ++seed) {
    SCOPED_TRACE(concat("seed ", seed));
    std::mt19937_64 random(seed);
    StreamedModel model(seed, kShape);
    const auto budgets = [&] {
      PlanLimits l = limits((12 + random() % 30) * kMiB, (1 + random() % 45) * kMiB);
      if (random() % 3 == 0) l.home_bytes = 0;
      return l;
    };
    model.open(model.plan(budgets()));
    load(model);
    for (int step = 0; step < 4; ++step) {
      std::vector<uint32_t> order = model.all_units();
      if (random() % 2) std::shuffle(order.begin(), order.end(), random);
      ASSERT_EQ(model.pass(order), "");
      for (uint32_t unit = 0; unit < order.size(); ++unit) {
        ASSERT_EQ(model.wrong_fetch(unit), "");
      }
      EngineOptions options;
      options.poison = true;
      const PlanLimits l = budgets();
      model.resize(l, options);
      load(model);
      EXPECT_LE(model.engine().memory().host_bytes, l.host_bytes);
    }
    ASSERT_EQ(model.pass(model.all_units()), "");
  }
}

TEST(Resize, AnEngineThatHandedOverIsClosed) {
  StreamedModel model(5, kShape);
  Engine& engine = model.open(model.plan(limits(16 * kMiB, 48 * kMiB)));
  const Handoff handoff = engine.hand_over();
  EXPECT_TRUE(engine.closed());
  EXPECT_THROW(engine.acquire(0, 0, {}), Error);
  EXPECT_THROW(engine.hand_over(), Error);
  EXPECT_THROW(engine.kept_cache(), Error);
  EXPECT_EQ(engine.memory().host_bytes, 0u);
  model.close();
}

TEST(Resize, ACacheOfOtherFilesIsRefused) {
  StreamedModel model(6, kShape), other(7, kShape);
  const Plan plan =
      model.plan({.device_bytes = 48 * kMiB, .host_bytes = 48 * kMiB, .home_bytes = 0});
  other.open(other.plan(limits(16 * kMiB, 48 * kMiB)));
  std::vector<std::byte> arena(plan.arena_bytes + kTensorAlignment);
  auto* const begin = reinterpret_cast<std::byte*>(
      align_up(reinterpret_cast<uintptr_t>(arena.data()), kTensorAlignment));
  EXPECT_THROW(
      Engine(model.spec(), plan, other.engine().hand_over(), begin, {}, {nullptr, nullptr}, 0, {}),
      InvalidArgument);
}

}  // namespace
}  // namespace wsm
