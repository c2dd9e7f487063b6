#include "memory/host_cache.h"

#include <gtest/gtest.h>

#include <cstring>

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
  HostCache cache(*device, plan);
  EXPECT_EQ(cache.place(plan.chunks[0]), cache.buffer().data());
  EXPECT_EQ(cache.place(plan.chunks[2]), cache.buffer().data() + kChunkBytes);
  std::memset(cache.place(plan.chunks[0]), 1, kChunkBytes);
  std::memset(cache.place(plan.chunks[2]), 2, kChunkBytes);
  EXPECT_EQ(cache.buffer().data()[kChunkBytes - 1], std::byte{1});
  EXPECT_EQ(cache.buffer().data()[2 * kChunkBytes - 1], std::byte{2});
}

TEST(HostCache, TakesThePlansBytes) {
  const auto device = make_host_device();
  EXPECT_EQ(HostCache(*device, small_plan()).buffer().mapped_bytes(), 2 * kChunkBytes);
}

TEST(HostCache, RegistersThePlansSegments) {
  const auto device = make_host_device();
  Plan plan = small_plan();
  plan.cache_segments = {kChunkBytes};
  EXPECT_THROW(HostCache(*device, plan), InvalidArgument) << "they do not cover the cache";
}

TEST(HostCache, FilledIsRememberedByChunk) {
  const auto device = make_host_device();
  HostCache cache(*device, small_plan());
  for (uint32_t chunk : {0u, 1u, 2u}) EXPECT_FALSE(cache.filled(chunk));
  cache.mark_filled(2);
  EXPECT_FALSE(cache.filled(0));
  EXPECT_TRUE(cache.filled(2));
}

TEST(HostCache, PlanWithoutACacheTakesNothing) {
  const auto device = make_host_device();
  Plan plan = small_plan();
  plan.cache_bytes = 0;
  plan.cache_segments.clear();
  EXPECT_EQ(HostCache(*device, plan).buffer().mapped_bytes(), 0u);
}

}  // namespace
}  // namespace wsm
