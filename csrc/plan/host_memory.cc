#include "plan/host_memory.h"

#include <unistd.h>

#include <algorithm>
#include <span>

#include "plan/kept_cache.h"
#include "plan/spread.h"
#include "util/align.h"
#include "util/check.h"

namespace wsm {
namespace {

// Of what lies in memory: larger, as sixteen threads take turns at 1 MiB (an H100's host: 47 GB/s,
// against 38 by 1 MiB and 34 by 16 MiB).
constexpr uint64_t kMemoryChunk = 4 * kMiB;
// A larger model has larger chunks: each costs the planner a microsecond or two.
constexpr uint64_t kMostChunks = 1 << 18;
constexpr uint64_t kLeastChunk = 64 * kKiB;
constexpr uint64_t kLeastSlots = 2;  // one of them is kept for demands
constexpr uint64_t kUsualSlots = 4;  // keeps the disk and the link busy at once
constexpr uint64_t kAmpleSlots = 32;
constexpr uint64_t kMostStagingBytes = 1024 * kMiB;

uint64_t least_chunk_bytes(const ModelSpec& spec) {
  uint64_t least = kLeastChunk;
  for (const ShardSpec& shard : spec.shards)
    least = std::max<uint64_t>(least, 2ull * shard.alignment);
  return least;
}

// What the ring may take, as far as chunks are sized by it.
uint64_t staging_room(const PlanLimits& limits, uint64_t least_staging,
                      std::vector<std::string>& warnings) {
  if (!limits.staging_bytes) return limits.host_bytes;
  const uint64_t room = std::clamp(*limits.staging_bytes, least_staging, limits.host_bytes);
  if (room != *limits.staging_bytes) {
    warnings.push_back(concat("staging_bytes = ", *limits.staging_bytes,
                              ": the ring takes between ", least_staging,
                              " and host_bytes = ", limits.host_bytes, "; ", room, " is used"));
  }
  return room;
}

uint64_t asked_chunk_bytes(uint64_t asked, uint64_t least, uint64_t room, uint64_t granule,
                           std::vector<std::string>& warnings) {
  uint64_t chunk = align_down(std::clamp(asked, least, kSegmentBytes), granule);
  while (chunk > least && chunk > room / kLeastSlots) {
    chunk = std::max(least, align_down(chunk / 2, granule));
  }
  const bool rounded_only = chunk <= asked && asked - chunk < granule;
  if (!rounded_only) {
    warnings.push_back(concat("chunk_bytes = ", asked, ": a chunk takes between ", least, " and ",
                              kSegmentBytes, ", and two must fit in the ring; ", chunk,
                              " is used"));
  }
  return chunk;
}

uint64_t padded_bytes(const Chunk& chunk, uint64_t granule) {
  return align_up(chunk.read_bytes, granule);
}

std::span<Chunk> streamed(Plan& plan) {
  return std::span(plan.chunks).first(plan.first_resident_chunk);
}

// What the cache may keep: a unit that is alone in its place is read once, and needs no cache.
std::vector<Chunk*> cacheable(Plan& plan) {
  std::vector<Chunk*> chunks;
  for (Chunk& chunk : streamed(plan)) {
    if (!plan.units[chunk.unit].never_evicted) chunks.push_back(&chunk);
  }
  return chunks;
}

uint64_t padded_bytes(const std::vector<Chunk*>& chunks, uint64_t granule) {
  uint64_t bytes = 0;
  for (const Chunk* chunk : chunks) bytes += padded_bytes(*chunk, granule);
  return bytes;
}

uint64_t choose_slots(const PlanLimits& limits, const Plan& plan, uint64_t streamed_bytes) {
  const uint64_t slot = plan.chunk_bytes;
  const uint64_t useful = std::max<uint64_t>(plan.chunks.size(), kLeastSlots);
  const uint64_t affordable = std::min(limits.host_bytes / slot, useful);
  if (limits.staging_bytes) {
    return std::clamp(*limits.staging_bytes / slot, kLeastSlots, affordable);
  }
  const uint64_t cache_limit = limits.cache_bytes.value_or(UINT64_MAX);
  const auto all_cached_beside = [&](uint64_t slots) {
    return slots <= affordable && streamed_bytes <= limits.host_bytes - slots * slot &&
           streamed_bytes <= cache_limit;
  };
  const uint64_t most = std::max(kMostStagingBytes / slot, kUsualSlots);
  uint64_t slots = std::clamp(limits.host_bytes / 8 / slot, kUsualSlots, most);
  if (cache_limit == 0) slots = most;
  if (all_cached_beside(kUsualSlots)) {
    const uint64_t room = (limits.host_bytes - streamed_bytes) / slot;
    slots = std::clamp(room, kUsualSlots, std::min(kAmpleSlots, most));
  }
  return std::clamp(slots, kLeastSlots, affordable);
}

void choose_cached(const std::vector<Chunk*>& chunks, uint64_t budget_bytes, uint64_t granule) {
  uint64_t left = budget_bytes;
  spread_evenly(chunks, budget_bytes, granule, [&](Chunk& chunk, uint64_t bytes) {
    if (bytes > left) return false;
    left -= bytes;
    chunk.home = Home::kHost;
    return true;
  });
}

void pack_cache(Plan& plan, uint64_t granule) {
  uint64_t end = 0;
  uint64_t segment_begin = 0;
  for (Chunk& chunk : streamed(plan)) {
    if (chunk.home != Home::kHost) continue;
    const uint64_t bytes = padded_bytes(chunk, granule);
    if (end + bytes - segment_begin > kSegmentBytes) {
      plan.cache_segments.push_back(end);
      segment_begin = end;
    }
    chunk.cache_offset = end;
    end += bytes;
  }
  if (end > segment_begin) plan.cache_segments.push_back(end);
  plan.cache_bytes = end;
}

}  // namespace

uint64_t usual_chunk_bytes(bool in_memory) { return in_memory ? kMemoryChunk : kDiskChunk; }

uint64_t host_granule_bytes(const ModelSpec& spec) {
  // Memory is mapped and registered in whole pages, whatever their size here.
  uint64_t granule = std::max(kCacheAlignment, static_cast<uint64_t>(::sysconf(_SC_PAGESIZE)));
  for (const ShardSpec& shard : spec.shards) granule = std::max<uint64_t>(granule, shard.alignment);
  return granule;
}

uint64_t choose_chunk_bytes(const ModelSpec& spec, const PlanLimits& limits,
                            std::vector<std::string>& warnings) {
  const uint64_t least = least_chunk_bytes(spec);
  check(limits.host_bytes >= kLeastSlots * least, "host_bytes = ", limits.host_bytes,
        " is too small: the staging ring alone takes at least ", kLeastSlots * least,
        ", two chunks of ", least);
  const uint64_t room = staging_room(limits, kLeastSlots * least, warnings);
  if (limits.chunk_bytes) {
    return asked_chunk_bytes(*limits.chunk_bytes, least, room, host_granule_bytes(spec), warnings);
  }
  // Cut alike, what the cache holds can stay there.
  const uint64_t kept = limits.kept_cache.cut_bytes;
  if (kept >= least && kept % host_granule_bytes(spec) == 0 && kept <= room / kLeastSlots) {
    return kept;
  }
  // A quarter at most: what the ring does not take, the cache keeps.
  const uint64_t share = limits.staging_bytes ? room : room / 4;
  const bool in_memory = std::ranges::all_of(spec.shards, &ShardSpec::in_memory);
  uint64_t chunk = std::max(usual_chunk_bytes(in_memory), least);
  uint64_t bytes = 0;
  for (const TensorSpec& tensor : spec.tensors) bytes += tensor.bytes;
  while (bytes / chunk > kMostChunks && 2 * chunk <= kSegmentBytes) chunk *= 2;
  while (chunk > least && chunk > share / kUsualSlots) chunk /= 2;
  return chunk;
}

void plan_host_memory(const ModelSpec& spec, const PlanLimits& limits, Plan& plan) {
  if (plan.chunks.empty()) return;
  const uint64_t granule = host_granule_bytes(spec);
  plan.chunk_bytes = 0;
  for (const Chunk& chunk : plan.chunks) {
    plan.chunk_bytes = std::max(plan.chunk_bytes, padded_bytes(chunk, granule));
  }
  const std::vector<Chunk*> chunks = cacheable(plan);
  const uint64_t total = padded_bytes(chunks, granule);
  const uint64_t slots = choose_slots(limits, plan, total);
  plan.slot_count = static_cast<uint32_t>(slots);
  const uint64_t most =
      std::min(limits.host_bytes - plan.staging_bytes(), limits.cache_bytes.value_or(UINT64_MAX));
  // Also where nothing is in it yet: its memory is taken over in the pieces that it has.
  if (!limits.kept_cache.segments.empty()) {
    cache_around_kept(limits.kept_cache, chunks, most, granule, plan);
    return;
  }
  choose_cached(chunks, most, granule);
  pack_cache(plan, granule);
}

}  // namespace wsm
