// Where units lie in the arena: pure placement.
//
//   | exclusive | exclusive |            cycle                    |
//   |           |           | u0 -> | u1 -> | u2 -> |             |
//   |           |           | u3 -> | u4 -> ...                   |
//
// Promise: a unit and the next `ahead.units` ones never overlap, so these can be loaded while it
// runs. At the seam, where a pass ends and the next begins, it holds for `ahead.seam` units.
// Exclusive places are shared with nobody. Places of 0 bytes take no part. All are multiples of
// 256.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace wsm {

struct Place {
  uint64_t bytes = 0;
  bool encloses_units = false;
};

struct Lookahead {
  uint32_t units = 0;
  uint32_t seam = 0;  // at most `units`
};

struct ArenaLayout {
  uint64_t bytes = 0;
  std::vector<uint64_t> offsets;  // parallel to the places
};

// No arena smaller than this can keep the promise.
uint64_t least_arena_bytes(const std::vector<Place>& places, Lookahead ahead);

// Whether a layout is found within `max_bytes`: quick, for searches.
bool arena_fits(const std::vector<Place>& places, Lookahead ahead, uint64_t max_bytes);

// A small layout within `max_bytes`; empty exactly where `arena_fits` is false.
std::optional<ArenaLayout> fit_arena(const std::vector<Place>& places, Lookahead ahead,
                                     uint64_t max_bytes);

// Which places are shared with no other at all: a unit stays there once it was loaded.
std::vector<bool> find_never_evicted(const std::vector<Place>& places, const ArenaLayout& layout);

}  // namespace wsm
