#include "plan/chunks.h"

#include <algorithm>
#include <tuple>

#include "util/align.h"

namespace wsm {
namespace {

// Fills one chunk: takes fragments in order of their offsets, for as long as they are near and it
// has room.
class ChunkBuilder {
 public:
  ChunkBuilder(const Fragment& first, uint32_t alignment, uint64_t chunk_bytes, Home home,
               Plan& plan)
      : plan_(plan), alignment_(alignment) {
    chunk_.unit = first.unit;
    chunk_.shard = first.shard;
    chunk_.read_offset = align_down(first.offset, alignment);
    chunk_.home = home;
    chunk_.first_copy = static_cast<uint32_t>(plan.copies.size());
    const uint64_t stretch = align_down(std::min(first.stretch, first.offset), alignment);
    limit_ = stretch + align_down(first.offset - stretch, chunk_bytes) + chunk_bytes;
    end_ = first.offset;
  }

  bool wants(const Fragment& fragment) const {
    return fragment.shard == chunk_.shard && fragment.offset < limit_ &&
           fragment.offset <= end_ + kMaxReadGap;
  }

  // Returns what is left for the next chunk: 0 bytes when all was taken.
  Fragment take(Fragment fragment) {
    const uint64_t bytes = std::min(fragment.bytes, limit_ - fragment.offset);
    append_copy(fragment.offset - chunk_.read_offset, fragment.target, bytes);
    chunk_.unit = std::min(chunk_.unit, fragment.unit);
    chunk_.payload_bytes += static_cast<uint32_t>(bytes);
    end_ = std::max(end_, fragment.offset + bytes);
    fragment.offset += bytes;
    fragment.target += bytes;
    fragment.bytes -= bytes;
    return fragment;
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

bool in_shard_order(const Fragment& a, const Fragment& b) {
  return std::tie(a.shard, a.offset, a.target) < std::tie(b.shard, b.offset, b.target);
}

}  // namespace

void append_fragments(const TensorSpec& tensor, uint32_t unit, uint64_t target,
                      std::vector<Fragment>& fragments) {
  for (const Extent& extent : tensor.extents) {
    if (extent.bytes == 0) continue;
    fragments.push_back({.shard = extent.shard,
                         .unit = unit,
                         .offset = extent.offset,
                         .bytes = extent.bytes,
                         .target = target + extent.tensor_offset});
  }
}

void find_stretches(std::vector<Fragment>& fragments) {
  std::sort(fragments.begin(), fragments.end(), in_shard_order);
  uint64_t begin = 0;
  uint64_t end = 0;
  for (size_t i = 0; i < fragments.size(); ++i) {
    Fragment& fragment = fragments[i];
    const bool same_shard = i > 0 && fragments[i - 1].shard == fragment.shard;
    if (!same_shard || fragment.offset > end + kMaxReadGap) begin = end = fragment.offset;
    fragment.stretch = begin;
    end = std::max(end, fragment.offset + fragment.bytes);
  }
}

void cut_chunks(std::vector<Fragment> fragments, const std::vector<ShardSpec>& shards,
                uint64_t chunk_bytes, Home home, Plan& plan) {
  std::sort(fragments.begin(), fragments.end(), in_shard_order);
  std::vector<Fragment> cut;  // rests of what the last chunk could not hold, from its end on
  std::vector<Fragment> rest;
  for (size_t next = 0; next < fragments.size() || !cut.empty();) {
    const Fragment first = cut.empty() ? fragments[next] : cut.front();
    ChunkBuilder chunk(first, shards[first.shard].alignment, chunk_bytes, home, plan);
    const auto take = [&](const Fragment& fragment) {
      const Fragment left = chunk.take(fragment);
      if (left.bytes > 0) rest.push_back(left);
    };
    for (const Fragment& fragment : cut) take(fragment);
    while (next < fragments.size() && chunk.wants(fragments[next])) take(fragments[next++]);
    chunk.finish();
    cut.swap(rest);
    rest.clear();
  }
}

}  // namespace wsm
