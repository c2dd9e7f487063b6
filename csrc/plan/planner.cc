#include "plan/planner.h"

#include <algorithm>
#include <tuple>

#include "plan/chunks.h"
#include "plan/homes.h"
#include "plan/host_memory.h"
#include "plan/residency.h"
#include "util/align.h"
#include "util/check.h"

namespace wsm {
namespace {

// A plan that no memory could hold is refused before it is made.
constexpr uint64_t kMaxChunks = 1ull << 24;

void warn_of_unused(const ModelSpec& spec, Plan& plan) {
  std::vector<bool> used(spec.tensors.size(), false);
  for (const UnitSpec& unit : spec.units) {
    for (const uint32_t t : unit.tensors) used[t] = true;
  }
  size_t unused = 0;
  size_t first = 0;
  for (size_t t = spec.tensors.size(); t-- > 0;) {
    if (used[t]) {
      plan.model_bytes += spec.tensors[t].bytes;
    } else {
      ++unused;
      first = t;
    }
  }
  if (unused == 0) return;
  plan.warnings.push_back(concat(unused,
                                 " tensors belong to no unit and are not loaded, the first is ",
                                 spec.tensors[first].name));
}

void check_chunk_count(const ModelSpec& spec, uint64_t chunk_bytes) {
  uint64_t pieces = 0;
  for (const UnitSpec& unit : spec.units) {
    for (const uint32_t t : unit.tensors) {
      const TensorSpec& tensor = spec.tensors[t];
      pieces += tensor.bytes / chunk_bytes + 2 * tensor.extents.size();
    }
  }
  check(pieces <= kMaxChunks, "the model would be read in up to ", pieces, " chunks of ",
        chunk_bytes, " bytes, at most ", kMaxChunks,
        " are planned: give a larger host_bytes or chunk_bytes");
}

// Tensors by their first byte in the file: neighbours there become neighbours in device memory.
class FileOrder {
 public:
  explicit FileOrder(const ModelSpec& spec) {
    keys_.reserve(spec.tensors.size());
    for (uint32_t t = 0; t < spec.tensors.size(); ++t) {
      Key key{kNone, 0, t};
      for (const Extent& extent : spec.tensors[t].extents) {
        key = std::min(key, Key{extent.shard, extent.offset, t});
      }
      keys_.push_back(key);
    }
  }

  template <typename Iterator, typename TensorOf>
  void sort(Iterator begin, Iterator end, TensorOf tensor_of) const {
    std::sort(begin, end, [&](const auto& a, const auto& b) {
      return keys_[tensor_of(a)] < keys_[tensor_of(b)];
    });
  }

