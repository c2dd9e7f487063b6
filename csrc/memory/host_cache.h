// The host cache: pinned memory that keeps the chunks whose home is the host.
//
// Each chunk has a fixed place (Chunk::cache_offset), is read into it once, and stays. A fixed set,
// not LRU: layers are used in a cycle, and LRU on a cycle larger than the cache never hits.
// Lifecycle: owned by the engine, used by the conductor thread alone.
#pragma once

#include <cstdint>
#include <vector>

#include "device/device.h"
#include "memory/pinned_buffer.h"
#include "plan/plan.h"

namespace wsm {

class HostCache {
 public:
  HostCache(Device& device, const Plan& plan);

  std::byte* place(const Chunk& chunk) const { return buffer_.data() + chunk.cache_offset; }
  bool filled(uint32_t chunk) const { return filled_[chunk]; }
  void mark_filled(uint32_t chunk) { filled_[chunk] = true; }  // its bytes are all there
  const PinnedBuffer& buffer() const { return buffer_; }

 private:
  PinnedBuffer buffer_;
  std::vector<bool> filled_;  // by index into Plan::chunks
};

}  // namespace wsm
