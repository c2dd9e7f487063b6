// The plan: homes, places, chunks and copies. Pure data, made once by `make_plan` (plan/planner.h)
// and followed by the engine without further decisions about where bytes go.
//
//   arena (device)   | exclusive places | place 0 | place 1 | place 2 |   places of units overlap
//                    |                  | place 3   | place 4 |         by design, laid out in
//                    |                  | place 5 | ...                 registration order
//
//   homes (device)   | tensor | tensor | ...   blocks (plan/home_blocks.h), loaded once, never
//                    | tensor | ...            moved; their offsets leave gaps between blocks
//
//   unit             = chunk chunk chunk ...        each a contiguous range of one shard
//   chunk            = [read_offset, +read_bytes)   aligned for direct reads
//                      |pad| copy 0 | copy 1 | gap | copy 2 |pad|
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace wsm {

enum class Home : uint8_t { kDevice, kHost, kDisk };

inline constexpr uint64_t kTensorAlignment = 256;        // of every tensor in device memory
inline constexpr uint64_t kSegmentBytes = 256ull << 20;  // pinned memory is registered in these
inline constexpr uint32_t kNone = UINT32_MAX;

// One contiguous host-to-device copy out of a chunk.
struct Copy {
  uint32_t source_offset = 0;  // from the start of the chunk's buffer (slot or cache place)
  uint64_t target_offset = 0;  // in the arena; in the homes for a chunk whose home is the device
  uint32_t bytes = 0;
};

// What is read at once, from one shard, into one slot or one place of the host cache.
struct Chunk {
  uint32_t unit = 0;  // whose load it belongs to (for a device home: the first unit that uses it)
  uint32_t shard = 0;
  uint64_t read_offset = 0;  // aligned as the shard needs
  uint32_t read_bytes =
      0;  // aligned; at most Plan::chunk_bytes; the end may lie past the shard's end
  uint32_t need_bytes = 0;     // how many of them must arrive
  uint64_t payload_bytes = 0;  // sum of the copies: more than is read where images share bytes
  Home home = Home::kDisk;
  uint64_t cache_offset = 0;  // in the host cache, when home is kHost
  uint32_t first_copy = 0;    // into Plan::copies
  uint32_t copy_count = 0;
};

// Where a unit finds one of its tensors.
struct TensorLocation {
  bool resident = false;  // false: `offset` is in the arena; true: in the homes
  uint64_t offset = 0;
  // Where its image lands: at `offset`, or in scratch of the unit's place that an arrival transform
  // reads. An image that is to be transformed and resident lands nowhere: see Engine::fetch.
  uint64_t image_offset = 0;
};

// One piece of device memory for resident tensors. Offsets in the homes count all blocks, with gaps
// between them.
struct HomeBlock {
  uint64_t offset = 0;
  uint64_t bytes = 0;             // to allocate
  std::vector<uint32_t> tensors;  // as they lie in it
};

struct UnitPlan {
  uint64_t bytes = 0;           // payload of all its tensors
  uint64_t place_offset = 0;    // in the arena
  uint64_t place_bytes = 0;     // 0: every tensor is resident, nothing streams
  uint64_t streamed_bytes = 0;  // payload that a load of this unit brings
  bool never_evicted = false;   // its place is nobody else's: once loaded, it stays
  uint32_t first_chunk = 0;     // into Plan::chunks: the streamed chunks (homes host and disk)
  uint32_t chunk_count = 0;
  std::vector<TensorLocation> tensors;  // parallel to UnitSpec::tensors
};

// Whether two units can never be in the arena at once.
inline bool places_overlap(const UnitPlan& a, const UnitPlan& b) {
  return a.place_bytes > 0 && b.place_bytes > 0 &&
         a.place_offset < b.place_offset + b.place_bytes &&
         b.place_offset < a.place_offset + a.place_bytes;
}

struct Plan {
  std::vector<UnitPlan> units;  // parallel to ModelSpec::units
  std::vector<Chunk> chunks;    // streamed chunks by unit, then the resident ones
  std::vector<Copy> copies;
  uint32_t first_resident_chunk = 0;  // chunks[first_resident_chunk..] have home kDevice

  uint64_t arena_bytes = 0;            // device memory to allocate for places
  std::vector<HomeBlock> home_blocks;  // by offset
  uint64_t homes_bytes = 0;            // device memory to allocate for resident tensors, all blocks
  uint64_t cache_bytes = 0;            // host cache
  std::vector<uint64_t>
      cache_segments;  // ends of the pieces in which the cache is registered; no chunk crosses one
  uint64_t chunk_bytes = 0;  // the largest chunk; the size of a slot
  uint64_t cut_bytes = 0;    // chunks end at multiples of this (chunks.h)
  uint32_t slot_count = 0;   // staging ring

  uint32_t lookahead_units = 0;   // units kept in flight ahead of the running one
  uint64_t read_ahead_bytes = 0;  // how far reads may run ahead of use, in bytes of unit images

  uint64_t device_budget_bytes = 0;
  uint64_t host_budget_bytes = 0;
  uint64_t model_bytes = 0;        // payload of all tensors, each once
  uint64_t device_home_bytes = 0;  // payload by home, a pass: what each link must carry
  uint64_t host_home_bytes = 0;
  uint64_t disk_home_bytes = 0;
  std::vector<std::string>
      warnings;  // settings that could not be honoured, each with what was done instead

  // Which block holds this offset in the homes.
  size_t block_at(uint64_t offset) const {
    const auto after =
        std::upper_bound(home_blocks.begin(), home_blocks.end(), offset,
                         [](uint64_t at, const HomeBlock& block) { return at < block.offset; });
    return static_cast<size_t>(after - home_blocks.begin()) - 1;
  }

  uint64_t staging_bytes() const { return chunk_bytes * slot_count; }
};

}  // namespace wsm
