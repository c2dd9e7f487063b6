// Byte ranges made of a fuzzer's bytes. Cut into chunks, every byte is brought from its place to
// its target once. Read in blocks by reads that are short, interrupted or refused, a request ends
// with the bytes that it needs or with an error, and writes nowhere else.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "input.h"
#include "plan/chunks.h"
#include "storage/request_queue.h"
#include "support/plan_checks.h"
#include "support/temp_file.h"

namespace wsm::fuzzing {
namespace {

constexpr uint64_t kMostChunks = 16;
constexpr uint32_t kShardBytes = 20'000;

void cut(Input& in) {
  const uint32_t alignment = 1u << in.below(17);
  const uint64_t chunk_bytes = uint64_t{alignment} * (1 + in.below(64));
  std::vector<ShardSpec> shards(1 + in.below(3), ShardSpec{"s", 0, alignment});
  std::vector<PlannedExtent> extents(in.below(12));
  uint64_t target = 0;
  for (PlannedExtent& extent : extents) {
    target += in.once_in(3) ? in.byte() : 0;
    extent.shard = in.below(static_cast<uint32_t>(shards.size()));
    extent.unit = in.below(4);
    extent.offset = in.once_in(4) ? in.take<uint64_t>() >> 3 : in.small_size();
    extent.bytes = 1 + std::min(in.small_size(), kMostChunks * chunk_bytes);
    extent.target = target;
    target += extent.bytes;
    ShardSpec& shard = shards[extent.shard];
    shard.bytes = std::max(shard.bytes, extent.offset + extent.bytes);
  }
  if (in.once_in(2)) find_clusters(extents);
  Plan plan;
  cut_chunks(extents, shards, chunk_bytes, Home::kDisk, plan);
  for (const Chunk& chunk : plan.chunks) {
    EXPECT_EQ(chunk.read_offset % alignment, 0u);
    EXPECT_EQ(chunk.read_bytes % alignment, 0u);
    EXPECT_LE(chunk.read_bytes, chunk_bytes);
    EXPECT_LE(chunk.need_bytes, chunk.read_bytes);
    EXPECT_LE(chunk.read_offset + chunk.need_bytes, shards[chunk.shard].bytes);
  }
  testing::expect_moves_bring(
      extents, testing::moves_of(plan, 0, static_cast<uint32_t>(plan.chunks.size())));
}

// One read of the block: as it should be, or short, or none.
int64_t faulty_read(Input& in, BlockRead& block) {
  const uint8_t how = in.byte();
  if (how % 8 == 1) return -std::array{EINTR, EAGAIN, EIO, EINVAL, EOPNOTSUPP}[how / 8 % 5];
  if (how % 8 == 2) return 0;
  if (how % 8 > 4) return read_now(block);
  const uint64_t left = kShardBytes - std::min<uint64_t>(block.offset(), kShardBytes);
  const uint64_t got = std::min<uint64_t>({left, block.length(), uint64_t{1} + in.byte()});
  if (got > 0) std::memcpy(block.target(), block.shard().memory() + block.offset(), got);
  return static_cast<int64_t>(got);
}

void expect_done(const ReadRequest& request, const ReadCompletion& completion) {
  EXPECT_LE(completion.bytes, request.bytes);
  if (!completion.error.empty() || request.need_bytes == 0) return;
  EXPECT_LE(request.offset + request.need_bytes, kShardBytes);
  const std::span needed(request.target, request.need_bytes);
  EXPECT_EQ(testing::first_mismatch(needed, request.offset), needed.size());
}

void read(Input& in) {
  static const auto bytes = [] {
    std::vector<std::byte> pattern(kShardBytes);
    testing::fill_pattern(pattern, 0);
    return pattern;
  }();
  static const std::unique_ptr<Shard> shard =
      Shard::from_memory("memory", bytes.data(), bytes.size());
  ReaderOptions options;
  options.requests = 1 + in.below(4);
  options.block_bytes = in.once_in(16) ? in.take<uint32_t>() : 1 + in.below(1024);
  RequestQueue queue(options);
  std::vector<std::pair<ReadRequest, std::unique_ptr<std::byte[]>>> requests;
  for (uint32_t r = 0; r < options.requests; ++r) {
    ReadRequest request;
    request.shard = shard.get();
    request.offset = in.once_in(8) ? in.take<uint64_t>() >> 2 : in.below(kShardBytes);
    request.bytes = in.below(4096);
    request.need_bytes = in.once_in(16) ? in.take<uint32_t>() : in.below(request.bytes + 1);
    request.tag = r;
    auto target = std::make_unique<std::byte[]>(request.bytes + 1);  // ASan minds its ends
    request.target = target.get();
    EXPECT_TRUE(queue.add(request));
    requests.emplace_back(request, std::move(target));
  }
  for (BlockRead block; queue.next(&block);) {
    block.start();
    const uint64_t most_reads = (BlockRead::kMaxIdleReads + 2ull) * (block.length() + 1);
    uint64_t reads = 0;
    while (!block.advance(faulty_read(in, block))) EXPECT_LT(++reads, most_reads);
    queue.finish(block);
  }
  std::array<ReadCompletion, 4> done;
  const size_t count = queue.pop_done(done);
  EXPECT_EQ(count, requests.size());
  for (size_t i = 0; i < count; ++i) expect_done(requests[done[i].tag].first, done[i]);
}

}  // namespace
}  // namespace wsm::fuzzing

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  GTEST_FLAG_SET(break_on_failure, true);
  wsm::fuzzing::Input in(data, size);
  try {
    if (in.byte() % 2 == 0) {
      wsm::fuzzing::cut(in);
    } else {
      wsm::fuzzing::read(in);
    }
  } catch (const wsm::InvalidArgument&) {
    return 0;
  }
  return 0;
}
