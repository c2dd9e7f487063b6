// Which chunks the host cache takes, where it cannot take all: spread evenly over the pass.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "plan/plan.h"
#include "util/align.h"

namespace wsm {

// Offers chunks whose home is still the disk to `take(chunk, bytes)`, which answers whether it took
// them: so that at every point of the pass about the same share of those before it was taken, as
// far as `budget_bytes` reach; then all that are left. `bytes` are multiples of the granule.
template <typename Take>
void spread_evenly(const std::vector<Chunk*>& chunks, uint64_t budget_bytes, uint64_t granule,
                   Take take) {
  __extension__ typedef unsigned __int128 Wide;  // products of two sizes
  std::vector<Chunk*> offered;
  uint64_t total = 0;
  for (Chunk* chunk : chunks) {
    if (chunk->home != Home::kDisk) continue;
    offered.push_back(chunk);
    total += align_up(chunk->read_bytes, granule);
  }
  const uint64_t budget = std::min(total, budget_bytes);
  uint64_t seen = 0;
  uint64_t taken = 0;
  for (Chunk* chunk : offered) {
    const uint64_t bytes = align_up(chunk->read_bytes, granule);
    seen += bytes;
    const bool due = Wide(2 * taken + bytes) * total <= Wide(2) * seen * budget;
    if (due && take(*chunk, bytes)) taken += bytes;
  }
  for (Chunk* chunk : offered) {
    if (chunk->home == Home::kDisk) take(*chunk, align_up(chunk->read_bytes, granule));
  }
}

}  // namespace wsm
