#include "memory/host_cache.h"

#include <algorithm>
#include <utility>

#include "util/check.h"
#include "util/threads.h"

namespace wsm {
namespace {

constexpr uint64_t kAheadBytes = 2 * kSegmentBytes;

}  // namespace

HostCache::HostCache(Device& device, const Plan& plan, std::function<void()> prepared,
                     std::unique_ptr<HostCache> before, const KeptCache& kept)
    : prepared_(std::move(prepared)), filled_(plan.chunks.size()) {
  if (before) inherit(*before, plan, kept);
  const uint64_t end =
      buffers_.empty() ? 0 : buffers_.back().begin + buffers_.back().memory->bytes();
  if (end < plan.cache_bytes) add_buffer(device, plan, end);
  for (const Chunk& chunk : plan.chunks) {
    if (!buffers_.empty() && chunk.home == Home::kHost) check_in_one_buffer(chunk);
  }
  if (plan.cache_bytes > 0) {
    thread_ = start_thread("wsm-cache", "the host cache", [this] { prepare(); });
  }
}

HostCache::~HostCache() { stop(); }

void HostCache::stop() {
  {
    const MutexLock lock(mutex_);
    stop_ = true;
  }
  asked_.notify_one();
  if (thread_.joinable()) thread_.join();
}

void HostCache::inherit(HostCache& before, const Plan& plan, const KeptCache& kept) {
  buffers_ = std::move(before.buffers_);
  while (!buffers_.empty() && buffers_.back().begin >= plan.cache_bytes) buffers_.pop_back();
  if (!buffers_.empty()) buffers_.back().memory->truncate(plan.cache_bytes - buffers_.back().begin);
  const KeptExtents extents(kept.extents, plan.cache_bytes);
  for (uint32_t c = 0; c < plan.chunks.size(); ++c) {
    const Chunk& chunk = plan.chunks[c];
    filled_[c] = chunk.home == Home::kHost && extents.find(chunk.shard, chunk.read_offset,
                                                           chunk.read_bytes) == chunk.cache_offset;
  }
}

void HostCache::add_buffer(Device& device, const Plan& plan, uint64_t begin) {
  std::vector<uint64_t> segments;
  for (const uint64_t end : plan.cache_segments) {
    if (end > begin) segments.push_back(end - begin);
  }
  buffers_.push_back(
      {begin, PinnedBuffer::unprepared(device, plan.cache_bytes - begin, std::move(segments))});
}

const HostCache::Buffer& HostCache::buffer_at(uint64_t cache_offset) const {
  const auto after =
      std::upper_bound(buffers_.begin(), buffers_.end(), cache_offset,
                       [](uint64_t at, const Buffer& buffer) { return at < buffer.begin; });
  return *(after - 1);
}

// A place in two pieces would never be ready.
void HostCache::check_in_one_buffer(const Chunk& chunk) const {
  const Buffer& buffer = buffer_at(chunk.cache_offset);
  check<Error>(
      chunk.cache_offset + chunk.read_bytes <= buffer.begin + buffer.memory->mapped_bytes(),
      "the plan puts a chunk at ", chunk.cache_offset, " of the host cache, across the end",
      " of a piece of memory that it was to take over");
}

std::byte* HostCache::data(const Chunk& chunk) const {
  const Buffer& buffer = buffer_at(chunk.cache_offset);
  return buffer.memory->data() + (chunk.cache_offset - buffer.begin);
}

bool HostCache::ready(const Chunk& chunk) {
  const uint64_t end = chunk.cache_offset + chunk.read_bytes;
  const Buffer& buffer = buffer_at(chunk.cache_offset);
  const bool ready = buffer.begin + buffer.memory->prepared_bytes() >= end;
  if (prepared_bytes() < mapped_bytes()) {
    const MutexLock lock(mutex_);
    check<Error>(ready || failure_.empty(), "the host cache has no more memory ready: ", failure_);
    if (end + kAheadBytes <= wanted_bytes_) return ready;
    wanted_bytes_ = end + kAheadBytes;
    asked_.notify_one();
  }
  return ready;
}

bool HostCache::prepare_next() {
  for (const Buffer& buffer : buffers_) {
    if (buffer.memory->prepare_next()) return true;
  }
  return false;
}

void HostCache::prepare() {
  try {
    const MutexLock lock(mutex_);
    while (true) {
      while (!stop_ && prepared_bytes() >= wanted_bytes_) asked_.wait(mutex_);
      if (stop_) return;
      const MutexUnlock unlocked(mutex_);
      if (!prepare_next()) return;
      prepared_();
    }
  } catch (const std::exception& error) {
    {
      const MutexLock lock(mutex_);
      failure_ = error.what();
    }
    prepared_();  // who waits for a place asks again, and is told
  }
}

KeptCache HostCache::kept(const Plan& plan) const {
  KeptCache kept{.segments = plan.cache_segments, .cut_bytes = plan.cut_bytes};
  for (uint32_t c = 0; c < plan.chunks.size(); ++c) {
    const Chunk& chunk = plan.chunks[c];
    if (chunk.home != Home::kHost || !filled_[c]) continue;
    kept.extents.push_back({chunk.shard, chunk.read_offset, chunk.read_bytes, chunk.cache_offset});
  }
  return kept;
}

uint64_t HostCache::mapped_bytes() const {
  uint64_t bytes = 0;
  for (const Buffer& buffer : buffers_) bytes += buffer.memory->mapped_bytes();
  return bytes;
}

uint64_t HostCache::pinned_bytes() const {
  uint64_t bytes = 0;
  for (const Buffer& buffer : buffers_) bytes += buffer.memory->pinned_bytes();
  return bytes;
}

uint64_t HostCache::prepared_bytes() const {
  uint64_t bytes = 0;
  for (const Buffer& buffer : buffers_) bytes += buffer.memory->prepared_bytes();
  return bytes;
}

std::vector<std::string> HostCache::warnings() const {
  std::vector<std::string> all;
  for (const Buffer& buffer : buffers_) {
    const std::vector<std::string> some = buffer.memory->warnings();
    all.insert(all.end(), some.begin(), some.end());
  }
  return all;
}

}  // namespace wsm
