// How long copies to a device take: made as the engine makes them, out of pinned memory on the
// device's copy stream. Blocks until they are done; stateless. Throws OutOfMemory where there is no
// memory to copy from, Error where the device fails.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "device/device.h"

namespace wsm {

// Mean seconds of a copy of each size, copies of one size back to back, out of `source_bytes` of
// fresh memory into `target` (device memory that nobody else uses). All sizes are above 0 and at
// most `target_bytes` and `source_bytes`.
std::vector<double> time_copies(Device& device, std::byte* target, uint64_t target_bytes,
                                uint64_t source_bytes, const std::vector<uint64_t>& sizes);

}  // namespace wsm
