#include "support/streamed_model.h"

#include <algorithm>
#include <numeric>
#include <random>

#include "util/align.h"

namespace wsm::testing {

StreamedModel::StreamedModel(uint64_t seed, ModelShape shape) {
  std::mt19937_64 random(seed);
  std::vector<uint64_t> ends(shape.shards, 0);
  // Headers make odd offsets in real files; so do these.
  for (uint64_t& end : ends) end = 8 + random() % 5000;
  for (uint32_t u = 0; u < shape.units; ++u) {
    UnitSpec unit{"unit" + std::to_string(u), "layer=" + std::to_string(u), {}, false};
    unit.encloses_units = std::ranges::count(shape.encloses_units, u) > 0;
    const uint32_t shard = u % shape.shards;
    uint64_t unit_bytes = 0;
    for (uint32_t t = 0; t < shape.tensors_per_unit; ++t) {
      const uint64_t span = shape.most_tensor_bytes - shape.least_tensor_bytes + 1;
      uint64_t size = shape.least_tensor_bytes + random() % span;
      if (t == 0) size = align_up(size, 256);  // so that some neighbours can be copied as one
      unit.tensors.push_back(static_cast<uint32_t>(spec_.tensors.size()));
      spec_.tensors.push_back(
          {unit.name + ".t" + std::to_string(t), size, {{shard, ends[shard], size, 0}}});
      if (shape.transformed && t % 3 == 2) spec_.tensors.back().parameter_bytes = size / 2;
      ends[shard] += size;
      unit_bytes += size + spec_.tensors.back().parameter_bytes;
    }
    bytes_ += unit_bytes;
    largest_unit_ = std::max(largest_unit_, unit_bytes);
    spec_.units.push_back(std::move(unit));
  }
  folder_.emplace();
  for (uint32_t s = 0; s < shape.shards; ++s) {
    const std::string path = *folder_ / ("shard" + std::to_string(s));
    if (shape.in_memory) {
      owned_memory_.emplace_back(ends[s]);
      fill_pattern(owned_memory_.back(), 0, s);
      memory_.push_back(owned_memory_.back().data());
      spec_.shards.push_back({path, ends[s], 1});
    } else {
      memory_.push_back(nullptr);
      write_pattern_file(path, ends[s], s);
      spec_.shards.push_back({path, ends[s], direct_alignment(path)});
    }
  }
}

StreamedModel::StreamedModel(ModelSpec spec, std::vector<const void*> memory)
    : spec_(std::move(spec)), memory_(std::move(memory)) {
  for (const UnitSpec& unit : spec_.units) {
    uint64_t unit_bytes = 0;
    for (const uint32_t t : unit.tensors) {
      unit_bytes += spec_.tensors[t].bytes + spec_.tensors[t].parameter_bytes;
    }
    bytes_ += unit_bytes;
    largest_unit_ = std::max(largest_unit_, unit_bytes);
  }
}

Engine& StreamedModel::open(const Plan& plan, EngineOptions options, std::unique_ptr<Device> device,
                            std::shared_ptr<Preload> ahead) {
  engine_.reset();
  Handoff handoff{.device = std::move(device)};
  handoff.preload = std::move(ahead);
  return start(plan, std::move(options), std::move(handoff), {});
}

Engine& StreamedModel::resize(const PlanLimits& limits, EngineOptions options) {
  PlanLimits following = limits;
  following.kept_cache = engine_->kept_cache();
  const Plan before = engine_->plan();
  const Plan after = make_plan(spec_, following);
  Handoff handoff = engine_->hand_over();
  engine_.reset();
  const std::vector<std::byte> memory = std::move(device_memory_);
  const std::byte* const homes = homes_;
  std::vector<bool> loaded;
  std::vector<std::pair<uint64_t, std::vector<std::byte>>> stay;
  for (const HomeBlock& block : after.home_blocks) {
    const auto same = std::ranges::find(before.home_blocks, block.tensors, &HomeBlock::tensors);
    loaded.push_back(resident_loaded_ && same != before.home_blocks.end());
    if (!loaded.back()) continue;
    const std::byte* const bytes = homes + same->offset;
    stay.emplace_back(block.offset, std::vector<std::byte>(bytes, bytes + same->bytes));
  }
  start(after, std::move(options), std::move(handoff), loaded);
  for (const auto& [offset, bytes] : stay) std::ranges::copy(bytes, homes_ + offset);
  return *engine_;
}

Engine& StreamedModel::start(const Plan& plan, EngineOptions options, Handoff handoff,
                             const std::vector<bool>& loaded) {
  uint64_t homes_end = 0;
  for (const HomeBlock& block : plan.home_blocks) homes_end = block.offset + block.bytes;
  device_memory_.assign(plan.arena_bytes + homes_end + 2 * kTensorAlignment, std::byte{0xEE});
  const auto base = reinterpret_cast<uintptr_t>(device_memory_.data());
  arena_ = reinterpret_cast<std::byte*>(align_up(base, kTensorAlignment));
  homes_ = arena_ + align_up(plan.arena_bytes, kTensorAlignment);
  std::vector<HomeMemory> homes;
  for (size_t i = 0; i < plan.home_blocks.size(); ++i) {
    homes.push_back({homes_ + plan.home_blocks[i].offset, !loaded.empty() && loaded[i]});
  }
  resident_loaded_ = false;
  engine_ = std::make_unique<Engine>(spec_, plan, std::move(handoff), arena_, std::move(homes),
                                     memory_, 0, std::move(options));
  return *engine_;
}

void StreamedModel::load_resident() {
  engine_->load_resident(0, {});
  resident_loaded_ = true;
}

std::string StreamedModel::compare(const TensorSpec& tensor, const std::byte* found) const {
  for (const Extent& extent : tensor.extents) {
    const std::span<const std::byte> part(found + extent.tensor_offset, extent.bytes);
    const size_t at = first_mismatch(part, extent.offset, extent.shard);
    if (at < extent.bytes) return concat(" ", tensor.name, "@", extent.tensor_offset + at);
  }
  return "";
}

void StreamedModel::visit_images(uint32_t unit, const Visit& visit) const {
  const UnitPlan& planned = engine_->plan().units[unit];
  for (size_t t = 0; t < planned.tensors.size(); ++t) {
    const TensorLocation& place = planned.tensors[t];
    const TensorSpec& tensor = spec_.tensors[spec_.units[unit].tensors[t]];
    if (place.resident && tensor.parameter_bytes > 0) continue;  // made by the caller
    visit(tensor, (place.resident ? homes_ : arena_) + place.image_offset);
  }
}

std::string StreamedModel::wrong_bytes(uint32_t unit) const {
  std::string wrong;
  visit_images(unit, [&](const TensorSpec& tensor, const std::byte* image) {
    wrong += compare(tensor, image);
  });
  return wrong;
}

std::string StreamedModel::wrong_fetch(uint32_t unit) const {
  std::string wrong;
  const UnitPlan& planned = engine_->plan().units[unit];
  for (uint32_t t = 0; t < planned.tensors.size(); ++t) {
    const TensorSpec& tensor = spec_.tensors[spec_.units[unit].tensors[t]];
    if (planned.tensors[t].resident && tensor.parameter_bytes == 0) continue;
    std::vector<std::byte> copy(tensor.bytes);
    engine_->fetch(unit, t, copy.data());
    wrong += compare(tensor, copy.data());
  }
  return wrong;
}

std::string StreamedModel::use(uint32_t unit) {
  if (engine_->plan().units[unit].place_bytes == 0) return wrong_bytes(unit);
  engine_->acquire(unit, 0, {});
  std::string wrong = wrong_bytes(unit);
  engine_->release(unit, 0);
  return wrong;
}

std::string StreamedModel::pass(const std::vector<uint32_t>& order) {
  std::string wrong;
  engine_->begin_pass(0);
  for (const uint32_t unit : order) wrong += use(unit);
  engine_->end_pass(0);
  return wrong;
}

std::vector<uint32_t> StreamedModel::all_units() const {
  std::vector<uint32_t> order(spec_.units.size());
  std::iota(order.begin(), order.end(), 0);
  return order;
}

}  // namespace wsm::testing
