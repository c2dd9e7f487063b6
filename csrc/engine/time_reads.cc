#include "engine/time_reads.h"

#include <poll.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <utility>

#include "util/check.h"

namespace wsm {
namespace {

using Clock = std::chrono::steady_clock;

constexpr uint32_t kSlots = 8;
constexpr uint64_t kSlotAlignment = 2 << 20;  // enough for every direct read
constexpr int kPollMs = 10;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

struct Free {
  void operator()(void* data) const { std::free(data); }
};

// Slots that spans are read into, as many at once.
class Timer {
 public:
  Timer(const std::vector<std::string>& paths, const std::vector<ReadSpan>& spans,
        const EngineOptions& options)
      : spans_(spans), options_(options) {
    check(!spans.empty(), "there is nothing to read");
    bool any_direct = false;
    for (const std::string& path : paths) {
      shards_.push_back(Shard::open(path, options.direct));
      any_direct |= shards_.back()->direct();
    }
    readers_ = make_readers(options, any_direct);
    uint64_t largest = 0;
    for (const ReadSpan& span : spans) {
      check(span.file < shards_.size(), "there is no file ", span.file);
      largest = std::max<uint64_t>(largest, span.bytes);
    }
    largest = (largest + kSlotAlignment - 1) / kSlotAlignment * kSlotAlignment;
    for (uint32_t slot = 0; slot < kSlots; ++slot) {
      slots_[slot].reset(std::aligned_alloc(kSlotAlignment, largest));
      check<OutOfMemory>(slots_[slot] != nullptr, "no memory for ", largest, " bytes to read into");
      free_.push_back(slot);
    }
  }

  double run(double seconds) {
    const auto begin = Clock::now();
    auto moved = begin;
    uint64_t bytes = 0;
    while (true) {
      while (next_ < spans_.size() && seconds_since(begin) < seconds && submit_next()) continue;
      if (free_.size() == kSlots) return static_cast<double>(bytes) / seconds_since(begin);
      if (const uint64_t arrived = reap()) {
        bytes += arrived;
        moved = Clock::now();
      } else {
        check<TimeoutError>(seconds_since(moved) < options_.read_timeout_s, "reads of ",
                            shards_[0]->path(), " have not ended in ", options_.read_timeout_s,
                            " s");
        std::array<pollfd, 2> ready{{{readers_.for_direct().ready_fd(), POLLIN, 0},
                                     {readers_.pool->ready_fd(), POLLIN, 0}}};
        ::poll(ready.data(), ready.size(), kPollMs);
      }
    }
  }

 private:
  bool submit_next() {
    if (free_.empty()) return false;
    const ReadSpan& span = spans_[next_];
    Shard& shard = *shards_[span.file];
    const bool cached = !readers_.always_direct && shard.in_page_cache(span.offset, span.bytes);
    ReadRequest request;
    request.shard = &shard;
    request.offset = span.offset;
    request.bytes = request.need_bytes = span.bytes;
    request.target = static_cast<std::byte*>(slots_[free_.back()].get());
    request.tag = free_.back();
    request.buffered = !shard.direct() || cached;
    Reader& reader = request.buffered ? *readers_.pool : readers_.for_direct();
    if (!reader.submit(request)) return false;
    free_.pop_back();
    ++next_;
    return true;
  }

  uint64_t reap() {
    uint64_t bytes = 0;
    for (Reader* reader : {readers_.direct.get(), readers_.pool.get()}) {
      if (!reader) continue;
      std::array<ReadCompletion, kSlots> done;
      const size_t count = reader->poll(done);
      for (size_t i = 0; i < count; ++i) {
        check<IoError>(done[i].error.empty(), done[i].error);
        bytes += done[i].bytes;
        free_.push_back(static_cast<uint32_t>(done[i].tag));
      }
    }
    return bytes;
  }

  const std::vector<ReadSpan>& spans_;
  const EngineOptions& options_;
  std::vector<std::unique_ptr<Shard>> shards_;
  std::array<std::unique_ptr<void, Free>, kSlots> slots_;
  std::vector<uint32_t> free_;
  size_t next_ = 0;
  Readers readers_;  // last: its destructor waits for reads into the slots
};

}  // namespace

double time_reads(const std::vector<std::string>& paths, const std::vector<ReadSpan>& spans,
                  const EngineOptions& options, double seconds) {
  auto timer = std::make_unique<Timer>(paths, spans, options);
  try {
    return timer->run(seconds);
  } catch (const TimeoutError&) {
    // Its end would wait for the drive. What is still read into is kept for good, and reachable.
    static auto* const kept = new std::vector<std::unique_ptr<Timer>>;
    static std::mutex mutex;
    const std::lock_guard lock(mutex);
    kept->push_back(std::move(timer));
    throw;
  }
}

}  // namespace wsm
