#include "plan/kept_cache.h"

#include <gtest/gtest.h>

#include <random>

#include "plan/planner.h"
#include "support/models.h"
#include "util/align.h"
#include "util/check.h"

namespace wsm {
namespace {

using testing::random_model;
using testing::uniform_model;

constexpr uint64_t kTensor = 4 * kMiB;

// What the cache of a plan holds once it is full.
KeptCache full_cache(const Plan& plan) {
  KeptCache kept;
  kept.segments = plan.cache_segments;
  kept.cut_bytes = plan.cut_bytes;
  for (const Chunk& chunk : plan.chunks) {
    if (chunk.home != Home::kHost) continue;
    kept.extents.push_back({chunk.shard, chunk.read_offset, chunk.read_bytes, chunk.cache_offset});
  }
  return kept;
}

// Bytes of the plan's cache that it finds where they were.
uint64_t found_bytes(const Plan& plan, const KeptCache& kept) {
  const KeptExtents extents(kept.extents, plan.cache_bytes);
  uint64_t bytes = 0;
  for (const Chunk& chunk : plan.chunks) {
    const bool found =
        chunk.home == Home::kHost &&
        extents.find(chunk.shard, chunk.read_offset, chunk.read_bytes) == chunk.cache_offset;
    if (found) bytes += chunk.payload_bytes;
  }
  return bytes;
}

PlanLimits limits(uint64_t device, uint64_t host) {
  return {.device_bytes = device, .host_bytes = host};
}

TEST(KeptCache, TheSameBudgetsKeepAll) {
  const ModelSpec spec = uniform_model(12, 4, kTensor);
  PlanLimits l = limits(100 * kMiB, 120 * kMiB);
  const Plan before = make_plan(spec, l);
  l.kept_cache = full_cache(before);
  const Plan after = make_plan(spec, l);
  EXPECT_EQ(found_bytes(after, l.kept_cache), before.host_home_bytes);
  EXPECT_EQ(after.disk_home_bytes, before.disk_home_bytes);
}

TEST(KeptCache, MemoryThatHoldsNothingYetIsTakenOverInItsPieces) {
  const ModelSpec spec = uniform_model(12, 4, kTensor + 12'000);
  for (uint64_t host = 40; host < 90; ++host) {
    KeptCache kept = full_cache(make_plan(spec, limits(100 * kMiB, host * kMiB)));
    ASSERT_FALSE(kept.extents.empty());
    kept.extents.clear();
    PlanLimits more = limits(100 * kMiB, (host + 13) * kMiB);
    more.kept_cache = kept;
    for (const Chunk& chunk : make_plan(spec, more).chunks) {
      if (chunk.home != Home::kHost) continue;
      for (const uint64_t end : kept.segments) {
        EXPECT_TRUE(chunk.cache_offset >= end || chunk.cache_offset + chunk.read_bytes <= end)
            << host << " MiB: a chunk at " << chunk.cache_offset << " crosses " << end;
      }
    }
  }
}

TEST(KeptCache, MoreDeviceMemoryKeepsWhatStillStreams) {
  const ModelSpec spec = uniform_model(12, 4, kTensor);
  const Plan before = make_plan(spec, limits(100 * kMiB, 120 * kMiB));
  PlanLimits l = limits(140 * kMiB, 120 * kMiB);
  l.kept_cache = full_cache(before);
  const Plan after = make_plan(spec, l);
  EXPECT_GT(after.device_home_bytes, before.device_home_bytes);
  uint64_t wanted = 0;  // of what was cached, still streamed
  const KeptExtents extents(l.kept_cache.extents, after.cache_bytes);
  for (const Chunk& chunk : after.chunks) {
    const bool held = extents.find(chunk.shard, chunk.read_offset, chunk.read_bytes) != UINT64_MAX;
    if (held && chunk.home != Home::kDevice) wanted += chunk.payload_bytes;
  }
  EXPECT_GT(wanted, 0u);
  EXPECT_EQ(found_bytes(after, l.kept_cache), wanted);
}

TEST(KeptCache, MoreHostMemoryKeepsAllAndAddsBehind) {
  const ModelSpec spec = uniform_model(12, 4, kTensor);
  const Plan before = make_plan(spec, limits(100 * kMiB, 80 * kMiB));
  PlanLimits l = limits(100 * kMiB, 120 * kMiB);
  l.kept_cache = full_cache(before);
  const Plan after = make_plan(spec, l);
  EXPECT_EQ(found_bytes(after, l.kept_cache), before.host_home_bytes);
  EXPECT_GE(after.host_home_bytes, before.host_home_bytes + 30 * kMiB);
  // The memory that there was is not cut anew.
  for (size_t i = 0; i < before.cache_segments.size(); ++i) {
    EXPECT_EQ(after.cache_segments[i], before.cache_segments[i]);
  }
}

TEST(KeptCache, LessHostMemoryKeepsWhatLiesBelowTheLimit) {
  const ModelSpec spec = uniform_model(12, 4, kTensor);
  const Plan before = make_plan(spec, limits(100 * kMiB, 120 * kMiB));
  PlanLimits l = limits(100 * kMiB, 80 * kMiB);
  l.kept_cache = full_cache(before);
  const Plan after = make_plan(spec, l);
  EXPECT_LE(after.cache_bytes + after.staging_bytes(), 80 * kMiB);
  EXPECT_GE(found_bytes(after, l.kept_cache), 40 * kMiB);
  EXPECT_GE(found_bytes(after, l.kept_cache), after.host_home_bytes - after.chunk_bytes);
}

TEST(KeptCache, MemoryBehindTheLastPlaceIsGivenBack) {
  const ModelSpec spec = uniform_model(12, 4, kTensor);
  const Plan before = make_plan(spec, limits(32 * kMiB, 300 * kMiB));
  PlanLimits l = limits(300 * kMiB, 300 * kMiB);
  l.kept_cache = full_cache(before);
  const Plan after = make_plan(spec, l);
  EXPECT_EQ(after.device_home_bytes, after.model_bytes);
  EXPECT_EQ(after.cache_bytes, 0u);
}

// Random models and budgets, one after another: places never overlap unless they hold the same
// bytes, stay within segments and budget, and all bytes are covered.
TEST(KeptCache, PlacesNeverMeet) {
  int planned = 0;
  for (uint64_t seed = 0; seed < 300; ++seed) {
    SCOPED_TRACE(concat("seed ", seed));
    std::mt19937_64 random(seed);
    const ModelSpec spec = random_model(random, 2 * kMiB);
    PlanLimits l;
    for (int step = 0; step < 4; ++step) {
      l.device_bytes = random() % (80 * kMiB);
      l.host_bytes = random() % (80 * kMiB);
      Plan plan;
      try {
        plan = make_plan(spec, l);
      } catch (const InvalidArgument&) {
        continue;
      }
      ++planned;
      EXPECT_LE(plan.cache_bytes + plan.staging_bytes(), l.host_bytes);
      const KeptExtents extents(l.kept_cache.extents, plan.cache_bytes);
      std::vector<std::pair<uint64_t, uint64_t>> fresh, all;
      for (const Chunk& chunk : plan.chunks) {
        if (chunk.home != Home::kHost) continue;
        const uint64_t end = chunk.cache_offset + chunk.read_bytes;
        EXPECT_EQ(chunk.cache_offset % spec.shards[chunk.shard].alignment, 0u);
        EXPECT_LE(end, plan.cache_bytes);
        const auto segment = std::ranges::upper_bound(plan.cache_segments, chunk.cache_offset);
        ASSERT_NE(segment, plan.cache_segments.end());
        EXPECT_LE(end, *segment);
        const bool kept =
            extents.find(chunk.shard, chunk.read_offset, chunk.read_bytes) == chunk.cache_offset;
        all.emplace_back(chunk.cache_offset, end);
        if (!kept) fresh.emplace_back(chunk.cache_offset, end);
      }
      // A place that is read into meets no other.
      for (const auto& [begin, end] : fresh) {
        int meets = 0;
        for (const auto& [b, e] : all) meets += b < end && begin < e;
        EXPECT_EQ(meets, 1);
      }
      l.kept_cache = full_cache(plan);
      if (::testing::Test::HasFailure()) return;
    }
  }
  EXPECT_GT(planned, 300);
}

}  // namespace
}  // namespace wsm
