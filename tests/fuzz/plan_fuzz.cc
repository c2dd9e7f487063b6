// A model and limits made of a fuzzer's bytes go through the gate and the planner: either they are
// refused with InvalidArgument, or the plan holds what every plan must (support/plan_checks.h).
//
// What would rightly take a while, a plan of many reads, is left out.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

#include "input.h"
#include "plan/best_plan.h"
#include "plan/planner.h"
#include "plan/simulate.h"
#include "support/plan_checks.h"
#include "util/align.h"
#include "util/check.h"

namespace wsm::fuzzing {
namespace {

constexpr uint64_t kUsualPieces = 48;
constexpr uint64_t kMostPieces = 1024;
constexpr uint64_t kLeastChunk = 64 * kKiB;

// Tensors one after another in the last shard, as a sound checkpoint has them. A flaw is put in
// here and there: one number becomes any other.
class ModelMaker {
 public:
  explicit ModelMaker(Input& in) : in_(in), flawed_(in.once_in(4)), any_size_(in.once_in(4)) {}

  ModelSpec make() {
    const uint32_t shards = 1 + in_.below(3);
    for (uint32_t s = 0; s < shards; ++s) add_shard();
    const uint32_t units = in_.below(10);
    for (uint32_t u = 0; u < units && !in_.empty(); ++u) add_unit();
    return std::move(spec_);
  }

 private:
  uint64_t size() { return any_size_ && in_.once_in(4) ? in_.size() : in_.small_size(); }

  template <typename T>
  void maybe_spoil(T& number) {
    if (flawed_ && in_.once_in(8)) number = static_cast<T>(in_.size());
  }

  void add_shard() {
    ShardSpec shard{concat("s", spec_.shards.size()), in_.take<uint16_t>(), 1u << in_.below(17)};
    maybe_spoil(shard.bytes);
    maybe_spoil(shard.alignment);
    spec_.shards.push_back(shard);
  }

  Extent next_extent(uint64_t tensor_offset) {
    Extent extent{.shard = in_.below(static_cast<uint32_t>(spec_.shards.size())),
                  .bytes = size(),
                  .tensor_offset = tensor_offset};
    ShardSpec& shard = spec_.shards[extent.shard];
    if (in_.once_in(4)) shard.bytes += in_.take<uint32_t>() % (256 * kKiB);  // a gap
    extent.offset = shard.bytes;
    shard.bytes += extent.bytes;
    return extent;
  }

  void add_tensor() {
    TensorSpec tensor;
    tensor.name = concat("t", spec_.tensors.size());
    const bool again = !spec_.tensors.empty() && in_.once_in(8);
    if (again) {  // the same bytes under two names
      const auto other = in_.below(static_cast<uint32_t>(spec_.tensors.size()));
      tensor.extents = spec_.tensors[other].extents;
      tensor.bytes = spec_.tensors[other].bytes;
    }
    for (uint32_t parts = again ? 0 : 1 + in_.below(16) / 13; parts > 0; --parts) {
      tensor.extents.push_back(next_extent(tensor.bytes));
      tensor.bytes += tensor.extents.back().bytes;
    }
    if (in_.once_in(8)) std::reverse(tensor.extents.begin(), tensor.extents.end());
    if (in_.once_in(8)) tensor.parameter_bytes = size();
    spoil(tensor);
    spec_.tensors.push_back(std::move(tensor));
  }

  void spoil(TensorSpec& tensor) {
    maybe_spoil(tensor.bytes);
    maybe_spoil(tensor.parameter_bytes);
    for (Extent& extent : tensor.extents) {
      maybe_spoil(extent.shard);
      maybe_spoil(extent.offset);
      maybe_spoil(extent.bytes);
      maybe_spoil(extent.tensor_offset);
    }
  }

  void add_unit() {
    const std::string name = concat("u", spec_.units.size());
    UnitSpec unit{name, concat("unit=", name), {}, in_.once_in(8)};
    for (uint32_t count = in_.below(5); count > 0 && !in_.empty(); --count) {
      add_tensor();
      unit.tensors.push_back(static_cast<uint32_t>(spec_.tensors.size() - 1));
      maybe_spoil(unit.tensors.back());
    }
    if (!spec_.tensors.empty() && in_.once_in(6)) {  // tied
      const auto tied = in_.below(static_cast<uint32_t>(spec_.tensors.size()));
      if (std::ranges::count(unit.tensors, tied) == 0 || flawed_) unit.tensors.push_back(tied);
    }
    spec_.units.push_back(std::move(unit));
  }

