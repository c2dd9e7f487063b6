#include "plan/home_blocks.h"

#include <gtest/gtest.h>

#include "plan/planner.h"

namespace wsm {
namespace {

TEST(HomeBlocks, SmallTensorsShareABlock) {
  HomeBlocks blocks;
  EXPECT_TRUE(blocks.add(80 * kMiB));
  EXPECT_FALSE(blocks.add(80 * kMiB));
  EXPECT_FALSE(blocks.add(100 * kMiB));  // closes it
  EXPECT_TRUE(blocks.add(256));
  EXPECT_EQ(blocks.bytes(), 260 * kMiB + 256);
  EXPECT_EQ(blocks.cost_bytes(), 260 * kMiB + device_block_bytes(256));
}

TEST(HomeBlocks, LargeTensorsHaveTheirOwn) {
  HomeBlocks blocks;
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(blocks.add(kHomeBlockBytes));
  EXPECT_EQ(blocks.cost_bytes(), 3 * kHomeBlockBytes);
  EXPECT_EQ(blocks.open_request_bytes(), 0u);
}

TEST(HomeBlocks, TheLastBlockIsAskedForAsItIsCheapest) {
  HomeBlocks blocks;
  blocks.add(3 * kMiB);
  EXPECT_EQ(blocks.open_request_bytes(), 10 * kMiB);
  HomeBlocks limited(5 * kMiB);
  limited.add(3 * kMiB);
  EXPECT_EQ(limited.open_request_bytes(), 3 * kMiB);
}

TEST(HomeBlocks, MoreNeverCostsLess) {
  HomeBlocks blocks;
  uint64_t before = 0;
  for (uint64_t i = 0; i < 500; ++i) {
    blocks.add(256 * (1 + i * 7919 % 40000));
    EXPECT_GE(blocks.cost_bytes(), before);
    EXPECT_GE(blocks.cost_bytes(), blocks.bytes());
    before = blocks.cost_bytes();
  }
}

}  // namespace
}  // namespace wsm
