#include "plan/host_memory.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "support/contains.h"
#include "support/models.h"
#include "support/plan_checks.h"
#include "util/align.h"
#include "util/check.h"

namespace wsm {
namespace {

using testing::contains;
using testing::ModelBuilder;
using testing::uniform_model;

constexpr uint64_t kChunk = kDiskChunk;

// 10 layers, beginning at an aligned offset; unless said otherwise of 4 chunks each.
ModelSpec aligned_model(uint64_t layer_bytes = 4 * kChunk) {
  ModelBuilder model;
  model.shard("s", 4096, 4096);
  for (int i = 0; i < 10; ++i) {
    const std::string name = concat("layers.", i);
    model.unit(name, {model.tensor(name, layer_bytes)});
  }
  return model.spec;
}

PlanLimits streaming(uint64_t host_bytes) {
  return {.device_bytes = 12 * kChunk, .host_bytes = host_bytes, .home_bytes = 0};
}

uint64_t count(const Plan& plan, Home home) {
  return std::count_if(plan.chunks.begin(), plan.chunks.end(),
                       [&](const Chunk& chunk) { return chunk.home == home; });
}

TEST(HostMemory, AllCachedWithAnAmpleRingWhereAffordable) {
  const Plan plan = make_plan(aligned_model(), streaming(72 * kChunk));
  EXPECT_EQ(plan.chunk_bytes, kChunk);
  EXPECT_EQ(plan.slot_count, 32u);
  EXPECT_EQ(plan.cache_bytes, 40 * kChunk);
  EXPECT_EQ(count(plan, Home::kHost), 40u);
  EXPECT_EQ(plan.disk_home_bytes, 0u);
}

TEST(HostMemory, AllCachedWithASmallerRingWhereThatIsTooLarge) {
  const Plan plan = make_plan(aligned_model(), streaming(72 * kChunk - 1));
  EXPECT_EQ(plan.slot_count, 31u);
  EXPECT_EQ(plan.disk_home_bytes, 0u);
  EXPECT_EQ(make_plan(aligned_model(), streaming(44 * kChunk)).slot_count, 4u);
  EXPECT_EQ(make_plan(aligned_model(), streaming(44 * kChunk)).disk_home_bytes, 0u);
}

TEST(HostMemory, AMixtureTakesAnEighthForTheRing) {
  const Plan plan = make_plan(aligned_model(), streaming(44 * kChunk - 1));
  EXPECT_EQ(plan.slot_count, 5u);
  EXPECT_EQ(count(plan, Home::kHost), 38u);
  EXPECT_EQ(make_plan(aligned_model(), streaming(16 * kChunk)).slot_count, 4u);
}

TEST(HostMemory, WithoutACacheTheRingTakesAll) {
  PlanLimits limits = streaming(30 * kChunk);
  limits.cache_bytes = 0;
  EXPECT_EQ(make_plan(aligned_model(), limits).slot_count, 30u);
  limits.host_bytes = 1000 * kChunk;
  EXPECT_EQ(make_plan(aligned_model(), limits).slot_count, 40u);  // there are no more chunks
  limits.host_bytes = 2000 * kChunk;
  limits.device_bytes = 128 * kMiB;
  EXPECT_EQ(make_plan(uniform_model(100, 1, 64 * kMiB), limits).slot_count, kGiB / kChunk);
}

TEST(HostMemory, ASmallBudgetTakesSmallerChunks) {
  const auto chunk = [](uint64_t host) {
    return make_plan(aligned_model(), streaming(host)).chunk_bytes;
  };
  EXPECT_EQ(chunk(16 * kChunk), kChunk);
  EXPECT_EQ(chunk(16 * kChunk - 1), kChunk / 2);
  EXPECT_EQ(chunk(kMiB), 64 * kKiB);
  EXPECT_EQ(chunk(128 * kKiB), 64 * kKiB);
}

TEST(HostMemory, WhatLiesInMemoryIsReadInLargerChunks) {
  ModelSpec spec = aligned_model();
  spec.shards[0].in_memory = true;
  EXPECT_EQ(make_plan(spec, streaming(64 * kMiB)).chunk_bytes, 4 * kMiB);
  EXPECT_EQ(make_plan(spec, streaming(kMiB)).chunk_bytes, 64 * kKiB);
  spec.shards.push_back({.path = "on a disk", .bytes = 4096, .alignment = 4096});
  EXPECT_EQ(make_plan(spec, streaming(64 * kMiB)).chunk_bytes, kChunk);
}

TEST(HostMemory, AHugeModelIsReadInLargerChunks) {
  const auto chunk = [](uint64_t tensor_bytes) {
    PlanLimits limits = streaming(8 * kGiB);
    limits.device_bytes = 16 * kGiB;
    return make_plan(uniform_model(64, 1, tensor_bytes), limits).chunk_bytes;
  };
  EXPECT_EQ(chunk(4 * kGiB), kChunk);  // 2^18 chunks in all
  EXPECT_EQ(chunk(4 * kGiB + kMiB), 2 * kChunk);
}

TEST(HostMemory, SlotsAreNoLargerThanTheLargestChunk) {
  const Plan plan = make_plan(uniform_model(100, 1, 300000), streaming(16 * kMiB));
  EXPECT_LE(plan.chunk_bytes, 300000u + 2 * 4096);
  EXPECT_GE(plan.chunk_bytes, 300000u);
}

TEST(HostMemory, TooSmallNamesTheLeast) {
  const auto refusal = [](const ModelSpec& spec, uint64_t host) -> std::string {
    try {
      make_plan(spec, streaming(host));
    } catch (const InvalidArgument& error) {
      return error.what();
    }
    return "accepted";
  };
  EXPECT_TRUE(contains(refusal(aligned_model(), 128 * kKiB - 1), concat("at least ", 128 * kKiB)));
  ModelSpec coarse = aligned_model();
  coarse.shards[0].alignment = 64 * kKiB;
  EXPECT_TRUE(contains(refusal(coarse, 256 * kKiB - 1), concat("at least ", 256 * kKiB)));
  EXPECT_EQ(refusal(coarse, 256 * kKiB), "accepted");
}

TEST(HostMemory, TheRingIsAsLargeAsAskedFor) {
  PlanLimits limits = streaming(20 * kChunk);
  limits.staging_bytes = 6 * kChunk;
  const Plan plan = make_plan(aligned_model(), limits);
  EXPECT_EQ(plan.staging_bytes(), 6 * kChunk);
  EXPECT_EQ(plan.cache_bytes, 14 * kChunk);
  EXPECT_TRUE(plan.warnings.empty());
  limits.staging_bytes = kChunk;
  EXPECT_EQ(make_plan(aligned_model(), limits).chunk_bytes, kChunk / 4);
}

TEST(HostMemory, WarnsOfARingThatCannotBe) {
  PlanLimits limits = streaming(20 * kChunk);
  limits.staging_bytes = 21 * kChunk;
  const Plan large = make_plan(aligned_model(), limits);
  EXPECT_EQ(large.staging_bytes(), 20 * kChunk);
  ASSERT_EQ(large.warnings.size(), 1u);
  EXPECT_TRUE(contains(large.warnings[0], "staging_bytes"));
  limits.staging_bytes = 1;
  const Plan small = make_plan(aligned_model(), limits);
  EXPECT_EQ(small.staging_bytes(), 128 * kKiB);
  ASSERT_EQ(small.warnings.size(), 1u);
}

TEST(HostMemory, ChunksAreAsLargeAsAskedFor) {
  PlanLimits limits = streaming(40 * kMiB);
  limits.chunk_bytes = 3000000;
  const Plan plan = make_plan(aligned_model(), limits);
  EXPECT_EQ(plan.chunk_bytes, align_down(3000000, 4096));
  EXPECT_TRUE(plan.warnings.empty());
}

TEST(HostMemory, WarnsOfChunksThatCannotBe) {
  for (const uint64_t asked : {uint64_t{1}, 64 * kKiB - 1, kSegmentBytes + 4096, 11 * kMiB}) {
    PlanLimits limits = streaming(20 * kMiB);
    limits.chunk_bytes = asked;
    const Plan plan = make_plan(aligned_model(), limits);
    ASSERT_EQ(plan.warnings.size(), 1u) << asked;
    EXPECT_TRUE(contains(plan.warnings[0], concat("chunk_bytes = ", asked)));
  }
}

// Each layer gets its share of the cache to within one chunk, at any budget.
TEST(HostMemory, CachedBytesAreSpreadEvenly) {
  const ModelSpec spec = uniform_model(40, 4, 5 * kChunk / 4);
  for (uint64_t host = 10; host < 240; host += 7) {
    SCOPED_TRACE(concat("host budget of ", host, " chunks"));
    const Plan plan = make_plan(spec, streaming(host * kChunk));
    double disk_before = 0;
    double before = 0;
    const double share =
        double(plan.disk_home_bytes) / (plan.disk_home_bytes + plan.host_home_bytes);
    for (uint32_t u = 0; u < plan.units.size(); ++u) {
      double disk = 0;
      for (uint32_t c = 0; c < plan.units[u].chunk_count; ++c) {
        const Chunk& chunk = plan.chunks[plan.units[u].first_chunk + c];
        if (chunk.home == Home::kDisk) disk += chunk.payload_bytes;
      }
      EXPECT_NEAR(disk, share * plan.units[u].streamed_bytes, 1.5 * kChunk) << "unit " << u;
      disk_before += disk;
      before += plan.units[u].streamed_bytes;
      EXPECT_NEAR(disk_before, share * before, 1.5 * kChunk) << "up to unit " << u;
    }
  }
}

// What lies between is read in long stretches, and what lies in the cache is copied so.
TEST(HostMemory, AChunkIsCachedWithItsNeighbours) {
  const ModelSpec spec = uniform_model(64, 1, 128 * kMiB);
  PlanLimits limits = streaming(4 * kGiB);
  limits.device_bytes = kGiB;
  const Plan plan = make_plan(spec, limits);
  uint64_t stretches = 0;
  for (uint32_t c = 1; c < plan.first_resident_chunk; ++c) {
    stretches += plan.chunks[c].home != plan.chunks[c - 1].home;
  }
  EXPECT_NEAR(stretches, plan.first_resident_chunk / 16.0, 64);
}

TEST(HostMemory, SegmentsEndAtChunks) {
  PlanLimits limits = streaming(1000 * kChunk);
  limits.chunk_bytes = 48 * kMiB;
  limits.host_bytes = 16 * kGiB;
  limits.device_bytes = 128 * kMiB;
  const Plan plan = make_plan(aligned_model(64 * kMiB), limits);
  // 48 and 16 MiB in turns: 48+16+48+16+48+16+48+16 are 256 MiB.
  ASSERT_EQ(plan.cache_segments, (std::vector<uint64_t>{256 * kMiB, 512 * kMiB, 640 * kMiB}));
  limits.chunk_bytes = 200 * kMiB;
  limits.device_bytes = 400 * kMiB;
  const Plan whole = make_plan(uniform_model(4, 1, 200 * kMiB - 8192), limits);
  EXPECT_EQ(whole.cache_segments.size(), 4u);
  EXPECT_EQ(whole.cache_segments[0], 200 * kMiB - 4096);
}

}  // namespace
}  // namespace wsm
