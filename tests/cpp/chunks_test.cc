#include "plan/chunks.h"

#include <gtest/gtest.h>

#include <random>

#include "support/plan_checks.h"
#include "util/align.h"
#include "util/check.h"

namespace wsm {
namespace {

constexpr uint64_t kChunk = 64 * kKiB;

Plan cut(const std::vector<PlannedExtent>& extents, uint32_t alignment = 4096,
         uint64_t chunk = kChunk) {
  Plan plan;
  const std::vector<ShardSpec> shards(4, {"s", 1ull << 40, alignment});
  cut_chunks(extents, shards, chunk, Home::kDisk, plan);
  return plan;
}

TEST(Chunks, NothingGivesNothing) { EXPECT_TRUE(cut({}).chunks.empty()); }

TEST(Chunks, ReadsTheAlignedSuperset) {
  const Plan plan = cut({{.offset = 5000, .bytes = 1000, .target = 256}});
  ASSERT_EQ(plan.chunks.size(), 1u);
  EXPECT_EQ(plan.chunks[0].read_offset, 4096u);
  EXPECT_EQ(plan.chunks[0].read_bytes, 4096u);
  EXPECT_EQ(plan.chunks[0].need_bytes, 1904u);
  EXPECT_EQ(plan.chunks[0].payload_bytes, 1000u);
  ASSERT_EQ(plan.copies.size(), 1u);
  EXPECT_EQ(plan.copies[0].source_offset, 904u);
  EXPECT_EQ(plan.copies[0].target_offset, 256u);
  EXPECT_EQ(plan.copies[0].bytes, 1000u);
}

TEST(Chunks, MemoryIsReadAsItLies) {
  const Plan plan = cut({{.offset = 5001, .bytes = 1001}}, 1);
  ASSERT_EQ(plan.chunks.size(), 1u);
  EXPECT_EQ(plan.chunks[0].read_offset, 5001u);
  EXPECT_EQ(plan.chunks[0].read_bytes, 1001u);
}

TEST(Chunks, ImagesThatShareTheirBytesAddUp) {
  constexpr uint64_t kImages = 1100, kBytes = 4 * kMiB;
  std::vector<PlannedExtent> extents;
  for (uint64_t i = 0; i < kImages; ++i) extents.push_back({.bytes = kBytes, .target = i * kBytes});
  const Plan plan = cut(extents, 4096, kBytes);
  ASSERT_EQ(plan.chunks.size(), 1u);
  EXPECT_EQ(plan.chunks[0].read_bytes, kBytes);
  EXPECT_EQ(plan.chunks[0].payload_bytes, kImages * kBytes);
}

TEST(Chunks, NeighboursBecomeOneCopy) {
  const Plan plan =
      cut({{.offset = 4352, .bytes = 256, .target = 256}, {.offset = 4096, .bytes = 256}});
  ASSERT_EQ(plan.copies.size(), 1u);
  EXPECT_EQ(plan.copies[0].bytes, 512u);
}

TEST(Chunks, PaddingInDeviceMemoryTakesTwoCopies) {
  const Plan plan =
      cut({{.offset = 4096, .bytes = 100}, {.offset = 4196, .bytes = 256, .target = 256}});
  ASSERT_EQ(plan.chunks.size(), 1u);
  ASSERT_EQ(plan.copies.size(), 2u);
  EXPECT_EQ(plan.copies[1].source_offset, 100u);
}

// Below one chunk, exactly one, one byte over, many.
TEST(Chunks, SizesAroundAChunk) {
  const auto sizes = [](uint64_t offset, uint64_t bytes) {
    std::vector<uint64_t> sizes;
    for (const Chunk& chunk : cut({{.offset = offset, .bytes = bytes}}).chunks) {
      sizes.push_back(chunk.payload_bytes);
    }
    return sizes;
  };
  EXPECT_EQ(sizes(0, kChunk - 1), (std::vector<uint64_t>{kChunk - 1}));
  EXPECT_EQ(sizes(0, kChunk), (std::vector<uint64_t>{kChunk}));
  EXPECT_EQ(sizes(0, kChunk + 1), (std::vector<uint64_t>{kChunk, 1}));
  EXPECT_EQ(sizes(1, kChunk), (std::vector<uint64_t>{kChunk - 1, 1}));
  EXPECT_EQ(sizes(4097, 3 * kChunk), (std::vector<uint64_t>{kChunk - 1, kChunk, kChunk, 1}));
}

TEST(Chunks, CutsReadNothingTwice) {
  const Plan plan = cut({{.offset = 4097, .bytes = 10 * kChunk}});
  for (size_t c = 1; c < plan.chunks.size(); ++c) {
    const Chunk& before = plan.chunks[c - 1];
    EXPECT_EQ(before.read_offset + before.read_bytes, plan.chunks[c].read_offset);
  }
}

// So what a cache holds of one plan is cut as another plan wants it.
TEST(Chunks, AreCutAlikeWhateverElseIsStreamed) {
  std::vector<PlannedExtent> both = {
      {.offset = 5000, .bytes = kChunk + 10000},
      {.offset = 15000 + kChunk, .bytes = 3 * kChunk, .target = 2 * kChunk}};
  find_clusters(both);
  const std::vector<Chunk> all = cut(both).chunks;
  const std::vector<Chunk> second = cut({both[1]}).chunks;
  ASSERT_EQ(all.size(), 5u);
  ASSERT_EQ(second.size(), 4u);
  EXPECT_GT(second[0].read_offset, all[1].read_offset);
  for (size_t i = 0; i < second.size(); ++i) {
    if (i > 0) {
      EXPECT_EQ(second[i].read_offset, all[i + 1].read_offset);
    }
    EXPECT_EQ(second[i].read_offset + second[i].read_bytes,
              all[i + 1].read_offset + all[i + 1].read_bytes);
  }
}

TEST(Chunks, StretchesEndAtLargeGapsAndAtShards) {
  std::vector<PlannedExtent> extents = {{.shard = 1, .offset = 30, .bytes = 10},
                                        {.offset = 50 + kMaxReadGap + 1, .bytes = 10},
                                        {.offset = 20, .bytes = 30},
                                        {.offset = 25, .bytes = 5}};
  find_clusters(extents);
  EXPECT_EQ(extents[0].cluster_begin, 20u);
  EXPECT_EQ(extents[1].cluster_begin, 20u);
  EXPECT_EQ(extents[2].cluster_begin, 50 + kMaxReadGap + 1);
  EXPECT_EQ(extents[3].cluster_begin, 30u);
}

TEST(Chunks, SmallGapsAreReadLargeOnesAreNot) {
  const uint64_t chunk = 16 * kMiB;
  const auto count = [&](uint64_t gap) {
    return cut({{.offset = 0, .bytes = 10}, {.offset = 10 + gap, .bytes = 10, .target = 256}}, 1,
               chunk)
        .chunks.size();
  };
  EXPECT_EQ(count(kMaxReadGap), 1u);
  EXPECT_EQ(count(kMaxReadGap + 1), 2u);
}

TEST(Chunks, ShardsAreReadApart) {
  const Plan plan = cut({{.shard = 1, .offset = 0, .bytes = 10},
                         {.shard = 0, .offset = 0, .bytes = 10, .target = 256}});
  ASSERT_EQ(plan.chunks.size(), 2u);
  EXPECT_EQ(plan.chunks[0].shard, 0u);
  EXPECT_EQ(plan.chunks[1].shard, 1u);
}

TEST(Chunks, BelongToTheFirstUnit) {
  const Plan plan = cut({{.unit = 7, .offset = 0, .bytes = 10},
                         {.unit = 3, .offset = 10, .bytes = 10, .target = 256}});
  ASSERT_EQ(plan.chunks.size(), 1u);
  EXPECT_EQ(plan.chunks[0].unit, 3u);
}

TEST(Chunks, TheSameBytesMayBeWantedTwice) {
  const Plan plan = cut({{.offset = 0, .bytes = 2 * kChunk},
                         {.offset = 100, .bytes = 2 * kChunk, .target = 4 * kChunk}});
  ASSERT_EQ(plan.chunks.size(), 3u);
  EXPECT_EQ(plan.chunks[0].payload_bytes, 2 * kChunk - 100);
  EXPECT_EQ(plan.chunks[1].payload_bytes, 2 * kChunk);
  EXPECT_EQ(plan.chunks[2].payload_bytes, 100u);
  EXPECT_EQ(plan.chunks[2].read_bytes, 4096u);
}

TEST(Chunks, BringEveryByteOnce) {
  for (uint64_t seed = 0; seed < 2000; ++seed) {
    SCOPED_TRACE(concat("seed ", seed));
    std::mt19937_64 random(seed);
    std::vector<PlannedExtent> extents(random() % 20);
    uint64_t target = 0;
    for (PlannedExtent& extent : extents) {
      target += random() % 2 == 0 ? 0 : random() % 300;
      extent = {.shard = static_cast<uint32_t>(random() % 3),
                .unit = static_cast<uint32_t>(random() % 5),
                .offset = random() % (20 * kChunk),
                .bytes = 1 + random() % (random() % 2 == 0 ? 300 : 3 * kChunk),
                .target = target};
      target += extent.bytes;
    }
    const uint32_t alignment = 1u << random() % 16;
    const Plan plan = cut(extents, alignment, 2 * kChunk);
    for (const Chunk& chunk : plan.chunks) {
      EXPECT_EQ(chunk.read_offset % alignment, 0u);
      EXPECT_EQ(chunk.read_bytes % alignment, 0u);
      EXPECT_LE(chunk.read_bytes, 2 * kChunk);
      EXPECT_LE(chunk.need_bytes, chunk.read_bytes);
    }
    const auto chunks = static_cast<uint32_t>(plan.chunks.size());
    testing::expect_moves_bring(extents, testing::moves_of(plan, 0, chunks));
    if (::testing::Test::HasFailure()) break;
  }
}

}  // namespace
}  // namespace wsm
