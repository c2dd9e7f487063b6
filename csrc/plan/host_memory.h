// How the host budget is used: the size of a chunk, the staging ring, and which chunks the cache
// keeps.
//
//   host budget  | staging ring: slot slot slot ... | host cache: chunk chunk chunk ...   |
//                                                     segment      | segment     | ...
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "plan/model_spec.h"
#include "plan/plan.h"
#include "plan/planner.h"
#include "util/align.h"

namespace wsm {

// What is read from a disk at once, into a slot. So small that the few slots that are under way
// stay in the processor's cache, where a virtual disk's data is written and the link's copies read
// it: on an H100's host 3.1 to 3.3 GB/s, against 2.3 to 2.5 by 16 MiB (docs/performance.md).
inline constexpr uint64_t kDiskChunk = kMiB;

inline constexpr uint64_t kCacheAlignment = 4096;  // of chunks in the cache, at least

// Of chunks, unless limits or the model's size ask for others. `in_memory`: all shards lie there.
uint64_t usual_chunk_bytes(bool in_memory);

// What chunks, slots and places in the cache are multiples of: a page, and what every shard's
// direct reads need.
uint64_t host_granule_bytes(const ModelSpec& spec);

// The largest chunk, so that the ring has enough slots within the budget. Throws InvalidArgument
// naming the least host budget where not even two slots fit.
uint64_t choose_chunk_bytes(const ModelSpec& spec, const PlanLimits& limits,
                            std::vector<std::string>& warnings);

// For a plan whose chunks are cut: sets the slots, and gives chunks a home in the host cache,
// spread evenly over the pass. Uses the budget to within one chunk. `plan.chunk_bytes` shrinks to
// the largest chunk there is.
void plan_host_memory(const ModelSpec& spec, const PlanLimits& limits, Plan& plan);

}  // namespace wsm
