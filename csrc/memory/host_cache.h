// The host cache: pinned memory that keeps the chunks whose home is the host.
//
// Each chunk has a fixed place (Chunk::cache_offset), is read into it once, and stays. A fixed set,
// not LRU: layers are used in a cycle, and LRU on a cycle larger than the cache never hits.
//
// Pinning is slow and need not be waited for: a thread prepares the memory segment by segment, a
// little ahead of what was asked for, while reads fill the segments before. So memory is taken as
// it is used, and the first bytes need not wait for the last page.
//
// A cache may take over the memory of the one before it: the bytes that the new plan wants where
// they are stay, the memory is cut or another piece is added behind it.
//
// Lifecycle: owned by the engine; `ready` and `mark_filled` are the conductor's. `stop`, and the
// destructor, end the thread: `prepared` is not called after that.
// Failure: what cannot be page-locked stays pageable (see PinnedBuffer). An error of the thread is
// thrown by `ready`, for places that it has not come to.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "device/device.h"
#include "memory/pinned_buffer.h"
#include "plan/kept_cache.h"
#include "plan/plan.h"
#include "util/mutex.h"

namespace wsm {

class HostCache {
 public:
  // `prepared` is called on the cache's thread each time that more places are ready. `before` is
  // stopped, was made on the same device, and holds `kept`.
  HostCache(Device& device, const Plan& plan, std::function<void()> prepared,
            std::unique_ptr<HostCache> before = nullptr, const KeptCache& kept = {});
  ~HostCache();

  void stop();

  // Whether the chunk's place may be read into. If not, it will be: `prepared` tells when.
  bool ready(const Chunk& chunk);
  std::byte* data(const Chunk& chunk) const;
  bool filled(uint32_t chunk) const { return filled_[chunk]; }
  void mark_filled(uint32_t chunk) { filled_[chunk] = true; }  // its bytes are all there
  void forget(uint32_t chunk) { filled_[chunk] = false; }      // its bytes are to be read again
  // What is filled, for a plan that takes the cache over.
  KeptCache kept(const Plan& plan) const;

  uint64_t mapped_bytes() const;
  uint64_t pinned_bytes() const;
  uint64_t prepared_bytes() const;
  std::vector<std::string> warnings() const;

 private:
  struct Buffer {
    uint64_t begin = 0;  // in the cache
    std::unique_ptr<PinnedBuffer> memory;
  };

  void inherit(HostCache& before, const Plan& plan, const KeptCache& kept);
  void add_buffer(Device& device, const Plan& plan, uint64_t begin);
  const Buffer& buffer_at(uint64_t cache_offset) const;
  void check_in_one_buffer(const Chunk& chunk) const;
  bool prepare_next();
  void prepare();

  std::vector<Buffer> buffers_;  // ascending
  std::function<void()> prepared_;
  std::vector<bool> filled_;  // by index into Plan::chunks
  Mutex mutex_;
  CondVar asked_;
  uint64_t wanted_bytes_ GUARDED_BY(mutex_) = 0;  // of the cache, from its start
  bool stop_ GUARDED_BY(mutex_) = false;
  std::string failure_ GUARDED_BY(mutex_);  // what ended the thread
  std::thread thread_;
};

}  // namespace wsm
