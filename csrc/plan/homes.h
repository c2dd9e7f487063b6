// Which tensors stay in device memory, and the arena that the others pass through.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "plan/arena.h"
#include "plan/home_blocks.h"
#include "plan/model_spec.h"
#include "plan/planner.h"

namespace wsm {

inline constexpr uint32_t kMaxLookahead = 64;

struct DeviceHomes {
  std::vector<bool> resident;  // by tensor
  std::vector<uint32_t> kept;  // the resident tensors, in the order in which they were chosen
  HomeBlocks blocks;           // of these
  uint64_t arena_bytes = 0;    // to allocate
  ArenaLayout arena;           // of the units' streamed tensors; empty places are at 0
  std::vector<Place> places;   // by unit
  Lookahead ahead;
  std::vector<std::string> warnings;
};

// Uses the device budget to within one tensor. Throws InvalidArgument naming the least budget that
// works.
DeviceHomes choose_device_homes(const ModelSpec& spec, const PlanLimits& limits);

}  // namespace wsm
