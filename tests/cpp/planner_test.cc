#include "plan/planner.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>

#include "support/contains.h"
#include "support/models.h"
#include "support/plan_checks.h"
#include "util/align.h"
#include "util/check.h"

namespace wsm {
namespace {

using testing::contains;
using testing::expect_sound;
using testing::ModelBuilder;
using testing::random_model;
using testing::uniform_model;

uint64_t random_budget(std::mt19937_64& random, uint64_t most) {
  return random() % 10 == 0 ? most : random() % most;
}

PlanLimits random_limits(std::mt19937_64& random, uint64_t model_bytes) {
  const auto maybe = [&] { return random() % 6 == 0; };
  const uint64_t most = model_bytes + 64 * kMiB;
  PlanLimits limits;
  limits.device_bytes = random_budget(random, most);
  limits.host_bytes = random_budget(random, most);
  if (maybe()) limits.arena_bytes = random_budget(random, most);
  if (maybe()) limits.home_bytes = maybe() ? 0 : random_budget(random, most);
  if (maybe()) limits.staging_bytes = random_budget(random, most);
  if (maybe()) limits.cache_bytes = maybe() ? 0 : random_budget(random, most);
  if (maybe()) limits.chunk_bytes = random_budget(random, 32 * kMiB);
  if (maybe()) limits.lookahead_units = static_cast<uint32_t>(random() % 6);
  return limits;
}

uint64_t bytes_of(const ModelSpec& spec) {
  return std::accumulate(spec.tensors.begin(), spec.tensors.end(), uint64_t{0},
                         [](uint64_t sum, const TensorSpec& t) { return sum + t.bytes; });
}

// Follows a plan with real bytes: shards hold noise, every chunk is read into a slot, every copy is
// made.
class Machine {
 public:
  Machine(const ModelSpec& spec, const Plan& plan, std::mt19937_64& random)
      : spec_(spec),
        plan_(plan),
        arena_(plan.arena_bytes),
        homes_(plan.home_blocks.empty()
                   ? 0
                   : plan.home_blocks.back().offset + plan.home_blocks.back().bytes),
        slot_(plan.chunk_bytes) {
    for (const ShardSpec& shard : spec.shards) {
      auto& bytes = shards_.emplace_back(shard.bytes);
      for (size_t i = 0; i < bytes.size(); i += sizeof(uint64_t)) {
        const uint64_t noise = random();
        std::memcpy(&bytes[i], &noise, std::min(sizeof noise, bytes.size() - i));
      }
    }
    for (uint32_t c = plan.first_resident_chunk; c < plan.chunks.size(); ++c)
      load(plan.chunks[c], homes_);
  }

  void load_unit(uint32_t u) {
    const UnitPlan& unit = plan_.units[u];
    for (uint32_t c = 0; c < unit.chunk_count; ++c)
      load(plan_.chunks[unit.first_chunk + c], arena_);
  }

  bool unit_is_right(uint32_t u) const {
    for (size_t i = 0; i < plan_.units[u].tensors.size(); ++i) {
      const TensorLocation place = plan_.units[u].tensors[i];
      const auto& memory = place.resident ? homes_ : arena_;
      const TensorSpec& tensor = spec_.tensors[spec_.units[u].tensors[i]];
      if (place.resident && tensor.parameter_bytes > 0) continue;  // its image is not loaded
      for (const Extent& extent : tensor.extents) {
        const auto from = shards_[extent.shard].begin() + static_cast<ptrdiff_t>(extent.offset);
        const auto at =
            memory.begin() + static_cast<ptrdiff_t>(place.image_offset + extent.tensor_offset);
        if (!std::equal(from, from + static_cast<ptrdiff_t>(extent.bytes), at)) return false;
      }
    }
    return true;
  }

 private:
  void load(const Chunk& chunk, std::vector<uint8_t>& memory) {
    std::fill(slot_.begin(), slot_.end(), 0);
    const auto& shard = shards_[chunk.shard];
    std::copy_n(shard.begin() + static_cast<ptrdiff_t>(chunk.read_offset), chunk.need_bytes,
                slot_.begin());
    for (uint32_t i = 0; i < chunk.copy_count; ++i) {
      const Copy& copy = plan_.copies[chunk.first_copy + i];
      ASSERT_LE(uint64_t{copy.source_offset} + copy.bytes, slot_.size());
      ASSERT_LE(copy.target_offset + copy.bytes, memory.size());
      std::copy_n(slot_.begin() + copy.source_offset, copy.bytes,
                  memory.begin() + static_cast<ptrdiff_t>(copy.target_offset));
    }
  }

