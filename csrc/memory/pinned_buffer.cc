#include "memory/pinned_buffer.h"

#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <utility>

#include "plan/plan.h"
#include "util/align.h"
#include "util/check.h"

namespace wsm {
namespace {

constexpr uint64_t kHugePage = 2 * kMiB;
constexpr uint64_t kLeastPiece = 16 * kMiB;  // smaller ones are not worth a registration
constexpr unsigned kMostThreads = 16;        // more do not touch memory faster

std::string mib_text(uint64_t bytes) {
  return concat(static_cast<double>(bytes) / static_cast<double>(kMiB), " MiB");
}

std::vector<uint64_t> equal_segments(uint64_t bytes) {
  std::vector<uint64_t> ends;
  for (uint64_t end = 0; end < bytes;) ends.push_back(end = std::min(bytes, end + kSegmentBytes));
  return ends;
}

void check_segments(const std::vector<uint64_t>& ends, uint64_t bytes) {
  uint64_t begin = 0;
  for (uint64_t end : ends) {
    check(end > begin, "segments of a pinned buffer must ascend: ", end, " follows ", begin);
    check(end == bytes || end % map_page_bytes() == 0, "a pinned buffer's segment ends at ", end,
          ", which is not a multiple of the page size (", map_page_bytes(), ")");
    begin = end;
  }
  check(begin == bytes, "the segments of a pinned buffer end at ", begin, ", not at its ", bytes,
        " bytes");
}

std::string memlock_text() {
  rlimit limit{};
  if (getrlimit(RLIMIT_MEMLOCK, &limit) != 0) return "unknown";
  return limit.rlim_cur == RLIM_INFINITY ? "unlimited" : mib_text(limit.rlim_cur);
}

}  // namespace

PinnedBuffer::PinnedBuffer(Device& device, uint64_t bytes, std::vector<uint64_t> segments, MapOnly)
    : device_(device), bytes_(bytes), segments_(std::move(segments)) {
  if (!segments_.empty()) check_segments(segments_, bytes);
  if (bytes == 0) return;
  memory_.emplace(bytes);
  most_ = mapped_bytes();
  if (segments_.empty()) segments_ = equal_segments(bytes_);
  segments_.back() = mapped_bytes();
}

PinnedBuffer::PinnedBuffer(Device& device, uint64_t bytes, std::vector<uint64_t> segments,
                           unsigned threads)
    : PinnedBuffer(device, bytes, std::move(segments), MapOnly{}) {
  if (bytes == 0) return;
  threads_ = threads;
  // All is touched before any is registered, so that the threads are started once.
  touch(0, mapped_bytes(), threads_);
  for (const uint64_t end : segments_) register_until(end);
  next_segment_ = segments_.size();
  prepared_ = mapped_bytes();
}

std::unique_ptr<PinnedBuffer> PinnedBuffer::unprepared(Device& device, uint64_t bytes,
                                                       std::vector<uint64_t> segments) {
  return std::unique_ptr<PinnedBuffer>(
      new PinnedBuffer(device, bytes, std::move(segments), MapOnly{}));
}

bool PinnedBuffer::prepare_next() {
  if (next_segment_ == segments_.size()) return false;
  const uint64_t end = segments_[next_segment_++];
  touch(prepared_, end, threads_);
  register_until(end);
  prepared_ = end;
  return true;
}

void PinnedBuffer::truncate(uint64_t bytes) {
  check(bytes % map_page_bytes() == 0, "a pinned buffer is cut at ", bytes,
        ", which is not a multiple of the page size (", map_page_bytes(), ")");
  if (bytes >= mapped_bytes()) return;
  while (!registered_.empty()) {
    const auto [piece, size] = registered_.back();
    if (piece + size <= data() + bytes) break;
    device_.unregister_host(piece);
    registered_.pop_back();
    pinned_ -= size;
    registered_end_ = static_cast<uint64_t>(piece - data());
  }
  memory_->truncate(bytes);
  bytes_ = bytes;
  while (!segments_.empty() &&
         (segments_.size() > 1 ? segments_[segments_.size() - 2] : 0) >= bytes) {
    segments_.pop_back();
  }
  if (!segments_.empty()) segments_.back() = bytes;
  next_segment_ = std::min(next_segment_, segments_.size());
  prepared_ = std::min<uint64_t>(prepared_, bytes);
  register_until(prepared_);
}

std::vector<std::string> PinnedBuffer::warnings() const {
  const MutexLock lock(warnings_mutex_);
  return warnings_;
}

PinnedBuffer::~PinnedBuffer() {
  for (const auto& [piece, bytes] : registered_) device_.unregister_host(piece);
}

// The kernel clears each page when it is first written: that is what takes the time, and it runs in
// parallel. A registration would do it page by page in one thread.
void PinnedBuffer::touch(uint64_t begin, uint64_t end, unsigned threads) const {
  if (threads == 0) threads = std::clamp(std::thread::hardware_concurrency(), 1u, kMostThreads);
  const uint64_t first = begin / kHugePage;
  const uint64_t pieces = align_up(end, kHugePage) / kHugePage - first;
  std::atomic<uint64_t> next = 0;
  const auto work = [&] {
    for (uint64_t piece; (piece = next.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
      const uint64_t piece_end = std::min(end, (first + piece + 1) * kHugePage);
      for (uint64_t at = std::max(begin, (first + piece) * kHugePage); at < piece_end;
           at += map_page_bytes()) {
        *const_cast<volatile std::byte*>(data() + at) = std::byte{0};
      }
    }
  };
  std::vector<std::jthread> helpers;
  try {
    while (helpers.size() + 1 < std::min<uint64_t>(threads, pieces)) helpers.emplace_back(work);
  } catch (const std::exception&) {
    // No more threads can be had here: those that run do the work.
  }
  work();
}

// A size that was refused once is not tried again; when the least one is refused, the limit has
// been reached, and the rest stays pageable.
void PinnedBuffer::register_until(uint64_t end) {
  const bool complete = end == mapped_bytes();
  while (registered_end_ < end && !exhausted_) {
    const uint64_t size = std::min(most_, end - registered_end_);
    std::byte* const piece = data() + registered_end_;
    registered_.reserve(registered_.size() + 1);
    std::string answer;
    if (device_.register_host(piece, size, &answer)) {
      registered_.emplace_back(piece, size);
      pinned_ += size;
      registered_end_ += size;
      continue;
    }
    refused_ = size;
    why_ = answer;
    exhausted_ = size <= kLeastPiece;
    most_ = std::max(kLeastPiece, align_up(size / 2, kHugePage));
    if (exhausted_) warn();
  }
  if (complete && refused_ > 0 && !exhausted_) warn();
}

void PinnedBuffer::warn() {
  const std::string asked =
      concat("page-locking ", mib_text(refused_), " at once was refused (", why_, ")");
  const MutexLock lock(warnings_mutex_);
  if (pinned_ == mapped_bytes()) {
    warnings_.push_back(concat(asked, "; smaller pieces were taken, all ", mib_text(mapped_bytes()),
                               " are page-locked"));
    return;
  }
  warnings_.push_back(concat(
      asked, "; ", mib_text(pinned_), " of ", mib_text(mapped_bytes()),
      " of host memory are page-locked, ", mib_text(mapped_bytes() - pinned_),
      " stay pageable and are copied several times slower. Lower host_memory, or raise the limit: "
      "RLIMIT_MEMLOCK is ",
      memlock_text(),
      " (ulimit -l); on WSL2, Windows caps what can be locked, see memory= in .wslconfig"));
}

}  // namespace wsm
