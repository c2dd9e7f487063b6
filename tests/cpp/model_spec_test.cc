#include "plan/model_spec.h"

#include <gtest/gtest.h>

#include "support/contains.h"
#include "util/check.h"

namespace wsm {
namespace {

using testing::contains;

// One shard of 100 bytes, two tensors of 40 and 60, one unit.
ModelSpec small_model() {
  ModelSpec spec;
  spec.shards = {{"a.safetensors", 100, 4096}};
  spec.tensors = {{"x", 40, {{0, 0, 40, 0}}}, {"y", 60, {{0, 40, 60, 0}}}};
  spec.units = {{"layer", "layer=0", {0, 1}, false}};
  return spec;
}

std::string refusal(const ModelSpec& spec) {
  try {
    validate(spec);
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "accepted";
}

TEST(ModelSpec, AcceptsSoundModels) {
  EXPECT_EQ(refusal(small_model()), "accepted");
  EXPECT_EQ(refusal(ModelSpec{}), "accepted");
}

TEST(ModelSpec, AcceptsPartsInAnyOrderAndSharedBytes) {
  ModelSpec spec = small_model();
  spec.tensors[0] = {"x", 40, {{0, 50, 10, 30}, {0, 20, 30, 0}, {0, 7, 0, 12}}};
  EXPECT_EQ(refusal(spec), "accepted");
}

TEST(ModelSpec, AcceptsTensorsOfNoBytes) {
  ModelSpec spec = small_model();
  spec.tensors[0] = {"x", 0, {}};
  EXPECT_EQ(refusal(spec), "accepted");
}

TEST(ModelSpec, AcceptsATensorInSeveralUnits) {
  ModelSpec spec = small_model();
  spec.units.push_back({"head", "unit=head", {0}, false});
  EXPECT_EQ(refusal(spec), "accepted");
}

TEST(ModelSpec, RefusesBadAlignment) {
  for (const uint32_t alignment : {0u, 3u, 4097u, 32u << 20}) {
    ModelSpec spec = small_model();
    spec.shards[0].alignment = alignment;
    EXPECT_TRUE(contains(refusal(spec), "shard a.safetensors: alignment"));
  }
}

TEST(ModelSpec, RefusesAShardLargerThanAnyFile) {
  ModelSpec spec = small_model();
  spec.shards[0].bytes = UINT64_MAX;
  EXPECT_TRUE(contains(refusal(spec), "shard a.safetensors"));
}

TEST(ModelSpec, RefusesAnUnknownShard) {
  ModelSpec spec = small_model();
  spec.tensors[1].extents[0].shard = 1;
  EXPECT_TRUE(contains(refusal(spec), "tensor y: an extent is in shard 1"));
}

TEST(ModelSpec, RefusesAnExtentOutsideItsShard) {
  ModelSpec spec = small_model();
  spec.tensors[1].extents[0].offset = 41;
  EXPECT_TRUE(contains(refusal(spec), "ends outside shard a.safetensors of 100 bytes"));
  spec.tensors[1].extents[0].offset = UINT64_MAX - 10;  // offset + bytes wraps round
  EXPECT_TRUE(contains(refusal(spec), "ends outside shard a.safetensors of 100 bytes"));
}

TEST(ModelSpec, RefusesAnExtentOutsideItsTensor) {
  ModelSpec spec = small_model();
  spec.tensors[1].extents[0].tensor_offset = 1;
  EXPECT_TRUE(contains(refusal(spec), "ends outside the tensor of 60 bytes"));
  spec.tensors[1].extents[0].tensor_offset = UINT64_MAX - 10;
  EXPECT_TRUE(contains(refusal(spec), "ends outside the tensor of 60 bytes"));
}

TEST(ModelSpec, RefusesATensorWithAHole) {
  ModelSpec spec = small_model();
  spec.tensors[1].extents = {{0, 40, 20, 0}, {0, 61, 39, 21}};
  EXPECT_TRUE(contains(refusal(spec), "tensor y: no extent brings byte 20"));
  spec.tensors[1].extents = {{0, 40, 59, 1}};
  EXPECT_TRUE(contains(refusal(spec), "tensor y: no extent brings byte 0"));
  spec.tensors[1].extents = {{0, 40, 59, 0}};
  EXPECT_TRUE(contains(refusal(spec), "tensor y: no extent brings byte 59 of 60"));
  spec.tensors[1].extents = {};
  EXPECT_TRUE(contains(refusal(spec), "tensor y: no extent brings byte 0 of 60"));
}

TEST(ModelSpec, RefusesATensorCoveredTwice) {
  ModelSpec spec = small_model();
  spec.tensors[1].extents = {{0, 0, 31, 0}, {0, 40, 30, 30}};
  EXPECT_TRUE(contains(refusal(spec), "tensor y: two extents bring byte 30"));
  spec.tensors[1].extents = {{0, 0, 60, 0}, {0, 40, 60, 0}};
  EXPECT_TRUE(contains(refusal(spec), "tensor y: two extents bring byte 0"));
}

TEST(ModelSpec, RefusesAnUnknownTensor) {
  ModelSpec spec = small_model();
  spec.units[0].tensors = {0, 2};
  EXPECT_TRUE(contains(refusal(spec), "unit layer: tensor 2 does not exist"));
}

TEST(ModelSpec, RefusesATensorTwiceInAUnit) {
  ModelSpec spec = small_model();
  spec.units[0].tensors = {0, 1, 0};
  EXPECT_TRUE(contains(refusal(spec), "unit layer: tensor x is in it twice"));
}

TEST(ModelSpec, RefusesAPassWhoseSizeOverflows) {
  const uint64_t huge = INT64_MAX / 2;
  ModelSpec spec;
  spec.shards = {{"a.safetensors", huge, 1}};
  for (uint32_t t = 0; t < 3; ++t)
    spec.tensors.push_back({"t", huge - 255, {{0, 0, huge - 255, 0}}});
  spec.units = {{"layer", "layer=0", {0, 1, 2}, false}};
  EXPECT_TRUE(contains(refusal(spec), "unit layer: with tensor t"));
}

TEST(ModelSpec, RefusesATransformOfNothingOrOfTooMuch) {
  ModelSpec spec = small_model();
  spec.tensors[0].parameter_bytes = 80;
  EXPECT_EQ(refusal(spec), "accepted");
  spec.tensors[0].parameter_bytes = UINT64_MAX;
  EXPECT_TRUE(contains(refusal(spec), "unit layer: with tensor x"));
  spec.tensors[0] = {"x", 0, {}, 80};
  EXPECT_TRUE(contains(refusal(spec), "tensor x: 80 bytes cannot be made of none"));
}

TEST(ModelSpec, RefusesATensorAsLargeAsTheAddressSpace) {
  const uint64_t part = 1ull << 61;
  ModelSpec spec;
  spec.shards = {{"a.safetensors", part, 1}};
  TensorSpec tensor{"t", UINT64_MAX, {}};
  for (uint64_t i = 0; i < 8; ++i)
    tensor.extents.push_back({0, 0, i < 7 ? part : part - 1, i * part});
  spec.tensors = {tensor};
  spec.units = {{"layer", "layer=0", {0}, false}};
  EXPECT_TRUE(contains(refusal(spec), "overflows"));
}

}  // namespace
}  // namespace wsm
