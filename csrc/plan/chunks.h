// Cuts byte ranges of shards into chunks and copies.
//
//   extents    |--- a ---|--- b ---|    gap    |-- c --|
//   chunk      [pad| copy a| copy b  |           | copy c|pad]    one read, three copies
//
// Ranges that touch, in the shard and in device memory, become one copy. Small gaps are read too.
// Chunks end at multiples of their size, counted from where the stretch of near bytes begins, at
// the latest: so the same bytes are cut alike whatever else is streamed, and what a cache holds of
// one plan serves the next.
#pragma once

#include <cstdint>
#include <vector>

#include "plan/model_spec.h"
#include "plan/plan.h"

namespace wsm {

inline constexpr uint64_t kMaxReadGap = 64
                                        << 10;  // bytes that are read for nothing, to save a read

// A byte range of a shard and where it goes. Ranges may overlap.
struct PlannedExtent {
  uint32_t shard = 0;
  uint32_t unit = 0;
  uint64_t offset = 0;  // in the shard
  uint64_t bytes = 0;
  uint64_t target = 0;                  // in the arena, or in the homes
  uint64_t cluster_begin = UINT64_MAX;  // a shard offset: where what is near to each other begins
};

// Sorts the extents by shard and offset, and sets their stretches: a gap that is too large to be
// read begins a new one.
void find_clusters(std::vector<PlannedExtent>& extents);

// Appends the extents of `tensor`, when it lies at `target`.
void append_extents(const TensorSpec& tensor, uint32_t unit, uint64_t target,
                    std::vector<PlannedExtent>& extents);

// Appends chunks of at most `chunk_bytes` (a multiple of every shard's alignment) and their copies
// to the plan, ordered by shard and offset. A chunk belongs to the first unit that has bytes in it.
void cut_chunks(std::vector<PlannedExtent> extents, const std::vector<ShardSpec>& shards,
                uint64_t chunk_bytes, Home home, Plan& plan);

}  // namespace wsm