 private:
  using Key = std::tuple<uint32_t, uint64_t, uint32_t>;
  std::vector<Key> keys_;
};

// Cuts the homes into blocks, in the order in which the tensors were chosen; inside a block they
// lie in file order. Returns their offsets in the homes, by tensor.
std::vector<uint64_t> lay_out_homes(const ModelSpec& spec, const PlanLimits& limits,
                                    const DeviceHomes& homes, const FileOrder& order, Plan& plan) {
  HomeBlocks blocks(limits.home_bytes.value_or(UINT64_MAX));
  for (const uint32_t t : homes.kept) {
    if (spec.tensors[t].bytes == 0) continue;
    if (blocks.add(device_tensor_bytes(spec.tensors[t]))) plan.home_blocks.emplace_back();
    plan.home_blocks.back().tensors.push_back(t);
  }
  std::vector<uint64_t> offsets(spec.tensors.size(), 0);
  uint64_t end = 0;
  for (HomeBlock& block : plan.home_blocks) {
    block.offset = end;
    order.sort(block.tensors.begin(), block.tensors.end(), [](uint32_t t) { return t; });
    for (const uint32_t t : block.tensors) {
      offsets[t] = end;
      end += device_tensor_bytes(spec.tensors[t]);
    }
    block.bytes = end - block.offset;
    end += kTensorAlignment;  // no copy runs from one block into the next
  }
  if (const uint64_t request = blocks.open_request_bytes(); request > 0) {
    plan.home_blocks.back().bytes = request;
  }
  for (const HomeBlock& block : plan.home_blocks) plan.homes_bytes += block.bytes;
  return offsets;
}

// The unit's images one after another in its place, in file order; after them what transforms make.
void place_tensors(const ModelSpec& spec, const UnitSpec& unit, const DeviceHomes& homes,
                   const std::vector<uint64_t>& home_offsets, const FileOrder& order,
                   UnitPlan& plan) {
  plan.tensors.resize(unit.tensors.size());
  for (const uint32_t t : unit.tensors) plan.bytes += spec.tensors[t].bytes;
  std::vector<uint32_t> streamed;  // indices into unit.tensors
  for (uint32_t i = 0; i < unit.tensors.size(); ++i) {
    const uint32_t t = unit.tensors[i];
    plan.tensors[i] = {
        .resident = homes.resident[t], .offset = home_offsets[t], .image_offset = home_offsets[t]};
    if (!homes.resident[t]) streamed.push_back(i);
  }
  order.sort(streamed.begin(), streamed.end(), [&](uint32_t i) { return unit.tensors[i]; });
  uint64_t end = plan.place_offset;
  for (const uint32_t i : streamed) {
    plan.tensors[i].offset = plan.tensors[i].image_offset = end;
    end += align_up(spec.tensors[unit.tensors[i]].bytes, kTensorAlignment);
  }
  for (const uint32_t i : streamed) {
    const uint64_t parameter_bytes = spec.tensors[unit.tensors[i]].parameter_bytes;
    if (parameter_bytes == 0) continue;
    plan.tensors[i].offset = end;
    end += align_up(parameter_bytes, kTensorAlignment);
  }
}

void cut_streamed(const ModelSpec& spec, uint64_t chunk_bytes, Plan& plan) {
  for (uint32_t u = 0; u < spec.units.size(); ++u) {
    UnitPlan& unit = plan.units[u];
    std::vector<PlannedExtent> extents;  // of all its tensors at first: see find_clusters
    for (uint32_t i = 0; i < unit.tensors.size(); ++i) {
      const TensorSpec& tensor = spec.tensors[spec.units[u].tensors[i]];
      const bool resident = unit.tensors[i].resident;
      append_extents(tensor, resident ? kNone : u, unit.tensors[i].image_offset, extents);
      if (!resident) unit.streamed_bytes += tensor.bytes;
    }
    find_clusters(extents);
    std::erase_if(extents, [](const PlannedExtent& f) { return f.unit == kNone; });
    unit.first_chunk = static_cast<uint32_t>(plan.chunks.size());
    cut_chunks(std::move(extents), spec.shards, chunk_bytes, Home::kDisk, plan);
    unit.chunk_count = static_cast<uint32_t>(plan.chunks.size()) - unit.first_chunk;
  }
}

void cut_resident(const ModelSpec& spec, uint64_t chunk_bytes, Plan& plan) {
  std::vector<PlannedExtent> extents;
  std::vector<bool> seen(spec.tensors.size(), false);
  for (uint32_t u = 0; u < spec.units.size(); ++u) {
    for (uint32_t i = 0; i < spec.units[u].tensors.size(); ++i) {
      const uint32_t t = spec.units[u].tensors[i];
      if (!plan.units[u].tensors[i].resident || seen[t]) continue;
      seen[t] = true;
      if (spec.tensors[t].parameter_bytes > 0) {
        plan.device_home_bytes += spec.tensors[t].bytes;  // made at start, of what `fetch` brings
        continue;
      }
      append_extents(spec.tensors[t], u, plan.units[u].tensors[i].image_offset, extents);
    }
  }
  plan.first_resident_chunk = static_cast<uint32_t>(plan.chunks.size());
  cut_chunks(std::move(extents), spec.shards, chunk_bytes, Home::kDevice, plan);
}

void plan_device_memory(const ModelSpec& spec, const PlanLimits& limits, const DeviceHomes& homes,
                        Plan& plan) {
  const FileOrder order(spec);
  const std::vector<uint64_t> home_offsets = lay_out_homes(spec, limits, homes, order, plan);
  const std::vector<bool> never_evicted = find_never_evicted(homes.places, homes.arena);
  plan.units.resize(spec.units.size());
  for (uint32_t u = 0; u < spec.units.size(); ++u) {
    plan.units[u].place_offset = homes.arena.offsets[u];
    plan.units[u].place_bytes = homes.places[u].bytes;
    plan.units[u].never_evicted = never_evicted[u];
    place_tensors(spec, spec.units[u], homes, home_offsets, order, plan.units[u]);
  }
  plan.arena_bytes = homes.arena_bytes;
  plan.lookahead_units = homes.ahead.units;
}

// What a pass moves. A unit that is alone in its place lives on the device, however it got there.
void sum_homes(Plan& plan) {
  for (uint32_t c = 0; c < plan.chunks.size(); ++c) {
    const Chunk& chunk = plan.chunks[c];
    const bool stays = c < plan.first_resident_chunk && plan.units[chunk.unit].never_evicted;
    switch (stays ? Home::kDevice : chunk.home) {
      case Home::kDevice:
        plan.device_home_bytes += chunk.payload_bytes;
        break;
      case Home::kHost:
        plan.host_home_bytes += chunk.payload_bytes;
        break;
      case Home::kDisk:
        plan.disk_home_bytes += chunk.payload_bytes;
        break;
    }
  }
}

}  // namespace

Plan make_plan(const ModelSpec& spec, const PlanLimits& limits) {
  validate(spec);
  Plan plan;
  plan.device_budget_bytes = limits.device_bytes;
  plan.host_budget_bytes = limits.host_bytes;
  warn_of_unused(spec, plan);

  const DeviceHomes homes = choose_device_homes(spec, limits);
  plan.warnings.insert(plan.warnings.end(), homes.warnings.begin(), homes.warnings.end());
  plan_device_memory(spec, limits, homes, plan);

  if (plan.model_bytes > 0) {
    const uint64_t chunk_bytes = choose_chunk_bytes(spec, limits, plan.warnings);
    check_chunk_count(spec, chunk_bytes);
    plan.cut_bytes = chunk_bytes;
    cut_streamed(spec, chunk_bytes, plan);
    cut_resident(spec, chunk_bytes, plan);
    plan_host_memory(spec, limits, plan);
  }
  sum_homes(plan);
  plan.read_ahead_bytes =
      limits.read_ahead_bytes.value_or(plan.host_home_bytes + plan.disk_home_bytes);
  return plan;
}

}  // namespace wsm
