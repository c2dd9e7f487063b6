// What a block costs in device memory, as torch's caching allocator takes it.
//
//   up to 1 MiB    a 2 MiB segment
//   below 10 MiB   a 20 MiB segment
//   from 10 MiB    rounded up to 2 MiB
//
// A block between 1 and 10 MiB is cheaper when 10 MiB are asked for. The planner asks so where it
// may, which also makes the cost grow with the bytes, as its searches need.
#pragma once

#include <cstdint>

namespace wsm {

// How many bytes to ask for to get `bytes`, where at most `limit` may be asked for.
uint64_t block_request_bytes(uint64_t bytes, uint64_t limit);

// What is taken for `bytes`, asked for as above.
uint64_t block_cost_bytes(uint64_t bytes, uint64_t limit);

// The most bytes, up to `limit`, whose cost is within `room`.
uint64_t largest_block_bytes(uint64_t room, uint64_t limit);

}  // namespace wsm
