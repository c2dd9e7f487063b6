#include "plan/best_plan.h"

#include <gtest/gtest.h>

#include <random>

#include "support/models.h"
#include "support/plan_checks.h"
#include "util/align.h"
#include "util/check.h"

namespace wsm {
namespace {

using testing::ModelBuilder;
using testing::random_model;
using testing::uniform_model;

constexpr uint64_t kUnit = 32 * kMiB;

Rates fast_link() { return {.disk_bytes_per_s = 2e9, .h2d_bytes_per_s = 50e9, .compute_s = {}}; }

// An odd cycle in two places takes turns at the seam; where computing takes long, a third place
// is worth its memory, where it does not, homes are.
TEST(BestPlan, WeighsTheSeamAgainstHomes) {
  const ModelSpec spec = uniform_model(13, 4, kUnit / 4);
  const PlanLimits limits{.device_bytes = 6 * kUnit, .host_bytes = 20 * kUnit};
  for (const double compute_s : {0.0, 0.0005, 0.005}) {
    Rates rates = fast_link();
    rates.compute_s.assign(13, compute_s);
    const double best = simulate(best_plan(spec, limits, rates), rates).pass_s;
    for (uint32_t ahead = 1; ahead <= 4; ++ahead) {
      PlanLimits other = limits;
      other.lookahead_units = ahead;
      EXPECT_LE(best, simulate(make_plan(spec, other), rates).pass_s * 1.006);
    }
  }
}

TEST(BestPlan, KeepsTheUnitThatMakesTheArenaLarge) {
  ModelBuilder model;
  model.shard("model.safetensors", 4096, 1000);
  model.unit("embed", {model.tensor("embed", 16 * kUnit)});
  for (int i = 0; i < 40; ++i) {
    const std::string name = "layers." + std::to_string(i);
    model.unit(name, {model.tensor(name, kUnit)});
  }
  const PlanLimits limits{.device_bytes = 20 * kUnit, .host_bytes = 80 * kUnit};
  const Plan usual = make_plan(model.spec, limits);
  const Plan best = best_plan(model.spec, limits, fast_link());
  EXPECT_EQ(best.units[0].place_bytes, 0u);
  EXPECT_GE(best.device_home_bytes, usual.device_home_bytes);
  EXPECT_LE(best.arena_bytes, 4 * kUnit);
}

// An arena of two layers: while the head and the embedding lie in one place, and the last layer
// runs in the other, the first layer cannot come in.
TEST(BestPlan, KeepsTheEndsWhereTheyHoldUpTheNextPass) {
  ModelBuilder model;
  model.shard("model.safetensors", 4096, 1000);
  model.unit("embed", {model.tensor("embed", kUnit / 3)});
  for (int i = 0; i < 12; ++i) {
    const std::string name = "layers." + std::to_string(i);
    std::vector<uint32_t> tensors;
    for (int t = 0; t < 4; ++t)
      tensors.push_back(model.tensor(name + std::to_string(t), kUnit / 4));
    model.unit(name, tensors);
  }
  model.unit("head", {model.tensor("head", kUnit / 3)});
  const PlanLimits limits{.device_bytes = 3 * kUnit,
                          .host_bytes = 20 * kUnit,
                          .arena_bytes = 2 * kUnit,
                          .home_bytes = kUnit};
  Rates rates = fast_link();
  const double copy_s = kUnit / rates.h2d_bytes_per_s;
  rates.compute_s.assign(14, 1.5 * copy_s);
  rates.compute_s.front() = rates.compute_s.back() = 0.01 * copy_s;
  const Plan plan = best_plan(model.spec, limits, rates);
  EXPECT_EQ(plan.units.front().place_bytes + plan.units.back().place_bytes, 0u);
  const Simulated s = simulate(plan, rates);
  EXPECT_LE(s.pass_s, 1.01 * s.compute_s);
  PlanLimits alone = limits;
  alone.home_bytes = 0;
  EXPECT_GT(simulate(make_plan(model.spec, alone), rates).pass_s, 1.03 * s.compute_s);
}

// Tried out with larger chunks, but made with its own.
TEST(BestPlan, ALargeModelHasTheChunksOfAnyOther) {
  const ModelSpec spec = uniform_model(13, 4, kGiB / 4);
  const PlanLimits limits{.device_bytes = 4 * kGiB, .host_bytes = 40 * kGiB};
  Rates rates = fast_link();
  rates.compute_s.assign(13, 0.02);
  const Plan plan = best_plan(spec, limits, rates);
  testing::expect_sound(spec, limits, plan);
  EXPECT_EQ(plan.lookahead_units, 2u);
  EXPECT_EQ(plan.cut_bytes, kMiB);
  EXPECT_GT(plan.chunks.size(), 13'000u);
  EXPECT_TRUE(plan.warnings.empty());
  EXPECT_LT(simulate(plan, rates).pass_s, 0.98 * simulate(make_plan(spec, limits), rates).pass_s);
}

TEST(BestPlan, WhatIsAskedForIsNotVaried) {
  const ModelSpec spec = uniform_model(12, 4, kUnit / 4);
  const PlanLimits limits{.device_bytes = 8 * kUnit,
                          .host_bytes = 4 * kUnit,
                          .staging_bytes = kUnit,
                          .lookahead_units = 3};
  const Plan plan = best_plan(spec, limits, fast_link());
  EXPECT_EQ(plan.lookahead_units, 3u);
  EXPECT_EQ(plan.staging_bytes(), make_plan(spec, limits).staging_bytes());
}

TEST(BestPlan, WhatWasTriedLeavesNoWarnings) {
  const ModelSpec spec = uniform_model(5, 2, kUnit / 2);
  const PlanLimits limits{.device_bytes = 3 * kUnit, .host_bytes = kUnit};
  EXPECT_TRUE(best_plan(spec, limits, fast_link()).warnings.empty());
}

TEST(BestPlan, NothingStreamsWhereAllFits) {
  const ModelSpec spec = uniform_model(4, 2, kUnit / 2);
  const Plan plan =
      best_plan(spec, {.device_bytes = 100 * kUnit, .host_bytes = kUnit}, fast_link());
  EXPECT_EQ(plan.device_home_bytes, plan.model_bytes);
}

TEST(BestPlan, IsSoundAndNoSlowerThanTheUsualPlan) {
  int planned = 0;
  for (uint64_t seed = 0; seed < 150; ++seed) {
    SCOPED_TRACE(concat("seed ", seed));
    std::mt19937_64 random(seed);
    const ModelSpec spec = random_model(random, 4 * kMiB);
    const PlanLimits limits{.device_bytes = random() % (64 * kMiB),
                            .host_bytes = random() % (64 * kMiB)};
    Plan usual;
    try {
      usual = make_plan(spec, limits);
    } catch (const InvalidArgument&) {
      EXPECT_THROW(best_plan(spec, limits, fast_link()), InvalidArgument);
      continue;
    }
    ++planned;
    const Rates rates = fast_link();
    const Plan best = best_plan(spec, limits, rates);
    EXPECT_LE(expected_pass_s(best, rates), expected_pass_s(usual, rates) * (1 + 1e-9));
    testing::expect_budgets_held(limits, best);
    testing::expect_chunks_sound(spec, best);
    testing::expect_places_disjoint(spec, best);
    testing::expect_tensors_placed(spec, best);
    testing::expect_bytes_covered(spec, best);
    if (::testing::Test::HasFailure()) return;
  }
  EXPECT_GT(planned, 50);
}

}  // namespace
}  // namespace wsm
