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
  if (before) take_over(*before, plan, kept);
  const uint64_t end = pieces_.empty() ? 0 : pieces_.back().begin + pieces_.back().memory->bytes();
  if (end < plan.cache_bytes) add_piece(device, plan, end);
  for (const Chunk& chunk : plan.chunks) {
    if (!pieces_.empty() && chunk.home == Home::kHost) check_place(chunk);
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

void HostCache::take_over(HostCache& before, const Plan& plan, const KeptCache& kept) {
  pieces_ = std::move(before.pieces_);
  while (!pieces_.empty() && pieces_.back().begin >= plan.cache_bytes) pieces_.pop_back();
  if (!pieces_.empty()) pieces_.back().memory->truncate(plan.cache_bytes - pieces_.back().begin);
  const KeptRanges ranges(kept.ranges, plan.cache_bytes);
  for (uint32_t c = 0; c < plan.chunks.size(); ++c) {
    const Chunk& chunk = plan.chunks[c];
    filled_[c] = chunk.home == Home::kHost && ranges.find(chunk.shard, chunk.read_offset,
                                                          chunk.read_bytes) == chunk.cache_offset;
  }
}

void HostCache::add_piece(Device& device, const Plan& plan, uint64_t begin) {
  std::vector<uint64_t> segments;
  for (const uint64_t end : plan.cache_segments) {
    if (end > begin) segments.push_back(end - begin);
  }
  pieces_.push_back(
      {begin, PinnedBuffer::unprepared(device, plan.cache_bytes - begin, std::move(segments))});
}

const HostCache::Piece& HostCache::piece_at(uint64_t cache_offset) const {
  const auto after =
      std::upper_bound(pieces_.begin(), pieces_.end(), cache_offset,
                       [](uint64_t at, const Piece& piece) { return at < piece.begin; });
  return *(after - 1);
}

// A place in two pieces would never be ready.
void HostCache::check_place(const Chunk& chunk) const {
  const Piece& piece = piece_at(chunk.cache_offset);
  check<Error>(chunk.cache_offset + chunk.read_bytes <= piece.begin + piece.memory->mapped_bytes(),
               "the plan puts a chunk at ", chunk.cache_offset,
               " of the host cache, across the end",
               " of a piece of memory that it was to take over");
}

std::byte* HostCache::place(const Chunk& chunk) const {
  const Piece& piece = piece_at(chunk.cache_offset);
  return piece.memory->data() + (chunk.cache_offset - piece.begin);
}

bool HostCache::ready(const Chunk& chunk) {
  const uint64_t end = chunk.cache_offset + chunk.read_bytes;
  const Piece& piece = piece_at(chunk.cache_offset);
  const bool ready = piece.begin + piece.memory->prepared_bytes() >= end;
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
  for (const Piece& piece : pieces_) {
    if (piece.memory->prepare_next()) return true;
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
    kept.ranges.push_back({chunk.shard, chunk.read_offset, chunk.read_bytes, chunk.cache_offset});
  }
  return kept;
}

uint64_t HostCache::mapped_bytes() const {
  uint64_t bytes = 0;
  for (const Piece& piece : pieces_) bytes += piece.memory->mapped_bytes();
  return bytes;
}

uint64_t HostCache::pinned_bytes() const {
  uint64_t bytes = 0;
  for (const Piece& piece : pieces_) bytes += piece.memory->pinned_bytes();
  return bytes;
}

uint64_t HostCache::prepared_bytes() const {
  uint64_t bytes = 0;
  for (const Piece& piece : pieces_) bytes += piece.memory->prepared_bytes();
  return bytes;
}

std::vector<std::string> HostCache::warnings() const {
  std::vector<std::string> all;
  for (const Piece& piece : pieces_) {
    const std::vector<std::string> some = piece.memory->warnings();
    all.insert(all.end(), some.begin(), some.end());
  }
  return all;
}

}  // namespace wsm
