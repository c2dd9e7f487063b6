#include "plan/kept_cache.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>

#include "plan/spread.h"
#include "util/align.h"

namespace wsm {
namespace {

bool in_order(const CachedExtent& a, const CachedExtent& b) {
  return std::tie(a.shard, a.offset) < std::tie(b.shard, b.offset);
}

struct Gap {
  uint64_t begin = 0;
  uint64_t end = 0;
};

// Memory between the places that are taken, and room behind the last segment.
class Room {
 public:
  Room(std::vector<uint64_t> segments, std::vector<Gap> taken, uint64_t most)
      : segments_(std::move(segments)), most_(most) {
    std::sort(taken.begin(), taken.end(),
              [](const Gap& a, const Gap& b) { return a.begin < b.begin; });
    size_t next = 0;
    uint64_t begin = 0;
    for (const uint64_t segment_end : segments_) {
      for (; next < taken.size() && taken[next].begin < segment_end; ++next) {
        if (taken[next].begin > begin) gaps_.push_back({begin, taken[next].begin});
        begin = std::max(begin, taken[next].end);
      }
      if (segment_end > begin) gaps_.push_back({begin, segment_end});
      begin = std::max(begin, segment_end);
    }
    end_ = segment_begin_ = segments_.empty() ? 0 : segments_.back();
    for (const Gap& place : taken) used_end_ = std::max(used_end_, place.end);
  }

  // Where `bytes` may lie, which are then taken.
  std::optional<uint64_t> acquire(uint64_t bytes) {
    // Room only shrinks, and there are as many chunks as gaps: not all gaps for each.
    if (bytes >= refused_bytes_) return std::nullopt;
    while (first_gap_ < gaps_.size() && gaps_[first_gap_].begin == gaps_[first_gap_].end) {
      ++first_gap_;
    }
    for (size_t i = first_gap_; i < gaps_.size(); ++i) {
      Gap& gap = gaps_[i];
      if (gap.end - gap.begin < bytes) continue;
      const uint64_t begin = std::exchange(gap.begin, gap.begin + bytes);
      used_end_ = std::max(used_end_, gap.begin);
      return begin;
    }
    if (bytes > most_ - std::min(most_, end_)) {
      refused_bytes_ = bytes;
      return std::nullopt;
    }
    if (end_ + bytes - segment_begin_ > kSegmentBytes) {
      segments_.push_back(end_);
      segment_begin_ = end_;
    }
    used_end_ = end_ + bytes;
    return std::exchange(end_, end_ + bytes);
  }

  // Ends of the segments, the last where the last place ends: memory behind it is given back.
  std::vector<uint64_t> segments() && {
    if (end_ > segment_begin_) segments_.push_back(end_);
    while (!segments_.empty() && segments_.back() > used_end_) {
      const uint64_t begin = segments_.size() > 1 ? segments_[segments_.size() - 2] : 0;
      if (begin < used_end_) {
        segments_.back() = used_end_;
      } else {
        segments_.pop_back();
      }
    }
    return std::move(segments_);
  }

 private:
  std::vector<uint64_t> segments_;
  const uint64_t most_;
  std::vector<Gap> gaps_;
  size_t first_gap_ = 0;                 // none before it has room
  uint64_t refused_bytes_ = UINT64_MAX;  // there was no room for so many
  uint64_t segment_begin_ = 0;           // of the one that grows
  uint64_t end_ = 0;
  uint64_t used_end_ = 0;
};

// The segments up to `end`; one that reaches beyond it ends there.
std::vector<uint64_t> clipped(const std::vector<uint64_t>& segments, uint64_t end) {
  std::vector<uint64_t> ends;
  for (const uint64_t segment : segments) {
    if (end == 0 || (!ends.empty() && ends.back() == end)) break;
    ends.push_back(std::min(segment, end));
  }
  return ends;
}

void put(Chunk& chunk, uint64_t cache_offset) {
  chunk.home = Home::kHost;
  chunk.cache_offset = cache_offset;
}

}  // namespace

KeptExtents::KeptExtents(std::vector<CachedExtent> extents, uint64_t end)
    : extents_(std::move(extents)) {
  std::erase_if(extents_, [&](const CachedExtent& r) { return r.cache_offset + r.bytes > end; });
  std::sort(extents_.begin(), extents_.end(), in_order);
}

uint64_t KeptExtents::find(uint32_t shard, uint64_t offset, uint64_t bytes) const {
  const CachedExtent wanted{.shard = shard, .offset = offset};
  auto after = std::upper_bound(extents_.begin(), extents_.end(), wanted, in_order);
  if (after == extents_.begin()) return UINT64_MAX;
  const CachedExtent& range = *--after;
  if (range.shard != shard || offset + bytes > range.offset + range.bytes) return UINT64_MAX;
  return range.cache_offset + (offset - range.offset);
}

void cache_around_kept(const KeptCache& kept, const std::vector<Chunk*>& chunks,
                       uint64_t most_bytes, uint64_t granule, Plan& plan) {
  const uint64_t most = align_down(most_bytes, granule);
  const std::vector<uint64_t> segments = clipped(kept.segments, most);
  const KeptExtents extents(kept.extents, segments.empty() ? 0 : segments.back());
  std::vector<Gap> taken;
  for (Chunk* chunk : chunks) {
    const uint64_t place = extents.find(chunk->shard, chunk->read_offset, chunk->read_bytes);
    if (place == UINT64_MAX) continue;
    put(*chunk, place);
    taken.push_back({align_down(place, granule), align_up(place + chunk->read_bytes, granule)});
  }
  uint64_t kept_bytes = 0;
  for (const Gap& place : taken) kept_bytes += place.end - place.begin;
  Room room(segments, std::move(taken), most);
  const uint64_t free_bytes = most - std::min(most, kept_bytes);
  spread_evenly(chunks, free_bytes, granule, [&](Chunk& chunk, uint64_t bytes) {
    const auto place = room.acquire(bytes);
    if (place) put(chunk, *place);
    return place.has_value();
  });
  plan.cache_segments = std::move(room).segments();
  plan.cache_bytes = plan.cache_segments.empty() ? 0 : plan.cache_segments.back();
}

}  // namespace wsm
