// Which tensors stay in device memory, and the arena that the others pass through.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "plan/arena.h"
#include "plan/model_spec.h"
#include "plan/planner.h"

namespace wsm {

inline constexpr uint32_t kMaxLookahead = 64;

// Bytes that a tensor takes in device memory.
uint64_t device_tensor_bytes(const TensorSpec& tensor);

// The order in which tensors become resident, each used one once: small ones first, then in rounds,
// each of which takes the largest tensor that is left of every unit. A round visits the units in an
// order of which every beginning is spread evenly over the pass, so that every stretch of the pass
// streams about the same.
struct ResidencyOrder {
  std::vector<uint32_t> tensors;
  std::vector<size_t> round_ends;  // into `tensors`
};
ResidencyOrder residency_order(const ModelSpec& spec);

struct DeviceHomes {
  std::vector<bool> resident;  // by tensor
  uint64_t homes_bytes = 0;    // to allocate
  uint64_t arena_bytes = 0;    // to allocate
  ArenaLayout arena;           // of the units' streamed tensors; empty places are at 0
  std::vector<Place> places;   // by unit
  Lookahead ahead;
  std::vector<std::string> warnings;
};

// Uses the device budget to within one tensor. Throws InvalidArgument naming the least budget that
// works.
DeviceHomes choose_device_homes(const ModelSpec& spec, const Limits& limits);

}  // namespace wsm
