// A host cache that a new plan takes over: what it holds stays where it is.
//
//   before   | chunk | chunk | chunk | chunk | chunk |
//   kept     | chunk |       | chunk |       |      ~~~~~ ends at the new budget
//   after    | chunk | new   | chunk | new   | ...         gaps are filled, then it grows
#pragma once

#include <cstdint>
#include <vector>

#include "plan/plan.h"

namespace wsm {

// Bytes of a shard that lie in the cache.
struct CachedExtent {
  uint32_t shard = 0;
  uint64_t offset = 0;  // in the shard
  uint64_t bytes = 0;
  uint64_t cache_offset = 0;
};

struct KeptCache {
  std::vector<CachedExtent> extents{};
  std::vector<uint64_t> segments{};  // ends of the pieces of memory that there are
  uint64_t cut_bytes = 0;            // Plan::cut_bytes of the plan that filled it
};

// Where a range of a shard lies in kept memory below `end`; finds it by bisection.
class KeptExtents {
 public:
  KeptExtents(std::vector<CachedExtent> extents, uint64_t end);
  // The cache offset, or UINT64_MAX where not all of it is there.
  uint64_t find(uint32_t shard, uint64_t offset, uint64_t bytes) const;

 private:
  std::vector<CachedExtent> extents_;  // by shard and offset
};

// Gives these of the plan's chunks a home in the cache: those that are kept, then others, spread
// evenly, in the gaps and behind, up to `most_bytes` in all. Sets the plan's cache and its
// segments.
void cache_around_kept(const KeptCache& kept, const std::vector<Chunk*>& chunks,
                       uint64_t most_bytes, uint64_t granule, Plan& plan);

}  // namespace wsm
