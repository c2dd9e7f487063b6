#include "plan/device_blocks.h"

#include <algorithm>

#include "plan/planner.h"
#include "util/align.h"

namespace wsm {
namespace {

constexpr uint64_t kSmallBlock = 1 * kMiB;
constexpr uint64_t kSmallSegment = 2 * kMiB;
constexpr uint64_t kLargeBlock = 10 * kMiB;
constexpr uint64_t kLargeSegment = 20 * kMiB;
constexpr uint64_t kRounding = 2 * kMiB;

}  // namespace

uint64_t device_block_bytes(uint64_t bytes) {
  if (bytes == 0) return 0;
  if (bytes <= kSmallBlock) return kSmallSegment;
  if (bytes < kLargeBlock) return kLargeSegment;
  return align_up(bytes, kRounding);
}

uint64_t block_request_bytes(uint64_t bytes, uint64_t limit) {
  const bool between = bytes > kSmallBlock && bytes < kLargeBlock;
  return between && limit >= kLargeBlock ? kLargeBlock : bytes;
}

uint64_t block_cost_bytes(uint64_t bytes, uint64_t limit) {
  return device_block_bytes(block_request_bytes(bytes, limit));
}

uint64_t largest_block_bytes(uint64_t room, uint64_t limit) {
  if (room < kSmallSegment) return 0;
  const uint64_t between = limit >= kLargeBlock ? kLargeBlock : kLargeSegment;
  if (room < between) return std::min(limit, kSmallBlock);
  return std::min(limit, align_down(room, kRounding));
}

}  // namespace wsm
