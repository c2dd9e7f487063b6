#include "memory/host_cache.h"

#include <gtest/gtest.h>

#include <condition_variable>
#include <cstring>
#include <mutex>

#include "util/check.h"

namespace wsm {
namespace {

constexpr uint32_t kChunkBytes = 64 << 10;

// Chunks 0 and 2 live in the cache, chunk 1 on the disk.
Plan small_plan() {
  Plan plan;
  plan.chunks.resize(3);
  for (Chunk& chunk : plan.chunks) chunk.read_bytes = kChunkBytes;
  plan.chunks[0].home = Home::kHost;
  plan.chunks[2].home = Home::kHost;
  plan.chunks[2].cache_offset = kChunkBytes;
  plan.cache_bytes = 2 * kChunkBytes;
  plan.cache_segments = {kChunkBytes, 2 * kChunkBytes};
  return plan;
}

TEST(HostCache, ChunksKeepTheirBytesInTheirPlaces) {
  const auto device = make_host_device();
  const Plan plan = small_plan();
  HostCache cache(*device, plan, [] {});
  const std::byte* const begin = cache.data(plan.chunks[0]);
  EXPECT_EQ(cache.data(plan.chunks[2]), begin + kChunkBytes);
  std::memset(cache.data(plan.chunks[0]), 1, kChunkBytes);
  std::memset(cache.data(plan.chunks[2]), 2, kChunkBytes);
  EXPECT_EQ(begin[kChunkBytes - 1], std::byte{1});
  EXPECT_EQ(begin[2 * kChunkBytes - 1], std::byte{2});
}

TEST(HostCache, TakesThePlansBytes) {
  const auto device = make_host_device();
  EXPECT_EQ(HostCache(*device, small_plan(), [] {}).mapped_bytes(), 2 * kChunkBytes);
}

TEST(HostCache, RegistersThePlansSegments) {
  const auto device = make_host_device();
  Plan plan = small_plan();
  plan.cache_segments = {kChunkBytes};
  EXPECT_THROW(HostCache(*device, plan, [] {}), InvalidArgument) << "they do not cover the cache";
}

TEST(HostCache, FilledIsRememberedByChunk) {
  const auto device = make_host_device();
  HostCache cache(*device, small_plan(), [] {});
  for (uint32_t chunk : {0u, 1u, 2u}) EXPECT_FALSE(cache.filled(chunk));
  cache.mark_filled(2);
  EXPECT_FALSE(cache.filled(0));
  EXPECT_TRUE(cache.filled(2));
}

TEST(HostCache, MemoryIsPreparedAsItIsAskedFor) {
  const auto device = make_host_device();
  Plan plan;
  constexpr uint32_t kChunks = 8;
  plan.chunks.resize(kChunks);
  for (uint32_t i = 0; i < kChunks; ++i) {
    plan.chunks[i].home = Home::kHost;
    plan.chunks[i].read_bytes = kSegmentBytes;
    plan.chunks[i].cache_offset = i * kSegmentBytes;
    plan.cache_segments.push_back((i + 1) * kSegmentBytes);
  }
  plan.cache_bytes = kChunks * kSegmentBytes;
  std::mutex mutex;
  std::condition_variable changed;
  uint32_t prepared = 0;
  HostCache cache(*device, plan, [&] {
    std::lock_guard lock(mutex);
    ++prepared;
    changed.notify_all();
  });
  EXPECT_EQ(cache.prepared_bytes(), 0u);
  while (!cache.ready(plan.chunks[0])) {
    std::unique_lock lock(mutex);
    changed.wait_for(lock, std::chrono::milliseconds(10));
  }
  {
    // The segment asked for and two ahead, and no more.
    std::unique_lock lock(mutex);
    ASSERT_TRUE(changed.wait_for(lock, std::chrono::seconds(60), [&] { return prepared == 3; }));
  }
  EXPECT_EQ(cache.prepared_bytes(), 3 * kSegmentBytes);
  EXPECT_EQ(cache.pinned_bytes(), 3 * kSegmentBytes);
  EXPECT_TRUE(cache.ready(plan.chunks[2]));
  EXPECT_FALSE(cache.ready(plan.chunks[7]));
}

TEST(HostCache, PlanWithoutACacheTakesNothing) {
  const auto device = make_host_device();
  Plan plan = small_plan();
  plan.cache_bytes = 0;
  plan.cache_segments.clear();
  EXPECT_EQ(HostCache(*device, plan, [] {}).mapped_bytes(), 0u);
}

}  // namespace
}  // namespace wsm