  const ModelSpec& spec_;
  const Plan& plan_;
  std::vector<std::vector<uint8_t>> shards_;
  std::vector<uint8_t> arena_, homes_, slot_;
};

class PlanProperty : public ::testing::TestWithParam<uint64_t> {};

TEST_P(PlanProperty, HoldsEverythingItPromises) {
  int planned = 0;
  for (uint64_t seed = GetParam() * 1000; seed < GetParam() * 1000 + 1000; ++seed) {
    SCOPED_TRACE(concat("seed ", seed));
    std::mt19937_64 random(seed);
    const ModelSpec spec = random_model(random, (1 + random() % 64) << (10 + random() % 13));
    const PlanLimits limits = random_limits(random, bytes_of(spec));
    try {
      const Plan plan = make_plan(spec, limits);
      ++planned;
      expect_sound(spec, limits, plan);
    } catch (const InvalidArgument& error) {
      EXPECT_TRUE(contains(error.what(), "at least "));
    }
    if (HasFailure()) return;
  }
  EXPECT_GT(planned, 500);
}

TEST_P(PlanProperty, BringsTheRightBytes) {
  for (uint64_t seed = GetParam() * 1000; seed < GetParam() * 1000 + 20; ++seed) {
    SCOPED_TRACE(concat("seed ", seed));
    std::mt19937_64 random(seed);
    const ModelSpec spec = random_model(random, 100 * kKiB);
    PlanLimits limits{.device_bytes = 24 * kMiB, .host_bytes = 128 * kKiB + random() % (8 * kMiB)};
    limits.home_bytes = random() % (bytes_of(spec) + 1);
    Plan plan;
    try {
      plan = make_plan(spec, limits);
    } catch (const InvalidArgument&) {
      continue;  // several large exclusive units
    }
    Machine machine(spec, plan, random);
    const std::vector<uint32_t> cycle = testing::cycle_of(spec, plan);
    for (uint32_t u = 0; u < plan.units.size(); ++u) machine.load_unit(u);
    for (uint32_t u = 0; u < plan.units.size(); ++u) {
      EXPECT_TRUE(!spec.units[u].encloses_units || machine.unit_is_right(u))
          << "exclusive unit " << u;
    }
    // Once round: each unit is right after those that may be loaded while it runs were loaded.
    for (size_t i = 0; i < cycle.size(); ++i) {
      for (size_t j = i; j < cycle.size() && j <= i + plan.lookahead_units; ++j)
        machine.load_unit(cycle[j]);
      EXPECT_TRUE(machine.unit_is_right(cycle[i])) << "unit " << cycle[i];
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, PlanProperty, ::testing::Range<uint64_t>(0, 6));

TEST(Planner, RefusesWhatIsNotAModel) {
  ModelSpec spec = uniform_model(1, 1, 100);
  spec.units[0].tensors = {7};
  EXPECT_THROW(make_plan(spec, {.device_bytes = kGiB, .host_bytes = kGiB}), InvalidArgument);
}

TEST(Planner, NothingToLoadNeedsNoMemory) {
  ModelBuilder model;
  model.shard("s");
  model.unit("empty", {model.tensor("t", 0)});
  const Plan plan = make_plan(model.spec, {});
  EXPECT_EQ(plan.arena_bytes + plan.homes_bytes + plan.cache_bytes + plan.staging_bytes(), 0u);
  EXPECT_TRUE(make_plan({}, {}).units.empty());
}

// header 1000 | a: 256 000 | b: 256 000 | c: 256 000, one unit each; 2 MiB hold them all.
TEST(Planner, WhatFitsIsLoadedOnceInLoadOrder) {
  const ModelSpec spec = uniform_model(3, 1, 256000);
  const Plan plan = make_plan(spec, {.device_bytes = 20 * kMiB, .host_bytes = kGiB});
  EXPECT_EQ(plan.first_resident_chunk, 0u);
  ASSERT_EQ(plan.chunks.size(), 1u);
  EXPECT_EQ(plan.chunks[0].home, Home::kDevice);
  EXPECT_EQ(plan.chunks[0].read_offset, 0u);
  EXPECT_EQ(plan.chunks[0].need_bytes, 769000u);
  EXPECT_EQ(plan.chunks[0].read_bytes, align_up(769000, 4096));
  ASSERT_EQ(plan.copies.size(), 1u);
  EXPECT_EQ(plan.copies[0].source_offset, 1000u);
  EXPECT_EQ(plan.copies[0].bytes, 768000u);
  EXPECT_EQ(plan.device_home_bytes, 768000u);
  EXPECT_EQ(plan.model_bytes, 768000u);
  EXPECT_EQ(plan.arena_bytes, 0u);
  EXPECT_EQ(plan.lookahead_units, 0u);
  for (uint32_t u = 0; u < 3; ++u) {
    EXPECT_EQ(plan.units[u].place_bytes, 0u);
    EXPECT_TRUE(plan.units[u].tensors[0].resident);
    EXPECT_EQ(plan.units[u].tensors[0].offset, u * 256000u);
  }
}

TEST(Planner, TwelveLayersThroughExactlyTwo) {
  const uint64_t layer = 96 * kMiB;
  const ModelSpec spec = uniform_model(12, 6, layer / 6);
  const PlanLimits limits{.device_bytes = 2 * layer, .host_bytes = 4 * kGiB};
  const Plan plan = make_plan(spec, limits);
  expect_sound(spec, limits, plan);
  EXPECT_EQ(plan.lookahead_units, 1u);
  EXPECT_EQ(plan.arena_bytes, 2 * layer);
  EXPECT_EQ(testing::lookahead_around(spec, plan), 1u);
  EXPECT_EQ(plan.host_home_bytes, 12 * layer);
  EXPECT_TRUE(plan.warnings.empty());
  // One chunk, one copy: the place keeps the file's order, and its sizes are multiples of 256.
  EXPECT_EQ(plan.copies.size(), plan.chunks.size());
  EXPECT_EQ(plan.units[0].chunk_count, 97u);  // of a MiB; the header shifts the cuts
}

TEST(Planner, PlacesKeepTheOrderOfTheFile) {
  ModelBuilder model;
  model.shard("s");
  const uint32_t a = model.tensor("a", 1000);
  const uint32_t b = model.tensor("b", 512);
  model.unit("u", {b, a});
  const Plan plan =
      make_plan(model.spec, {.device_bytes = 2 * kMiB, .host_bytes = kMiB, .home_bytes = 0});
  EXPECT_EQ(plan.units[0].tensors[1].offset, 0u);
  EXPECT_EQ(plan.units[0].tensors[0].offset, 1024u);
  EXPECT_EQ(plan.units[0].place_bytes, 1536u);
  EXPECT_EQ(plan.units[0].streamed_bytes, 1512u);
}

TEST(Planner, ATiedTensorStreamsTwiceAndIsCountedOnce) {
  ModelBuilder model;
  model.shard("s");
  const uint32_t table = model.tensor("embed", 5000);
  model.unit("embed", {table});
  model.unit("head", {table});
  const Plan plan = make_plan(
      model.spec,
      {.device_bytes = 2 * kMiB, .host_bytes = kMiB, .home_bytes = 0, .lookahead_units = 0});
  EXPECT_EQ(plan.model_bytes, 5000u);
  EXPECT_EQ(plan.host_home_bytes, 10000u);
  EXPECT_EQ(plan.read_ahead_bytes, 10000u);
}

// A unit whose place nobody else takes is loaded once: it lives on the device, and a pass moves
// nothing of it.
TEST(Planner, AUnitAloneInItsPlaceMovesNothing) {
  ModelBuilder model;
  model.shard("s");
  for (const char* name : {"a", "b"}) model.unit(name, {model.tensor(name, 5000)});
  const Plan plan =
      make_plan(model.spec, {.device_bytes = 2 * kMiB, .host_bytes = kMiB, .home_bytes = 0});
  EXPECT_TRUE(plan.units[0].never_evicted);
  EXPECT_EQ(plan.units[0].streamed_bytes, 5000u);
  EXPECT_EQ(plan.device_home_bytes, 10000u);
  EXPECT_EQ(plan.host_home_bytes + plan.disk_home_bytes, 0u);
  EXPECT_EQ(plan.cache_bytes, 0u);
}

// The image of `b`, 600 bytes, becomes a parameter of 300.
ModelSpec transformed_model() {
  ModelBuilder model;
  model.shard("s");
  const uint32_t a = model.tensor("a", 512);
  const uint32_t b = model.tensor("b", 600);
  const uint32_t c = model.tensor("c", 100);
  model.spec.tensors[b].parameter_bytes = 300;
  model.unit("u", {a, b, c});
  return model.spec;
}

TEST(Planner, AStreamedTransformHasItsImageInScratchBesideIt) {
  const Plan plan = make_plan(transformed_model(),
                              {.device_bytes = 2 * kMiB, .host_bytes = kMiB, .home_bytes = 0});
  const UnitPlan& unit = plan.units[0];
  EXPECT_EQ(unit.tensors[0].offset, 0u);
  EXPECT_EQ(unit.tensors[1].image_offset, 512u);
  EXPECT_EQ(unit.tensors[2].offset, 512u + 768u);
  EXPECT_EQ(unit.tensors[1].offset, 512u + 768u + 256u);
  EXPECT_EQ(unit.place_bytes, 512u + 768u + 256u + 512u);
  EXPECT_EQ(unit.streamed_bytes, 1212u);
  EXPECT_EQ(plan.chunks.size(), 1u);
  EXPECT_EQ(plan.arena_bytes, unit.place_bytes);
}

TEST(Planner, AResidentTransformTakesOnlyWhatItBecomes) {
  const Plan plan = make_plan(transformed_model(), {.device_bytes = 2 * kMiB, .host_bytes = kMiB});
  EXPECT_EQ(plan.homes_bytes, 512u + 512u + 256u);
  EXPECT_EQ(plan.device_home_bytes, 1212u);
  ASSERT_EQ(plan.chunks.size(), 1u);
  EXPECT_EQ(plan.chunks[0].payload_bytes, 612u);  // the caller makes `b` of what `fetch` brings
}

TEST(Planner, ResidentTransformsAloneNeedNoHostMemoryOfTheirs) {
  ModelSpec spec = transformed_model();
  spec.units[0].tensors = {1};
  const Plan plan = make_plan(spec, {.device_bytes = 2 * kMiB, .host_bytes = kMiB});
  EXPECT_TRUE(plan.chunks.empty());
  EXPECT_EQ(plan.staging_bytes(), 0u);
  EXPECT_EQ(plan.homes_bytes, 512u);
}

TEST(Planner, ReadAheadIsAsAskedFor) {
  const ModelSpec spec = uniform_model(3, 1, 5000);
  const Plan plan =
      make_plan(spec, {.device_bytes = 2 * kMiB, .host_bytes = kMiB, .read_ahead_bytes = 77});
  EXPECT_EQ(plan.read_ahead_bytes, 77u);
}

TEST(Planner, WarnsOfTensorsThatNoUnitUses) {
  ModelSpec spec = uniform_model(3, 1, 5000);
  spec.units.pop_back();
  const Plan plan = make_plan(spec, {.device_bytes = 2 * kMiB, .host_bytes = kMiB});
  ASSERT_EQ(plan.warnings.size(), 1u);
  EXPECT_TRUE(contains(plan.warnings[0], "layers.2.0"));
  EXPECT_EQ(plan.model_bytes, 10000u);
}

TEST(Planner, RefusesAPlanThatNoMemoryCouldHold) {
  ModelSpec spec;
  spec.shards = {{"s", 1ull << 60, 4096}};
  spec.tensors = {{"t", 1ull << 60, {{0, 0, 1ull << 60, 0}}}};
  spec.units = {{"u", "unit=u", {0}, false}};
  try {
    make_plan(spec, {.device_bytes = UINT64_MAX, .host_bytes = kMiB});
    FAIL() << "accepted";
  } catch (const InvalidArgument& error) {
    EXPECT_TRUE(contains(error.what(), "chunks"));
  }
}

TEST(Planner, IsDeterministic) {
  std::mt19937_64 random(5);
  const ModelSpec spec = random_model(random, 8 * kMiB);
  const PlanLimits limits{.device_bytes = 100 * kMiB, .host_bytes = 20 * kMiB};
  const Plan a = make_plan(spec, limits);
  const Plan b = make_plan(spec, limits);
  ASSERT_EQ(a.chunks.size(), b.chunks.size());
  for (size_t c = 0; c < a.chunks.size(); ++c) {
    EXPECT_EQ(a.chunks[c].read_offset, b.chunks[c].read_offset);
    EXPECT_EQ(a.chunks[c].home, b.chunks[c].home);
  }
}

// A hundred times the layers with a hundred times the budgets: the same plan, a hundred times over.
TEST(Planner, LargeModelsArePlannedLikeSmallOnes) {
  const auto plan_of = [](uint64_t times) {
    const ModelSpec spec = uniform_model(static_cast<uint32_t>(100 * times), 10, 2 * kMiB);
    const PlanLimits limits{
        .device_bytes = 50 * times * 20 * kMiB, .host_bytes = 64 * kMiB, .lookahead_units = 1};
    const Plan plan = make_plan(spec, limits);
    testing::expect_budgets_held(limits, plan);
    testing::expect_places_disjoint(spec, plan);
    return plan;
  };
  const Plan small = plan_of(1);
  const Plan large = plan_of(100);
  EXPECT_EQ(large.units.size(), 10000u);
  EXPECT_EQ(large.arena_bytes, small.arena_bytes);
  EXPECT_EQ(large.chunk_bytes, small.chunk_bytes);
  const double chunks =
      static_cast<double>(large.chunks.size()) / static_cast<double>(small.chunks.size());
  EXPECT_NEAR(chunks, 100, 3);
  const double homes =
      static_cast<double>(large.device_home_bytes) / static_cast<double>(small.device_home_bytes);
  EXPECT_NEAR(homes, 100, 3);
}

}  // namespace
}  // namespace wsm
