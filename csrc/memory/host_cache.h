// The host cache: pinned memory that keeps the chunks whose home is the host.
//
// Each chunk has a fixed place (Chunk::cache_offset), is read into it once, and stays. A fixed set,
// not LRU: layers are used in a cycle, and LRU on a cycle larger than the cache never hits.
//
// Pinning is slow and need not be waited for: a thread prepares the memory segment by segment, a
// little ahead of what was asked for, while reads fill the segments before. So memory is taken as
// it is used, and the first bytes need not wait for the last page.
//
// Lifecycle: owned by the engine; `ready` and `mark_filled` are the conductor's. `stop`, and the
// destructor, end the thread: `prepared` is not called after that.
// Failure: what cannot be page-locked stays pageable (see PinnedBuffer).
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "device/device.h"
#include "memory/pinned_buffer.h"
#include "plan/plan.h"

namespace wsm {

class HostCache {
 public:
  // `prepared` is called on the cache's thread each time that more places are ready.
  HostCache(Device& device, const Plan& plan, std::function<void()> prepared);
  ~HostCache();

  void stop();

  // Whether the chunk's place may be read into. If not, it will be: `prepared` tells when.
  bool ready(const Chunk& chunk);
  std::byte* place(const Chunk& chunk) const { return buffer_->data() + chunk.cache_offset; }
  bool filled(uint32_t chunk) const { return filled_[chunk]; }
  void mark_filled(uint32_t chunk) { filled_[chunk] = true; }  // its bytes are all there
  const PinnedBuffer& buffer() const { return *buffer_; }

 private:
  void prepare();

  std::unique_ptr<PinnedBuffer> buffer_;
  std::function<void()> prepared_;
  std::vector<bool> filled_;  // by index into Plan::chunks
  std::mutex mutex_;
  std::condition_variable asked_;
  uint64_t wanted_bytes_ = 0;  // of the buffer, from its start; guarded by mutex_
  bool stop_ = false;          // guarded by mutex_
  std::thread thread_;
};

}  // namespace wsm
