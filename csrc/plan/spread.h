// Which chunks the host cache takes, where it cannot take all: spread evenly over the pass.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "plan/plan.h"
#include "util/align.h"

namespace wsm {

// Chunks are taken in runs of up to so many bytes (of a small model, of up to a 256th): what lies
// side by side in the cache is one copy, and what is left between is read in long stretches.
inline constexpr uint64_t kSpreadBytes = 16 * kMiB;
inline constexpr uint64_t kSpreadParts = 256;

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
  const uint64_t most = std::min(kSpreadBytes, total / kSpreadParts);
  for (size_t begin = 0, end = 0; begin < offered.size(); begin = end) {
    uint64_t run = align_up(offered[end++]->read_bytes, granule);
    for (; end < offered.size(); ++end) {
      const uint64_t bytes = align_up(offered[end]->read_bytes, granule);
      if (run + bytes > most) break;
      run += bytes;
    }
    seen += run;
    if (Wide(2 * taken + run) * total > Wide(2) * seen * budget) continue;
    for (size_t i = begin; i < end; ++i) {
      const uint64_t bytes = align_up(offered[i]->read_bytes, granule);
      if (take(*offered[i], bytes)) taken += bytes;
    }
  }
  for (Chunk* chunk : offered) {
    if (chunk->home == Home::kDisk) take(*chunk, align_up(chunk->read_bytes, granule));
  }
}

}  // namespace wsm
