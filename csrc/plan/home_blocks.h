// Resident tensors are kept in blocks of device memory, so that a later plan can give some back
// and keep the others where they are.
//
//   block   | tensor | tensor | tensor |        closed as soon as it has 256 MiB
//   block   |         large tensor              |
//
// Tensors go into blocks in the order in which they become resident: a plan with more memory keeps
// the blocks of one with less, and adds some.
#pragma once

#include <cstdint>

#include "util/align.h"

namespace wsm {

inline constexpr uint64_t kHomeBlockBytes = 256 * kMiB;

// What tensors cost that were added one after another. Sizes are multiples of 256.
class HomeBlocks {
 public:
  // At most `limit` bytes may be asked for in all.
  explicit HomeBlocks(uint64_t limit = UINT64_MAX) : limit_(limit) {}

  // True when the tensor begins a new block.
  bool add(uint64_t tensor_bytes);
  HomeBlocks with(uint64_t tensor_bytes) const;

  uint64_t bytes() const { return closed_bytes_ + open_bytes_; }
  uint64_t cost_bytes() const;          // as the allocator takes them
  uint64_t open_request_bytes() const;  // to ask for, for the last block

 private:
  uint64_t limit_;
  uint64_t closed_bytes_ = 0;
  uint64_t closed_cost_ = 0;
  uint64_t open_bytes_ = 0;
};

}  // namespace wsm
