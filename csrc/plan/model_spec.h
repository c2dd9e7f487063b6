// What is to be streamed: shards, tensor images and units. Plain structs; the planner's input.
//
// These values come from untrusted checkpoints by way of Python. `validate` is the one gate through
// which they enter C++: after it, every index is in range and no sum overflows.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace wsm {

// One shard: a safetensors file, or a tensor that already lies in RAM.
struct ShardSpec {
  std::string path;        // for RAM: the parameter's name
  uint64_t bytes = 0;      // size of the file, or of the memory
  uint32_t alignment = 1;  // what direct reads of it need (offset, length, address); 1 for RAM
  bool in_memory = false;  // RAM, or a file of tmpfs: read as fast as memory can be copied
};

// A byte range in a shard, with its place inside the tensor.
struct Extent {
  uint32_t shard = 0;
  uint64_t offset = 0;  // in the shard
  uint64_t bytes = 0;
  uint64_t tensor_offset = 0;  // in the tensor
};

// A tensor image: where one parameter's bytes come from. The extents cover it exactly once.
struct TensorSpec {
  std::string name;
  uint64_t bytes = 0;
  std::vector<Extent> extents;
  // The parameter's own size where it is made of the image by an arrival transform (a cast, a
  // transpose); 0 where the image is the parameter.
  uint64_t parameter_bytes = 0;
};

// What is loaded and released together.
struct UnitSpec {
  std::string name;   // the module's qualified name
  std::string label;  // in log lines: "layer=6", "layer=6 group=attn", "unit=lm_head"
  std::vector<uint32_t>
      tensors;  // indices into ModelSpec::tensors; tied tensors occur in several units
  // The unit's module holds other units: it stays acquired while they come and go, so its place in
  // the arena is shared with no other unit.
  bool encloses_units = false;
};

struct ModelSpec {
  std::vector<ShardSpec> shards;
  std::vector<TensorSpec> tensors;
  std::vector<UnitSpec> units;  // in registration order: the order of use that is assumed at first
};

// Throws InvalidArgument naming the tensor, unit or shard: an index out of range, an extent outside
// its shard or tensor, a tensor not covered exactly once, a unit with a tensor twice, a size that
// overflows.
void validate(const ModelSpec& spec);

}  // namespace wsm
