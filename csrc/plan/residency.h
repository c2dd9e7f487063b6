// In which order tensors become resident.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "plan/model_spec.h"

namespace wsm {

// Bytes that a tensor takes in device memory where it is resident.
uint64_t device_tensor_bytes(const TensorSpec& tensor);

// The same in its unit's place, where a transform needs its image beside it.
uint64_t streamed_tensor_bytes(const TensorSpec& tensor);

// The order in which tensors become resident, each used one once: those of exclusive units first,
// then small ones, then rounds, each of which takes the largest tensor that is left of every unit.
// A round visits the units in an order of which every beginning is spread evenly over the pass, so
// that every stretch of the pass streams about the same.
struct ResidencyOrder {
  std::vector<uint32_t> tensors;
  std::vector<size_t> round_ends;  // into `tensors`
};
ResidencyOrder residency_order(const ModelSpec& spec);

// The same, but for these tensors, which come first.
ResidencyOrder with_first(const ResidencyOrder& order, const std::vector<uint32_t>& tensors);

}  // namespace wsm
