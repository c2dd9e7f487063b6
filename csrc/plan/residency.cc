#include "plan/residency.h"

#include <algorithm>
#include <numeric>
#include <unordered_set>

#include "plan/plan.h"
#include "util/align.h"

namespace wsm {
namespace {

constexpr uint64_t kSmallTensor = kMiB;  // kept on the device first: many, and cheap

// Units by the fractional part of u / golden ratio: every beginning of this order is spread evenly.
std::vector<uint32_t> spread_order(size_t units) {
  std::vector<uint32_t> order(units);
  std::iota(order.begin(), order.end(), 0);
  const auto key = [](uint32_t u) { return u * 0x9E3779B97F4A7C15ull; };
  std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return key(a) < key(b); });
  return order;
}

// Each unit's tensors, largest first; a tensor of several units is only in the first that is
// visited.
std::vector<std::vector<uint32_t>> tensors_by_size(const ModelSpec& spec,
                                                   const std::vector<uint32_t>& visit) {
  std::vector<bool> taken(spec.tensors.size(), false);
  std::vector<std::vector<uint32_t>> sorted;
  for (const uint32_t u : visit) {
    std::vector<uint32_t>& tensors = sorted.emplace_back();
    for (const uint32_t t : spec.units[u].tensors) {
      if (!taken[t]) tensors.push_back(t);
      taken[t] = true;
    }
    std::stable_sort(tensors.begin(), tensors.end(), [&](uint32_t a, uint32_t b) {
      return spec.tensors[a].bytes > spec.tensors[b].bytes;
    });
  }
  return sorted;
}

}  // namespace

uint64_t device_tensor_bytes(const TensorSpec& tensor) {
  const bool transformed = tensor.parameter_bytes > 0;
  return align_up(transformed ? tensor.parameter_bytes : tensor.bytes, kTensorAlignment);
}

uint64_t streamed_tensor_bytes(const TensorSpec& tensor) {
  return align_up(tensor.bytes, kTensorAlignment) +
         align_up(tensor.parameter_bytes, kTensorAlignment);
}

ResidencyOrder residency_order(const ModelSpec& spec) {
  const auto by_unit = tensors_by_size(spec, spread_order(spec.units.size()));
  size_t rounds = 0;
  for (const auto& tensors : by_unit) rounds = std::max(rounds, tensors.size());
  std::vector<std::vector<uint32_t>> small(rounds), large(rounds);
  for (const auto& tensors : by_unit) {
    for (size_t r = 0; r < tensors.size(); ++r) {
      const bool is_small = spec.tensors[tensors[r]].bytes < kSmallTensor;
      (is_small ? small : large)[r].push_back(tensors[r]);
    }
  }
  ResidencyOrder order;
  // A place that no other unit takes is as good as a home, and costs the same.
  std::vector<bool> first(spec.tensors.size(), false);
  for (const UnitSpec& unit : spec.units) {
    for (const uint32_t t : unit.tensors) {
      if (!unit.encloses_units || first[t]) continue;
      first[t] = true;
      order.tensors.push_back(t);
    }
  }
  if (!order.tensors.empty()) order.round_ends.push_back(order.tensors.size());
  const auto taken = [&](uint32_t t) { return first[t]; };
  for (auto* group : {&small, &large}) {
    for (auto& round : *group) {
      std::erase_if(round, taken);
      if (round.empty()) continue;
      order.tensors.insert(order.tensors.end(), round.begin(), round.end());
      order.round_ends.push_back(order.tensors.size());
    }
  }
  return order;
}

ResidencyOrder with_first(const ResidencyOrder& order, const std::vector<uint32_t>& tensors) {
  ResidencyOrder changed{.tensors = tensors, .round_ends = {tensors.size()}};
  const std::unordered_set<uint32_t> first(tensors.begin(), tensors.end());
  size_t begin = 0;
  for (const size_t end : order.round_ends) {
    for (size_t i = begin; i < end; ++i) {
      if (!first.contains(order.tensors[i])) changed.tensors.push_back(order.tensors[i]);
    }
    changed.round_ends.push_back(changed.tensors.size());
    begin = end;
  }
  return changed;
}

}  // namespace wsm
