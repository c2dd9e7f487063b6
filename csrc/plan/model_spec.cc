#include "plan/model_spec.h"

#include <algorithm>

#include "plan/plan.h"
#include "util/align.h"
#include "util/check.h"

namespace wsm {
namespace {

// Direct reads need 512 to 64 KiB. Beyond this a chunk could not be aligned inside a segment.
constexpr uint32_t kMaxReadAlignment = 16 * kMiB;
// File offsets are signed, and sums of two sizes below this never overflow.
constexpr uint64_t kMaxBytes = INT64_MAX / 2;

// a + b <= limit, for any a and b.
bool sum_within(uint64_t a, uint64_t b, uint64_t limit) {
  uint64_t sum = 0;
  return !__builtin_add_overflow(a, b, &sum) && sum <= limit;
}

void validate_counts(const ModelSpec& spec) {
  check(spec.shards.size() < kNone, "too many shards: ", spec.shards.size());
  check(spec.tensors.size() < kNone, "too many tensors: ", spec.tensors.size());
  check(spec.units.size() < kNone, "too many units: ", spec.units.size());
}

void validate_shard(const ShardSpec& shard) {
  check(shard.bytes <= kMaxBytes, "shard ", shard.path, ": ", shard.bytes,
        " bytes are more than a file can have");
  const uint32_t alignment = shard.alignment;
  check(alignment > 0 && (alignment & (alignment - 1)) == 0 && alignment <= kMaxReadAlignment,
        "shard ", shard.path, ": alignment ", alignment, " is not a power of two up to ",
        kMaxReadAlignment);
}

void validate_extent(const ModelSpec& spec, const TensorSpec& tensor, const Extent& extent) {
  check(extent.shard < spec.shards.size(), "tensor ", tensor.name, ": an extent is in shard ",
        extent.shard, ", but there are only ", spec.shards.size(), " shards");
  const ShardSpec& shard = spec.shards[extent.shard];
  check(sum_within(extent.offset, extent.bytes, shard.bytes), "tensor ", tensor.name,
        ": an extent of ", extent.bytes, " bytes at offset ", extent.offset, " ends outside shard ",
        shard.path, " of ", shard.bytes, " bytes");
  check(sum_within(extent.tensor_offset, extent.bytes, tensor.bytes), "tensor ", tensor.name,
        ": an extent of ", extent.bytes, " bytes at place ", extent.tensor_offset,
        " ends outside the tensor of ", tensor.bytes, " bytes");
}

// The extents, in the order of their places, must meet end to end.
void validate_cover(const TensorSpec& tensor) {
  std::vector<const Extent*> extents;
  for (const Extent& extent : tensor.extents) {
    if (extent.bytes > 0) extents.push_back(&extent);
  }
  std::sort(extents.begin(), extents.end(),
            [](const Extent* a, const Extent* b) { return a->tensor_offset < b->tensor_offset; });
  uint64_t covered = 0;
  for (const Extent* extent : extents) {
    check(extent->tensor_offset >= covered, "tensor ", tensor.name, ": two extents bring byte ",
          extent->tensor_offset);
    check(extent->tensor_offset == covered, "tensor ", tensor.name, ": no extent brings byte ",
          covered);
    covered += extent->bytes;
  }
  check(covered == tensor.bytes, "tensor ", tensor.name, ": no extent brings byte ", covered,
        " of ", tensor.bytes);
  check(tensor.parameter_bytes == 0 || tensor.bytes > 0, "tensor ", tensor.name, ": ",
        tensor.parameter_bytes, " bytes cannot be made of none");
}

// Bounds what a pass brings: every sum that the planner makes over units or tensors stays below it.
void validate_units(const ModelSpec& spec) {
  std::vector<uint32_t> last_unit(spec.tensors.size(), kNone);
  uint64_t pass_bytes = 0;
  for (uint32_t u = 0; u < spec.units.size(); ++u) {
    const UnitSpec& unit = spec.units[u];
    for (const uint32_t t : unit.tensors) {
      check(t < spec.tensors.size(), "unit ", unit.name, ": tensor ", t,
            " does not exist, there are only ", spec.tensors.size(), " tensors");
      const TensorSpec& tensor = spec.tensors[t];
      check(last_unit[t] != u, "unit ", unit.name, ": tensor ", tensor.name, " is in it twice");
      last_unit[t] = u;
      for (const uint64_t bytes : {tensor.bytes, tensor.parameter_bytes}) {
        check(sum_within(pass_bytes, bytes, kMaxBytes) &&
                  sum_within(pass_bytes, align_up(bytes, kTensorAlignment), kMaxBytes),
              "unit ", unit.name, ": with tensor ", tensor.name, " of ", bytes,
              " bytes the size of the model overflows");
        pass_bytes += align_up(bytes, kTensorAlignment);
      }
    }
  }
}

}  // namespace

void validate(const ModelSpec& spec) {
  validate_counts(spec);
  for (const ShardSpec& shard : spec.shards) validate_shard(shard);
  for (const TensorSpec& tensor : spec.tensors) {
    for (const Extent& extent : tensor.extents) validate_extent(spec, tensor, extent);
    validate_cover(tensor);
  }
  validate_units(spec);
}

}  // namespace wsm
