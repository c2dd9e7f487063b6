// Models for the planner's tests: hand-made, uniform and random.
#pragma once

#include <algorithm>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "plan/model_spec.h"
#include "util/align.h"

namespace wsm::testing {

// Writes tensors one after another into shards.
class ModelBuilder {
 public:
  ModelSpec spec;

  void shard(const std::string& path, uint32_t alignment = 4096, uint64_t header_bytes = 0) {
    spec.shards.push_back({path, header_bytes, alignment});
  }

  // A tensor at the end of the last shard.
  uint32_t tensor(const std::string& name, uint64_t bytes, uint64_t gap = 0) {
    return tensor_in_parts(name, {bytes}, gap);
  }

  // A tensor whose parts lie in the last shard, `gap` bytes before each.
  uint32_t tensor_in_parts(const std::string& name, const std::vector<uint64_t>& parts,
                           uint64_t gap) {
    TensorSpec tensor;
    tensor.name = name;
    ShardSpec& shard = spec.shards.back();
    for (const uint64_t bytes : parts) {
      shard.bytes += gap;
      tensor.extents.push_back({.shard = static_cast<uint32_t>(spec.shards.size() - 1),
                                .offset = shard.bytes,
                                .bytes = bytes,
                                .tensor_offset = tensor.bytes});
      shard.bytes += bytes;
      tensor.bytes += bytes;
    }
    spec.tensors.push_back(tensor);
    return static_cast<uint32_t>(spec.tensors.size() - 1);
  }

  void unit(const std::string& name, std::vector<uint32_t> tensors, bool encloses_units = false) {
    spec.units.push_back({name, "unit=" + name, std::move(tensors), encloses_units});
  }
};

inline ModelSpec uniform_model(uint32_t layers, uint32_t tensors, uint64_t tensor_bytes) {
  ModelBuilder model;
  model.shard("model.safetensors", 4096, 1000);
  for (uint32_t layer = 0; layer < layers; ++layer) {
    std::vector<uint32_t> members;
    for (uint32_t t = 0; t < tensors; ++t) {
      members.push_back(
          model.tensor("layers." + std::to_string(layer) + "." + std::to_string(t), tensor_bytes));
    }
    model.unit("layers." + std::to_string(layer), members);
  }
  return model.spec;
}

// Odd sizes, gaps, several shards, parts in any order, tied and transformed tensors, exclusive and
// empty units.
inline ModelSpec random_model(std::mt19937_64& random, uint64_t scale_bytes) {
  const auto below = [&](uint64_t n) { return random() % n; };
  ModelBuilder model;
  const auto random_bytes = [&] {
    switch (below(5)) {
      case 0:
        return below(3);
      case 1:
        return below(5000);
      case 2:
        return align_up(below(scale_bytes) + 1, 4096);
      default:
        return below(scale_bytes) + 1;
    }
  };
  const auto new_shard = [&] {
    const uint32_t alignments[] = {1, 512, 4096, 65536};
    model.shard("shard" + std::to_string(model.spec.shards.size()), alignments[below(4)],
                below(5000));
  };
  new_shard();
  const uint64_t units = 1 + below(20);
  for (uint64_t u = 0; u < units; ++u) {
    std::vector<uint32_t> members;
    const uint64_t tensors = below(6);
    for (uint64_t t = 0; t < tensors; ++t) {
      if (below(10) == 0) new_shard();
      const std::string name = "t" + std::to_string(model.spec.tensors.size());
      std::vector<uint64_t> parts(below(4) == 0 ? 1 + below(4) : 1);
      for (uint64_t& part : parts) part = random_bytes();
      members.push_back(model.tensor_in_parts(name, parts, below(3) == 0 ? below(200000) : 0));
    }
    for (uint64_t tied = below(8) == 0 ? 2 : 0; tied > 0 && !model.spec.tensors.empty(); --tied) {
      const auto t = static_cast<uint32_t>(below(model.spec.tensors.size()));
      if (std::find(members.begin(), members.end(), t) == members.end()) members.push_back(t);
    }
    model.unit("u" + std::to_string(u), members, below(8) == 0);
  }
  for (TensorSpec& tensor : model.spec.tensors) {
    std::shuffle(tensor.extents.begin(), tensor.extents.end(), random);
    if (below(10) == 0) {
      tensor.extents = model.spec.tensors[0].extents;  // the same bytes under two names
      tensor.bytes = model.spec.tensors[0].bytes;
    }
    const uint64_t mixed = tensor.bytes * 0x9E3779B97F4A7C15ull >> 32;
    if (mixed % 8 == 0 && tensor.bytes > 0) tensor.parameter_bytes = 1 + mixed % (2 * tensor.bytes);
  }
  return model.spec;
}

}  // namespace wsm::testing
