#include "engine/time_reads.h"

#include <poll.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <memory>
#include <utility>

#include "device/device.h"
#include "memory/pinned_buffer.h"
#include "util/abandon.h"
#include "util/check.h"

namespace wsm {
namespace {

using Clock = std::chrono::steady_clock;

constexpr uint64_t kSlotsBytes = 64 * kMiB;
constexpr int kPollMs = 10;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

// Slots that spans are read into, in chunks as the engine reads them, into memory of the kind that
// it reads into, and the last slot that came free first: into small pages, or into memory that is
// not in the processor's cache, some drives are read a third slower.
class Timer {
 public:
  Timer(const std::vector<std::string>& paths, const std::vector<FileExtent>& spans,
        const std::vector<EngineOptions>& methods, uint64_t chunk_bytes)
      : chunk_bytes_(chunk_bytes), slot_count_(kSlotsBytes / chunk_bytes) {
    check(slot_count_ > 1, "chunks of ", chunk_bytes, " bytes are too large to be timed");
    check(!spans.empty() && !methods.empty(), "there is nothing to read");
    bool any_direct = false;
    for (const std::string& path : paths) {
      shards_.push_back(Shard::open(path, methods[0].direct));
      any_direct |= shards_.back()->direct();
    }
    for (const FileExtent& span : spans) {
      check(span.file < shards_.size(), "there is no file ", span.file);
      for (uint64_t at = 0; at < span.bytes; at += chunk_bytes) {
        const auto bytes = static_cast<uint32_t>(std::min(chunk_bytes, span.bytes - at));
        chunks_.push_back({span.file, span.offset + at, bytes});
      }
    }
    check(!chunks_.empty(), "there is nothing to read");
    slots_ = std::make_unique<PinnedBuffer>(*device_, slot_count_ * chunk_bytes);
    for (uint32_t slot = 0; slot < slot_count_; ++slot) free_.push_back(slot);
    for (const EngineOptions& method : methods)
      methods_.push_back({readers_of(method, any_direct, chunk_bytes), method.read_timeout_s});
  }

  std::vector<std::vector<double>> run(double seconds, uint32_t rounds, double most_seconds) {
    const auto begin = Clock::now();
    std::vector<std::vector<double>> rates(methods_.size());
    for (uint32_t round = 0; round < rounds; ++round) {
      for (size_t i = 0; i < methods_.size(); ++i) {
        // There and back: a drift hits all alike.
        const size_t method = round % 2 ? methods_.size() - 1 - i : i;
        if (seconds_since(begin) > most_seconds) return rates;
        if (methods_[method].readers.pool)
          rates[method].push_back(sample(methods_[method], seconds));
      }
    }
    return rates;
  }

 private:
  struct Method {
    Readers readers;
    double timeout_s = 0;
  };

  static Readers readers_of(const EngineOptions& method, bool any_direct, uint64_t chunk_bytes) {
    try {
      return make_readers(method, any_direct, chunk_bytes);
    } catch (const InvalidArgument&) {
      throw;
    } catch (const Error&) {
      return {};
    }
  }

  double sample(Method& method, double seconds) {
    const auto begin = Clock::now();
    auto moved = begin;
    uint64_t bytes = 0;
    while (true) {
      while (seconds_since(begin) < seconds && submit_next(method.readers)) continue;
      if (free_.size() == slot_count_) return static_cast<double>(bytes) / seconds_since(begin);
      if (const uint64_t arrived = reap(method.readers)) {
        bytes += arrived;
        moved = Clock::now();
      } else {
        check<TimeoutError>(seconds_since(moved) < method.timeout_s, "reads of ",
                            shards_[0]->path(), " have not ended in ", method.timeout_s, " s");
        std::array<pollfd, 2> ready{{{method.readers.for_direct().ready_fd(), POLLIN, 0},
                                     {method.readers.pool->ready_fd(), POLLIN, 0}}};
        ::poll(ready.data(), ready.size(), kPollMs);
      }
    }
  }

  bool submit_next(Readers& readers) {
    if (free_.empty()) return false;
    const FileExtent& span = chunks_[next_];
    Shard& shard = *shards_[span.file];
    const bool cached = !readers.always_direct && shard.in_page_cache(span.offset, span.bytes);
    ReadRequest request;
    request.shard = &shard;
    request.offset = span.offset;
    request.bytes = request.need_bytes = span.bytes;
    request.target = slots_->data() + free_.back() * chunk_bytes_;
    request.tag = free_.back();
    request.buffered = !shard.direct() || cached;
    Reader& reader = request.buffered ? *readers.pool : readers.for_direct();
    if (!reader.submit(request)) return false;
    free_.pop_back();
    next_ = (next_ + 1) % chunks_.size();
    return true;
  }

  uint64_t reap(Readers& readers) {
    uint64_t bytes = 0;
    for (Reader* reader : {readers.direct.get(), readers.pool.get()}) {
      if (!reader) continue;
      std::array<ReadCompletion, 64> done;
      const size_t count = reader->poll(done);
      for (size_t i = 0; i < count; ++i) {
        check<IoError>(done[i].error.empty(), done[i].error);
        bytes += done[i].bytes;
        free_.push_back(static_cast<uint32_t>(done[i].tag));
      }
    }
    return bytes;
  }

  const uint64_t chunk_bytes_;
  const uint64_t slot_count_;
  std::vector<FileExtent> chunks_;  // all spans
  std::vector<std::unique_ptr<Shard>> shards_;
  const std::unique_ptr<Device> device_ = make_host_device();
  std::unique_ptr<PinnedBuffer> slots_;
  std::vector<uint32_t> free_;
  size_t next_ = 0;
  std::vector<Method> methods_;  // last: their destructors wait for reads into the slots
};

}  // namespace

std::vector<std::vector<double>> time_reads(const std::vector<std::string>& paths,
                                            const std::vector<FileExtent>& spans,
                                            const std::vector<EngineOptions>& methods,
                                            double seconds, uint32_t rounds, double most_seconds,
                                            uint64_t chunk_bytes) {
  check(chunk_bytes > 0, "chunks of no bytes");
  auto timer = std::make_unique<Timer>(paths, spans, methods, chunk_bytes);
  try {
    return timer->run(seconds, rounds, most_seconds);
  } catch (const TimeoutError&) {
    abandon(timer);  // its end would wait for the drive, which may still write into its memory
    throw;
  }
}

}  // namespace wsm
