#include "memory/host_cache.h"

#include <utility>

namespace wsm {
namespace {

constexpr uint64_t kAheadBytes = 2 * kSegmentBytes;

}  // namespace

HostCache::HostCache(Device& device, const Plan& plan, std::function<void()> prepared)
    : buffer_(PinnedBuffer::unprepared(device, plan.cache_bytes, plan.cache_segments)),
      prepared_(std::move(prepared)),
      filled_(plan.chunks.size()) {
  if (plan.cache_bytes > 0) thread_ = std::thread([this] { prepare(); });
}

HostCache::~HostCache() { stop(); }

void HostCache::stop() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  asked_.notify_one();
  if (thread_.joinable()) thread_.join();
}

bool HostCache::ready(const Chunk& chunk) {
  const uint64_t end = chunk.cache_offset + chunk.read_bytes;
  const bool ready = buffer_->prepared_bytes() >= end;
  if (buffer_->prepared_bytes() < buffer_->bytes()) {
    std::lock_guard lock(mutex_);
    if (end + kAheadBytes <= wanted_bytes_) return ready;
    wanted_bytes_ = end + kAheadBytes;
    asked_.notify_one();
  }
  return ready;
}

void HostCache::prepare() {
  std::unique_lock lock(mutex_);
  while (true) {
    asked_.wait(lock, [&] { return stop_ || buffer_->prepared_bytes() < wanted_bytes_; });
    if (stop_) return;
    lock.unlock();
    if (!buffer_->prepare_next()) return;
    prepared_();
    lock.lock();
  }
}

}  // namespace wsm
