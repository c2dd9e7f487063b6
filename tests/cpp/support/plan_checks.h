// What every plan must hold, whatever the model and the limits.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <utility>
#include <vector>

#include "plan/chunks.h"
#include "plan/home_blocks.h"
#include "plan/host_memory.h"
#include "plan/plan.h"
#include "plan/planner.h"
#include "plan/residency.h"
#include "util/align.h"

namespace wsm::testing {

// A copy with its source in the shard.
struct Move {
  uint32_t shard = 0;
  uint64_t offset = 0;
  uint64_t target = 0;
  uint64_t bytes = 0;
};

inline std::vector<Move> moves_of(const Plan& plan, uint32_t first_chunk, uint32_t count) {
  std::vector<Move> moves;
  for (uint32_t c = first_chunk; c < first_chunk + count; ++c) {
    const Chunk& chunk = plan.chunks[c];
    for (uint32_t i = 0; i < chunk.copy_count; ++i) {
      const Copy& copy = plan.copies[chunk.first_copy + i];
      moves.push_back(
          {chunk.shard, chunk.read_offset + copy.source_offset, copy.target_offset, copy.bytes});
    }
  }
  return moves;
}

// Every byte of the extents is brought from its source exactly once, and nothing else.
inline void expect_moves_bring(std::vector<PlannedExtent> extents, std::vector<Move> moves) {
  const auto by_target = [](const auto& a, const auto& b) { return a.target < b.target; };
  std::sort(extents.begin(), extents.end(), by_target);
  std::sort(moves.begin(), moves.end(), by_target);
  size_t next = 0;
  for (PlannedExtent& extent : extents) {
    while (extent.bytes > 0) {
      ASSERT_LT(next, moves.size());
      Move& move = moves[next];
      ASSERT_EQ(move.target, extent.target);
      ASSERT_EQ(move.shard, extent.shard);
      ASSERT_EQ(move.offset, extent.offset);
      const uint64_t bytes = std::min(move.bytes, extent.bytes);
      ASSERT_GT(bytes, 0u);
      extent = {extent.shard, 0, extent.offset + bytes, extent.bytes - bytes,
                extent.target + bytes};
      move = {move.shard, move.offset + bytes, move.target + bytes, move.bytes - bytes};
      if (move.bytes == 0) ++next;
    }
  }
  EXPECT_EQ(next, moves.size());
}

inline void expect_budgets_held(const PlanLimits& limits, const Plan& plan) {
  uint64_t device_bytes = device_block_bytes(plan.arena_bytes);
  for (const HomeBlock& block : plan.home_blocks) device_bytes += device_block_bytes(block.bytes);
  EXPECT_LE(device_bytes, limits.device_bytes);
  EXPECT_LE(plan.staging_bytes() + plan.cache_bytes, limits.host_bytes);
  EXPECT_LE(plan.arena_bytes, limits.arena_bytes.value_or(UINT64_MAX));
  EXPECT_LE(plan.homes_bytes, limits.home_bytes.value_or(UINT64_MAX));
  EXPECT_LE(plan.cache_bytes, limits.cache_bytes.value_or(UINT64_MAX));
}

inline void expect_chunks_sound(const ModelSpec& spec, const Plan& plan) {
  const uint64_t granule = host_granule_bytes(spec);
  uint64_t cache_end = 0;
  for (uint32_t c = 0; c < plan.chunks.size(); ++c) {
    SCOPED_TRACE(concat("chunk ", c));
    const Chunk& chunk = plan.chunks[c];
    const uint32_t alignment = spec.shards[chunk.shard].alignment;
    EXPECT_EQ(chunk.read_offset % alignment, 0u);
    EXPECT_EQ(chunk.read_bytes % alignment, 0u);
    EXPECT_LE(chunk.read_bytes, plan.chunk_bytes);
    EXPECT_LE(chunk.need_bytes, chunk.read_bytes);
    EXPECT_LE(chunk.read_offset + chunk.need_bytes, spec.shards[chunk.shard].bytes);
    uint64_t payload = 0;
    uint64_t needed = 0;
    for (uint32_t i = 0; i < chunk.copy_count; ++i) {
      const Copy& copy = plan.copies[chunk.first_copy + i];
      EXPECT_GT(copy.bytes, 0u);
      payload += copy.bytes;
      needed = std::max<uint64_t>(needed, uint64_t{copy.source_offset} + copy.bytes);
    }
    EXPECT_EQ(payload, chunk.payload_bytes);
    EXPECT_EQ(needed, chunk.need_bytes);
    EXPECT_EQ(chunk.home == Home::kDevice, c >= plan.first_resident_chunk);
    if (chunk.home != Home::kHost) continue;
    EXPECT_EQ(chunk.cache_offset % granule, 0u);
    EXPECT_GE(chunk.cache_offset, cache_end);
    cache_end = chunk.cache_offset + chunk.read_bytes;
    const auto segment = std::upper_bound(plan.cache_segments.begin(), plan.cache_segments.end(),
                                          chunk.cache_offset);
    ASSERT_NE(segment, plan.cache_segments.end());
    EXPECT_LE(cache_end, *segment);
  }
  EXPECT_LE(cache_end, plan.cache_bytes);
  uint64_t segment_begin = 0;
  for (const uint64_t end : plan.cache_segments) {
    EXPECT_LE(end - segment_begin, kSegmentBytes);
    EXPECT_EQ(end % granule, 0u);
    segment_begin = end;
  }
  EXPECT_EQ(segment_begin, plan.cache_bytes);
}

// Units that stream and share the arena, in order.
inline std::vector<uint32_t> cycle_of(const ModelSpec& spec, const Plan& plan) {
  std::vector<uint32_t> cycle;
  for (uint32_t u = 0; u < plan.units.size(); ++u) {
    if (!spec.units[u].encloses_units && plan.units[u].place_bytes > 0) cycle.push_back(u);
  }
  return cycle;
}

inline void expect_places_disjoint(const ModelSpec& spec, const Plan& plan) {
  for (uint32_t u = 0; u < plan.units.size(); ++u) {
    const UnitPlan& unit = plan.units[u];
    EXPECT_EQ(unit.place_offset % kTensorAlignment, 0u);
    EXPECT_LE(unit.place_offset + unit.place_bytes, plan.arena_bytes);
    for (uint32_t v = 0; spec.units[u].encloses_units && v < plan.units.size(); ++v) {
      EXPECT_FALSE(v != u && places_overlap(unit, plan.units[v])) << u << " and " << v;
    }
  }
  const std::vector<uint32_t> cycle = cycle_of(spec, plan);
  for (size_t i = 0; i < cycle.size(); ++i) {
    for (size_t j = i + 1; j < cycle.size() && j <= i + plan.lookahead_units; ++j) {
      EXPECT_FALSE(places_overlap(plan.units[cycle[i]], plan.units[cycle[j]]))
          << cycle[i] << " and " << cycle[j];
    }
  }
}

// How many units ahead are clear of the running one everywhere, across the seam too.
inline uint32_t lookahead_around(const ModelSpec& spec, const Plan& plan) {
  const std::vector<uint32_t> cycle = cycle_of(spec, plan);
  for (uint32_t ahead = 1; ahead < cycle.size(); ++ahead) {
    for (size_t i = 0; i < cycle.size(); ++i) {
      const uint32_t other = cycle[(i + ahead) % cycle.size()];
      if (places_overlap(plan.units[cycle[i]], plan.units[other])) return ahead - 1;
    }
  }
  return cycle.empty() ? 0 : static_cast<uint32_t>(cycle.size() - 1);
}

// Each unit's streamed tensors, and the images of those that are transformed, lie apart inside its
// place; all resident ones lie apart in the homes.
inline void expect_tensors_placed(const ModelSpec& spec, const Plan& plan) {
  std::map<uint32_t, uint64_t> homes;
  const auto expect_apart = [&](std::vector<std::pair<uint64_t, uint64_t>> ranges) {
    std::sort(ranges.begin(), ranges.end());
    for (size_t i = 1; i < ranges.size(); ++i) EXPECT_LE(ranges[i - 1].second, ranges[i].first);
  };
  std::vector<std::pair<uint64_t, uint64_t>> resident;
  for (uint32_t u = 0; u < plan.units.size(); ++u) {
    const UnitPlan& unit = plan.units[u];
    std::vector<std::pair<uint64_t, uint64_t>> streamed;
    ASSERT_EQ(unit.tensors.size(), spec.units[u].tensors.size());
    for (size_t i = 0; i < unit.tensors.size(); ++i) {
      const uint32_t t = spec.units[u].tensors[i];
      const TensorLocation place = unit.tensors[i];
      const bool transformed = spec.tensors[t].parameter_bytes > 0;
      const uint64_t bytes = transformed ? spec.tensors[t].parameter_bytes : spec.tensors[t].bytes;
      const uint64_t end = place.offset + bytes;
      EXPECT_EQ(place.offset % kTensorAlignment, 0u);
      if (!place.resident && transformed) {
        const uint64_t image_end = place.image_offset + spec.tensors[t].bytes;
        EXPECT_EQ(place.image_offset % kTensorAlignment, 0u);
        EXPECT_GE(place.image_offset, unit.place_offset);
        EXPECT_LE(image_end, unit.place_offset + unit.place_bytes);
        streamed.emplace_back(place.image_offset, image_end);
      } else if (!place.resident) {
        EXPECT_EQ(place.image_offset, place.offset);
      }
      if (!place.resident) {
        streamed.emplace_back(place.offset, end);
        EXPECT_GE(place.offset, unit.place_offset);
        EXPECT_LE(end, unit.place_offset + unit.place_bytes);
      } else if (homes.emplace(t, place.offset).second) {
        resident.emplace_back(place.offset, end);
        if (end == place.offset) continue;
        const HomeBlock& block = plan.home_blocks[plan.block_at(place.offset)];
        EXPECT_LE(end, block.offset + block.bytes);
        EXPECT_EQ(std::ranges::count(block.tensors, t), 1);
      } else {
        EXPECT_EQ(homes[t], place.offset);
      }
    }
    expect_apart(streamed);
  }
  expect_apart(resident);
}

inline void expect_bytes_covered(const ModelSpec& spec, const Plan& plan) {
  std::vector<PlannedExtent> resident;
  std::vector<bool> seen(spec.tensors.size(), false);
  uint32_t next_chunk = 0;
  for (uint32_t u = 0; u < plan.units.size(); ++u) {
    SCOPED_TRACE(concat("unit ", u));
    std::vector<PlannedExtent> streamed;
    uint64_t bytes = 0;
    for (size_t i = 0; i < plan.units[u].tensors.size(); ++i) {
      const uint32_t t = spec.units[u].tensors[i];
      const TensorLocation place = plan.units[u].tensors[i];
      if (!place.resident) {
        append_extents(spec.tensors[t], u, place.image_offset, streamed);
        bytes += spec.tensors[t].bytes;
      } else if (!seen[t] && spec.tensors[t].parameter_bytes == 0) {
        append_extents(spec.tensors[t], u, place.offset, resident);
        seen[t] = true;
      }
    }
    EXPECT_EQ(plan.units[u].streamed_bytes, bytes);
    EXPECT_EQ(plan.units[u].first_chunk, next_chunk);
    next_chunk += plan.units[u].chunk_count;
    expect_moves_bring(streamed,
                       moves_of(plan, plan.units[u].first_chunk, plan.units[u].chunk_count));
  }
  EXPECT_EQ(plan.first_resident_chunk, next_chunk);
  const auto count = static_cast<uint32_t>(plan.chunks.size()) - plan.first_resident_chunk;
  expect_moves_bring(resident, moves_of(plan, plan.first_resident_chunk, count));
}

// No further tensor fits, but for one whose unit would leave the cycle: that takes another layout.
inline void expect_device_budget_used(const ModelSpec& spec, const PlanLimits& limits,
                                      const Plan& plan) {
  std::vector<bool> candidate(spec.tensors.size(), false);
  HomeBlocks homes(limits.home_bytes.value_or(UINT64_MAX));
  for (const HomeBlock& block : plan.home_blocks) {
    uint64_t bytes = 0;
    for (const uint32_t t : block.tensors) {
      bytes += device_tensor_bytes(spec.tensors[t]);
    }
    homes.add(bytes);
  }
  std::vector<bool> last(spec.tensors.size(), false);
  for (uint32_t u = 0; u < plan.units.size(); ++u) {
    for (size_t i = 0; i < plan.units[u].tensors.size(); ++i) {
      const uint32_t t = spec.units[u].tensors[i];
      candidate[t] = !plan.units[u].tensors[i].resident;
      if (streamed_tensor_bytes(spec.tensors[t]) == plan.units[u].place_bytes) last[t] = true;
    }
  }
  for (size_t t = 0; t < candidate.size(); ++t) {
    if (!candidate[t] || last[t]) continue;
    const HomeBlocks with = homes.with(device_tensor_bytes(spec.tensors[t]));
    const uint64_t cost = with.cost_bytes() + device_block_bytes(plan.arena_bytes);
    EXPECT_TRUE(with.bytes() > limits.home_bytes.value_or(UINT64_MAX) || cost > limits.device_bytes)
        << "tensor " << t << " would fit";
  }
}

// No further chunk fits into the cache.
inline void expect_host_budget_used(const ModelSpec& spec, const PlanLimits& limits,
                                    const Plan& plan) {
  const uint64_t most =
      std::min(limits.host_bytes - plan.staging_bytes(), limits.cache_bytes.value_or(UINT64_MAX));
  const uint64_t granule = host_granule_bytes(spec);
  for (const Chunk& chunk : plan.chunks) {
    if (plan.units[chunk.unit].never_evicted) continue;  // read once
    EXPECT_TRUE(chunk.home != Home::kDisk ||
                most - plan.cache_bytes < align_up(chunk.read_bytes, granule));
  }
}

inline void expect_sound(const ModelSpec& spec, const PlanLimits& limits, const Plan& plan) {
  expect_budgets_held(limits, plan);
  expect_device_budget_used(spec, limits, plan);
  expect_host_budget_used(spec, limits, plan);
  expect_chunks_sound(spec, plan);
  expect_places_disjoint(spec, plan);
  expect_tensors_placed(spec, plan);
  expect_bytes_covered(spec, plan);
}

}  // namespace wsm::testing
