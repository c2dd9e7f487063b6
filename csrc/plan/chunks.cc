#include "plan/chunks.h"

#include <algorithm>
#include <tuple>

#include "util/align.h"

namespace wsm {
namespace {

// Fills one chunk: takes extents in order of their offsets, for as long as they are near and it
// has room.
class ChunkBuilder {
 public:
  ChunkBuilder(const PlannedExtent& first, uint32_t alignment, uint64_t chunk_bytes, Home home,
               Plan& plan)
      : plan_(plan), alignment_(alignment) {
    chunk_.unit = first.unit;
    chunk_.shard = first.shard;
    chunk_.read_offset = align_down(first.offset, alignment);
    chunk_.home = home;
    chunk_.first_copy = static_cast<uint32_t>(plan.copies.size());
    const uint64_t cluster_begin =
        align_down(std::min(first.cluster_begin, first.offset), alignment);
    limit_ = cluster_begin + align_down(first.offset - cluster_begin, chunk_bytes) + chunk_bytes;
    end_ = first.offset;
  }

  bool wants(const PlannedExtent& extent) const {
    return extent.shard == chunk_.shard && extent.offset < limit_ &&
           extent.offset <= end_ + kMaxReadGap;
  }

  // Returns what is left for the next chunk: 0 bytes when all was taken.
  PlannedExtent add(PlannedExtent extent) {
    const uint64_t bytes = std::min(extent.bytes, limit_ - extent.offset);
    append_copy(extent.offset - chunk_.read_offset, extent.target, bytes);
    chunk_.unit = std::min(chunk_.unit, extent.unit);
    chunk_.payload_bytes += bytes;
    end_ = std::max(end_, extent.offset + bytes);
    extent.offset += bytes;
    extent.target += bytes;
    extent.bytes -= bytes;
    return extent;
  }

  void finish() {
    chunk_.need_bytes = static_cast<uint32_t>(end_ - chunk_.read_offset);
    chunk_.read_bytes = static_cast<uint32_t>(align_up(end_, alignment_) - chunk_.read_offset);
    chunk_.copy_count = static_cast<uint32_t>(plan_.copies.size()) - chunk_.first_copy;
    plan_.chunks.push_back(chunk_);
  }

 private:
  void append_copy(uint64_t source, uint64_t target, uint64_t bytes) {
    if (plan_.copies.size() > chunk_.first_copy) {
      Copy& last = plan_.copies.back();
      if (last.source_offset + last.bytes == source && last.target_offset + last.bytes == target) {
        last.bytes += static_cast<uint32_t>(bytes);
        return;
      }
    }
    plan_.copies.push_back({.source_offset = static_cast<uint32_t>(source),
                            .target_offset = target,
                            .bytes = static_cast<uint32_t>(bytes)});
  }

  Plan& plan_;
  const uint32_t alignment_;
  Chunk chunk_;
  uint64_t limit_ = 0;  // a shard offset: the chunk ends there at the latest
  uint64_t end_ = 0;    // a shard offset: what was taken ends there
};

bool in_shard_order(const PlannedExtent& a, const PlannedExtent& b) {
  return std::tie(a.shard, a.offset, a.target) < std::tie(b.shard, b.offset, b.target);
}

}  // namespace

void append_extents(const TensorSpec& tensor, uint32_t unit, uint64_t target,
                    std::vector<PlannedExtent>& extents) {
  for (const Extent& extent : tensor.extents) {
    if (extent.bytes == 0) continue;
    extents.push_back({.shard = extent.shard,
                       .unit = unit,
                       .offset = extent.offset,
                       .bytes = extent.bytes,
                       .target = target + extent.tensor_offset});
  }
}

void find_clusters(std::vector<PlannedExtent>& extents) {
  std::sort(extents.begin(), extents.end(), in_shard_order);
  uint64_t begin = 0;
  uint64_t end = 0;
  for (size_t i = 0; i < extents.size(); ++i) {
    PlannedExtent& extent = extents[i];
    const bool same_shard = i > 0 && extents[i - 1].shard == extent.shard;
    if (!same_shard || extent.offset > end + kMaxReadGap) begin = end = extent.offset;
    extent.cluster_begin = begin;
    end = std::max(end, extent.offset + extent.bytes);
  }
}

void cut_chunks(std::vector<PlannedExtent> extents, const std::vector<ShardSpec>& shards,
                uint64_t chunk_bytes, Home home, Plan& plan) {
  std::sort(extents.begin(), extents.end(), in_shard_order);
  std::vector<PlannedExtent> cut;  // rests of what the last chunk could not hold, from its end on
  std::vector<PlannedExtent> rest;
  for (size_t next = 0; next < extents.size() || !cut.empty();) {
    const PlannedExtent first = cut.empty() ? extents[next] : cut.front();
    ChunkBuilder chunk(first, shards[first.shard].alignment, chunk_bytes, home, plan);
    const auto take = [&](const PlannedExtent& extent) {
      const PlannedExtent left = chunk.add(extent);
      if (left.bytes > 0) rest.push_back(left);
    };
    for (const PlannedExtent& extent : cut) take(extent);
    while (next < extents.size() && chunk.wants(extents[next])) take(extents[next++]);
    chunk.finish();
    cut.swap(rest);
    rest.clear();
  }
}

}  // namespace wsm