  Input& in_;
  const bool flawed_;
  const bool any_size_;
  ModelSpec spec_;
};

// The bytes that units name, each use counted; most of them where that overflows.
uint64_t used_bytes(const ModelSpec& spec) {
  uint64_t sum = 0;
  for (const UnitSpec& unit : spec.units) {
    for (const uint32_t t : unit.tensors) {
      if (t >= spec.tensors.size()) continue;
      if (__builtin_add_overflow(sum, spec.tensors[t].bytes, &sum)) return UINT64_MAX;
    }
  }
  return sum;
}

// Up to a little more than the model, or anything.
uint64_t budget(Input& in, uint64_t model_bytes) {
  const uint8_t kind = in.byte();
  if (kind % 8 == 0) return in.size();
  if (kind % 8 == 1) return UINT64_MAX / 2;
  const uint64_t most = std::min<uint64_t>(model_bytes, 1ull << 40) + 64 * kMiB;
  return in.take<uint32_t>() * (most / UINT16_MAX) / UINT16_MAX;
}

PlanLimits make_limits(Input& in, uint64_t model_bytes) {
  PlanLimits limits;
  limits.device_bytes = budget(in, model_bytes);
  limits.host_bytes = budget(in, model_bytes);
  const uint8_t set = in.byte();
  if (set & 1) limits.arena_bytes = budget(in, model_bytes);
  if (set & 2) limits.home_bytes = budget(in, model_bytes);
  if (set & 4) limits.staging_bytes = budget(in, model_bytes);
  if (set & 8) limits.cache_bytes = budget(in, model_bytes);
  if (set & 16) limits.chunk_bytes = in.size();
  if (set & 32) limits.lookahead_units = in.once_in(8) ? in.take<uint32_t>() : in.below(6);
  if (set & 64) limits.seam_units = in.once_in(8) ? in.take<uint32_t>() : in.below(6);
  if (set & 128) limits.read_ahead_bytes = in.size();
  return limits;
}

// What the plan's cache holds of each chunk, or does not hold yet.
KeptCache kept_of(Input& in, const Plan& plan) {
  KeptCache kept;
  kept.segments = plan.cache_segments;
  kept.cut_bytes = plan.cut_bytes;
  for (const Chunk& chunk : plan.chunks) {
    if (chunk.home != Home::kHost || in.once_in(4)) continue;
    kept.extents.push_back({chunk.shard, chunk.read_offset, chunk.read_bytes, chunk.cache_offset});
  }
  return kept;
}

// Chunks in the cache lie apart, each inside one segment.
void expect_cache_sound(const Plan& plan) {
  std::vector<std::pair<uint64_t, uint64_t>> places;
  for (const Chunk& chunk : plan.chunks) {
    if (chunk.home != Home::kHost) continue;
    const uint64_t end = chunk.cache_offset + chunk.read_bytes;
    places.emplace_back(chunk.cache_offset, end);
    const auto segment = std::upper_bound(plan.cache_segments.begin(), plan.cache_segments.end(),
                                          chunk.cache_offset);
    ASSERT_NE(segment, plan.cache_segments.end());
    EXPECT_LE(end, *segment);
  }
  EXPECT_EQ(plan.cache_bytes, plan.cache_segments.empty() ? 0 : plan.cache_segments.back());
}

// The plan after this one, with other budgets, which takes the cache over.
void resize(Input& in, const ModelSpec& spec, const Plan& before) {
  PlanLimits limits = make_limits(in, before.model_bytes);
  limits.kept_cache = kept_of(in, before);
  const Plan plan = make_plan(spec, limits);
  testing::expect_budgets_held(limits, plan);
  testing::expect_places_disjoint(spec, plan);
  testing::expect_tensors_placed(spec, plan);
  testing::expect_bytes_covered(spec, plan);
  expect_cache_sound(plan);
}

double rate(Input& in) { return in.once_in(16) ? in.take<double>() : 1e6 * (1 + in.byte()); }

Rates make_rates(Input& in, const ModelSpec& spec) {
  Rates rates;
  rates.disk_bytes_per_s = rate(in);
  rates.h2d_bytes_per_s = rate(in);
  if (in.once_in(8)) rates.copy_overhead_s = in.take<double>();
  if (in.once_in(8)) rates.unit_overhead_s = in.take<double>();
  if (in.once_in(2)) rates.compute_s.resize(spec.units.size(), 1e-3);
  if (in.once_in(8)) rates.compute_s.push_back(in.take<double>());
  rates.host_computes = in.once_in(2);
  return rates;
}

void simulate_some(Input& in, const ModelSpec& spec, const Plan& plan) {
  std::vector<uint32_t> order;
  for (uint32_t uses = in.below(24); uses > 0; --uses) {
    order.push_back(in.below(static_cast<uint32_t>(spec.units.size()) + in.once_in(16)));
  }
  const Simulated simulated = simulate(plan, make_rates(in, spec), order);
  EXPECT_GE(simulated.pass_s, 0);
  EXPECT_GE(simulated.first_pass_s, 0);
}

void plan_one(Input& in) {
  const ModelSpec spec = ModelMaker(in).make();
  const uint64_t model_bytes = used_bytes(spec);
  PlanLimits limits = make_limits(in, model_bytes);
  const uint8_t then = in.byte();
  const uint64_t most_pieces = then == 254 ? kMostPieces : kUsualPieces;
  if (model_bytes / kLeastChunk > most_pieces) {
    limits.chunk_bytes = kSegmentBytes;
    limits.host_bytes = std::max(limits.host_bytes, 2 * kSegmentBytes);
    limits.staging_bytes.reset();
    const uint64_t pieces = model_bytes / kSegmentBytes;
    if (pieces > most_pieces && pieces < 1ull << 25) return;
  }
  const Plan plan = make_plan(spec, limits);
  testing::expect_sound(spec, limits, plan);
  if (spec.units.empty()) return;
  if (then % 8 == 1) simulate_some(in, spec, plan);
  if (then % 8 == 2) resize(in, spec, plan);
  if (then == 255) {
    const Plan best = best_plan(spec, limits, make_rates(in, spec));
    testing::expect_budgets_held(limits, best);
    testing::expect_bytes_covered(spec, best);
  }
}

}  // namespace
}  // namespace wsm::fuzzing

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  GTEST_FLAG_SET(break_on_failure, true);
  wsm::fuzzing::Input in(data, size);
  try {
    wsm::fuzzing::plan_one(in);
  } catch (const wsm::InvalidArgument&) {
    return 0;
  }
  return 0;
}
