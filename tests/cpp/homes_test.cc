#include "plan/homes.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>

#include "support/contains.h"
#include "support/models.h"
#include "util/align.h"
#include "util/check.h"

namespace wsm {
namespace {

using testing::contains;
using testing::ModelBuilder;
using testing::random_model;
using testing::uniform_model;

constexpr uint64_t kLayer = 100 * kMiB;

DeviceHomes homes_of(const ModelSpec& spec, const PlanLimits& limits) {
  validate(spec);
  return choose_device_homes(spec, limits);
}

std::string refusal(const ModelSpec& spec, const PlanLimits& limits) {
  try {
    homes_of(spec, limits);
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "accepted";
}

// The number after "at least ".
uint64_t least_named(const std::string& message) {
  const std::string before = "at least ";
  const size_t at = message.find(before);
  return at == std::string::npos ? 0 : std::stoull(message.substr(at + before.size()));
}

size_t resident_count(const DeviceHomes& homes) {
  return std::count(homes.resident.begin(), homes.resident.end(), true);
}

TEST(DeviceHomes, EverythingStaysWhereItFits) {
  const ModelSpec spec = uniform_model(4, 2, kLayer / 2);
  const DeviceHomes homes = homes_of(spec, {.device_bytes = 4 * kLayer});
  EXPECT_EQ(resident_count(homes), 8u);
  EXPECT_EQ(homes.blocks.bytes(), 4 * kLayer);
  EXPECT_EQ(homes.arena_bytes, 0u);
}

TEST(DeviceHomes, OneByteLessAndItStreams) {
  const ModelSpec spec = uniform_model(4, 2, kLayer / 2);
  const DeviceHomes homes = homes_of(spec, {.device_bytes = 4 * kLayer - 1});
  EXPECT_GT(homes.arena_bytes, 0u);
  EXPECT_LT(resident_count(homes), 8u);
}

TEST(DeviceHomes, NoHomesMeansAnArenaAlone) {
  const ModelSpec spec = uniform_model(4, 2, kLayer / 2);
  const DeviceHomes homes = homes_of(spec, {.device_bytes = 100 * kLayer, .home_bytes = 0});
  EXPECT_EQ(resident_count(homes), 0u);
  EXPECT_EQ(homes.blocks.bytes(), 0u);
  EXPECT_GE(homes.arena_bytes, 2 * kLayer);
}

TEST(DeviceHomes, TwelveLayersThroughExactlyTwo) {
  const ModelSpec spec = uniform_model(12, 4, kLayer / 4);
  const DeviceHomes homes = homes_of(spec, {.device_bytes = 2 * kLayer});
  EXPECT_EQ(homes.ahead.units, 1u);
  EXPECT_EQ(homes.ahead.seam, 1u);
  EXPECT_EQ(homes.arena_bytes, 2 * kLayer);
  EXPECT_EQ(resident_count(homes), 0u);
  for (size_t u = 0; u < 12; ++u) EXPECT_EQ(homes.arena.offsets[u], u % 2 * kLayer);
}

TEST(DeviceHomes, ThirteenLayersThroughExactlyTwoGiveUpTheSeam) {
  const DeviceHomes homes = homes_of(uniform_model(13, 4, kLayer / 4),
                                     {.device_bytes = 2 * kLayer, .lookahead_units = 1});
  EXPECT_EQ(homes.ahead.units, 1u);
  EXPECT_EQ(homes.ahead.seam, 0u);
  ASSERT_EQ(homes.warnings.size(), 1u);
  EXPECT_TRUE(contains(homes.warnings[0], "between the last units and the first"));
}

// Twelve of the thirteen alternate, and one stays: a third place would cost as much and stream
// more.
TEST(DeviceHomes, AnOddCycleIsMadeEvenRatherThanGivenAThirdPlace) {
  const DeviceHomes homes = homes_of(uniform_model(13, 4, kLayer / 4),
                                     {.device_bytes = 3 * kLayer, .lookahead_units = 1});
  EXPECT_EQ(homes.ahead.seam, 1u);
  EXPECT_EQ(homes.arena_bytes, 2 * kLayer);
  EXPECT_EQ(homes.blocks.bytes(), kLayer);
  EXPECT_TRUE(homes.warnings.empty());
}

TEST(DeviceHomes, LooksTwoAheadWhereThatIsCheap) {
  const ModelSpec spec = uniform_model(24, 1, kLayer);
  EXPECT_EQ(homes_of(spec, {.device_bytes = 12 * kLayer}).ahead.units, 2u);
  EXPECT_EQ(homes_of(spec, {.device_bytes = 12 * kLayer - 1}).ahead.units, 1u);
}

TEST(DeviceHomes, OnDemandWhereTwoPlacesDoNotFit) {
  const ModelSpec spec = uniform_model(12, 1, kLayer);
  const DeviceHomes homes = homes_of(spec, {.device_bytes = 2 * kLayer - 1});
  EXPECT_EQ(homes.ahead.units, 0u);
  EXPECT_EQ(homes.arena_bytes, kLayer);
}

TEST(DeviceHomes, TakesTheLookaheadThatIsAskedFor) {
  const ModelSpec spec = uniform_model(12, 1, kLayer);
  const DeviceHomes homes = homes_of(spec, {.device_bytes = 8 * kLayer, .lookahead_units = 3});
  EXPECT_EQ(homes.ahead.units, 3u);
  EXPECT_TRUE(homes.warnings.empty());
  EXPECT_EQ(homes_of(spec, {.device_bytes = 8 * kLayer, .lookahead_units = 0}).ahead.units, 0u);
}

TEST(DeviceHomes, WarnsOfALookaheadThatDoesNotFit) {
  const ModelSpec spec = uniform_model(12, 1, kLayer);
  const DeviceHomes homes = homes_of(spec, {.device_bytes = 3 * kLayer, .lookahead_units = 5});
  EXPECT_EQ(homes.ahead.units, 2u);
  ASSERT_EQ(homes.warnings.size(), 1u);
  EXPECT_TRUE(contains(homes.warnings[0], "lookahead_units = 5"));
  EXPECT_TRUE(contains(homes.warnings[0], "2 is used"));
}

TEST(DeviceHomes, WarnsOfALookaheadBeyondAnyUse) {
  const DeviceHomes homes = homes_of(uniform_model(100, 1, kLayer),
                                     {.device_bytes = 90 * kLayer, .lookahead_units = 1000});
  ASSERT_FALSE(homes.warnings.empty());
  EXPECT_TRUE(contains(homes.warnings[0], "lookahead_units = 1000"));
}

TEST(DeviceHomes, TheArenaIsLimited) {
  const ModelSpec spec = uniform_model(12, 4, kLayer / 4);
  const DeviceHomes homes = homes_of(spec, {.device_bytes = 8 * kLayer, .arena_bytes = kLayer});
  EXPECT_LE(homes.arena_bytes, kLayer);
  EXPECT_GE(homes.blocks.bytes(), 6 * kLayer);
}

// One large unit among small ones: keeping one of its tensors makes the arena smaller too.
TEST(DeviceHomes, WhatTheArenaGivesUpIsUsed) {
  ModelBuilder model;
  model.shard("s");
  model.unit("embed", {model.tensor("embed", 10 * kLayer)});
  for (int i = 0; i < 10; ++i) {
    model.unit("layer", {model.tensor("up", kLayer / 2), model.tensor("down", kLayer / 2)});
  }
  const DeviceHomes homes = homes_of(model.spec, {.device_bytes = 16 * kLayer});
  EXPECT_TRUE(homes.resident[0]);
  EXPECT_LE(homes.arena_bytes, 2 * kLayer);
  EXPECT_GE(homes.blocks.bytes() + homes.arena_bytes, 16 * kLayer - kLayer / 2);
}

TEST(DeviceHomes, ATiedTensorIsKeptOnce) {
  ModelBuilder model;
  model.shard("s");
  const uint32_t table = model.tensor("embed", kLayer);
  model.unit("embed", {table});
  for (int i = 0; i < 6; ++i) model.unit("layer", {model.tensor("w", kLayer)});
  model.unit("head", {table});
  const DeviceHomes homes = homes_of(model.spec, {.device_bytes = 7 * kLayer});
  EXPECT_EQ(resident_count(homes), 7u);
  EXPECT_EQ(homes.blocks.bytes(), 7 * kLayer);
}

// Uniform layers under any budget: no stretch of the pass streams more than a tensor or two more
// than another, but for at most one layer that is kept whole (it makes the others go round evenly).
TEST(DeviceHomes, StreamedBytesAreSpreadEvenly) {
  const uint32_t layers = 40;
  const uint64_t tensor = kLayer / 4;
  const ModelSpec spec = uniform_model(layers, 4, tensor);
  for (uint64_t budget = 2; budget < 30; ++budget) {
    SCOPED_TRACE(concat("budget of ", budget, " layers"));
    std::vector<uint64_t> streamed;
    for (const Place& place : homes_of(spec, {.device_bytes = budget * kLayer}).places) {
      if (place.bytes > 0) streamed.push_back(place.bytes);
    }
    ASSERT_GE(streamed.size(), layers - 1);
    const auto [least, most] = std::minmax_element(streamed.begin(), streamed.end());
    EXPECT_LE(*most - *least, tensor);
    const uint64_t total = std::accumulate(streamed.begin(), streamed.end(), uint64_t{0});
    uint64_t before = 0;
    for (size_t i = 0; i < streamed.size(); ++i) {
      before += streamed[i];
      const uint64_t even = total * (i + 1) / streamed.size();
      EXPECT_NEAR(double(before), double(even), 2.0 * tensor) << "up to unit " << i;
    }
  }
}

TEST(DeviceHomes, MoreMemoryNeverStreamsMore) {
  const ModelSpec spec = uniform_model(30, 4, kLayer / 4);
  uint64_t streamed_before = UINT64_MAX;
  for (uint64_t budget = 1; budget <= 30; ++budget) {
    uint64_t streamed = 0;
    const PlanLimits limits{.device_bytes = budget * kLayer, .lookahead_units = 1};
    for (const Place& place : homes_of(spec, limits).places) streamed += place.bytes;
    EXPECT_LE(streamed, streamed_before) << budget;
    streamed_before = streamed;
  }
}

TEST(DeviceHomes, TooSmallNamesTheLeastAndTheLargestUnit) {
  ModelBuilder model;
  model.shard("s");
  model.unit("small", {model.tensor("a", 30 * kMiB)});
  model.unit("lm_head", {model.tensor("b", 51 * kMiB)});
  model.unit("other", {model.tensor("c", 20 * kMiB)});
  const std::string message = refusal(model.spec, {.device_bytes = 50 * kMiB});
  EXPECT_TRUE(contains(message, concat("device_bytes = ", 50 * kMiB)));
  EXPECT_TRUE(contains(message, concat("at least ", 52 * kMiB)));
  EXPECT_TRUE(contains(message, "lm_head"));
  const std::string arena =
      refusal(model.spec, {.device_bytes = 1 << 30, .arena_bytes = kMiB, .home_bytes = 0});
  EXPECT_TRUE(contains(arena, concat("arena_bytes = ", kMiB)));
  EXPECT_TRUE(contains(arena, concat("at least ", 51 * kMiB)));
}

// Far from any model: what is named as the least works, and one byte less does not.
TEST(DeviceHomes, TheLeastThatIsNamedWorks) {
  for (uint64_t seed = 0; seed < 400; ++seed) {
    SCOPED_TRACE(concat("seed ", seed));
    std::mt19937_64 random(seed);
    const ModelSpec spec = random_model(random, (1 + random() % 64) * kMiB);
    PlanLimits limits;
    if (random() % 3 == 0) limits.home_bytes = random() % (32 * kMiB);
    const std::string message = refusal(spec, limits);
    if (message == "accepted") continue;  // no bytes at all
    limits.device_bytes = least_named(message);
    EXPECT_EQ(refusal(spec, limits), "accepted");
    --limits.device_bytes;
    EXPECT_EQ(least_named(refusal(spec, limits)), limits.device_bytes + 1);
  }
}

}  // namespace
}  // namespace wsm
