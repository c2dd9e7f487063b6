// Decides homes, places, chunks and lookahead from a model and its limits. Pure and deterministic.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "plan/kept_cache.h"
#include "plan/model_spec.h"
#include "plan/plan.h"

namespace wsm {

struct PlanLimits {
  uint64_t device_bytes = 0;  // arena and homes together, as the allocator rounds; a hard limit
  uint64_t host_bytes = 0;    // host cache and staging ring together; a hard limit

  // What follows overrides the planner's own choice where set.
  std::optional<uint64_t> arena_bytes{};  // the most that the arena may take (homes use the rest)
  std::optional<uint64_t> home_bytes{};   // the most that device homes may take; 0: an arena alone
  std::optional<uint64_t> staging_bytes{};     // size of the staging ring
  std::optional<uint64_t> cache_bytes{};       // the most that the host cache may take
  std::optional<uint64_t> chunk_bytes{};       // the largest chunk
  std::optional<uint32_t> lookahead_units{};   // 0: load on demand
  std::optional<uint32_t> seam_units{};        // the same between the last units and the first
  std::optional<uint64_t> read_ahead_bytes{};  // how far reads from the disk may run ahead

  std::vector<uint32_t> first_units{};  // whose tensors become resident before all others

  KeptCache kept_cache{};  // of the plan before this one: what it holds is cached first
};

// Validates `spec`, then plans. Throws InvalidArgument naming the least that would work when a
// budget is too small. What is asked for in vain is answered in Plan::warnings.
Plan make_plan(const ModelSpec& spec, const PlanLimits& limits);

// Device bytes as the allocator takes them for one block of `bytes`.
uint64_t device_block_bytes(uint64_t bytes);

}  // namespace wsm
