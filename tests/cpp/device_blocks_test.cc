#include "plan/device_blocks.h"

#include <gtest/gtest.h>

#include "plan/planner.h"
#include "util/align.h"

namespace wsm {
namespace {

TEST(DeviceBlocks, AreCountedAsTheAllocatorTakesThem) {
  EXPECT_EQ(device_block_bytes(0), 0u);
  EXPECT_EQ(device_block_bytes(1), 2 * kMiB);
  EXPECT_EQ(device_block_bytes(kMiB), 2 * kMiB);
  EXPECT_EQ(device_block_bytes(kMiB + 1), 20 * kMiB);
  EXPECT_EQ(device_block_bytes(10 * kMiB - 1), 20 * kMiB);
  EXPECT_EQ(device_block_bytes(10 * kMiB), 10 * kMiB);
  EXPECT_EQ(device_block_bytes(10 * kMiB + 1), 12 * kMiB);
  EXPECT_EQ(device_block_bytes(12 * kMiB), 12 * kMiB);
}

TEST(DeviceBlocks, TenMiBAreAskedForWhereThatIsCheaper) {
  EXPECT_EQ(block_request_bytes(kMiB, UINT64_MAX), kMiB);
  EXPECT_EQ(block_request_bytes(kMiB + 1, UINT64_MAX), 10 * kMiB);
  EXPECT_EQ(block_request_bytes(11 * kMiB, UINT64_MAX), 11 * kMiB);
  EXPECT_EQ(block_request_bytes(5 * kMiB, 6 * kMiB), 5 * kMiB);
}

TEST(DeviceBlocks, LargestBlockIsTheLargest) {
  for (const uint64_t limit :
       {uint64_t{0}, 300 * kKiB, 5 * kMiB, 10 * kMiB, 25 * kMiB, UINT64_MAX}) {
    for (uint64_t room = 0; room < 50 * kMiB; room += 512 * kKiB) {
      const uint64_t largest = largest_block_bytes(room, limit);
      EXPECT_LE(largest, limit);
      EXPECT_LE(block_cost_bytes(largest, limit), room);
      if (largest == limit) continue;
      EXPECT_GT(block_cost_bytes(largest + 1, limit), room) << room << " within " << limit;
    }
  }
}

}  // namespace
}  // namespace wsm
