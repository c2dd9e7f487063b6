#include "engine/readers.h"

#include <algorithm>
#include <cmath>
#include <thread>

#include "engine/log.h"

namespace wsm {
namespace {

constexpr uint32_t kMostReadThreads = 16;
constexpr uint32_t kMostAskedThreads = 1024;
constexpr uint32_t kCoresForThreads = 8;
constexpr uint32_t kThreadBlockBytes = 256 << 10;
constexpr uint64_t kWaitingChunks = 2;
constexpr uint64_t kLeastPoolRequests = 3;

// Direct reads: no more wait than keep the drive busy until the next ones are submitted. Slots are
// taken from the top of a stack: the fewer are under way, the sooner one is read into again, while
// the processor's cache still has it.
void limit_open_bytes(ReaderOptions& reader, uint64_t chunk_bytes) {
  const uint64_t block_bytes = std::min<uint64_t>(reader.block_bytes, chunk_bytes);
  reader.open_bytes =
      std::max<uint64_t>(reader.depth * block_bytes + kWaitingChunks * chunk_bytes, 1);
  const uint64_t chunks = reader.open_bytes / std::max<uint64_t>(chunk_bytes, 1) + 1;
  reader.requests = std::max(reader.requests, static_cast<uint32_t>(chunks));
}

}  // namespace

// Which reader is the faster for direct reads is the machine's business: `preferred` was measured.
// Else by the cores: on virtual disks a read is submitted at a cost, one after another where one
// ring submits; threads submit side by side, and win where there are cores for them
// (docs/performance.md has the figures).
Readers make_readers(const EngineOptions& options, bool any_direct, uint64_t chunk_bytes) {
  check(options.read_timeout_s > 0 && std::isfinite(options.read_timeout_s),
        "read_timeout_s must be a number above 0, not ", options.read_timeout_s);
  check(options.read_threads <= kMostAskedThreads, "read_threads = ", options.read_threads,
        ": at most ", kMostAskedThreads);
  if (options.make_readers) return options.make_readers();
  check(options.reader != ReaderChoice::kUring || options.direct != DirectMode::kOff,
        "reader 'uring' does direct reads, and direct reads are off; ask for one of the two");
  const uint32_t cores = std::max(1u, std::thread::hardware_concurrency());
  Readers readers;
  std::string uring_refused;  // why, where it was tried
  readers.always_direct = options.direct == DirectMode::kOn;
  const bool asked = options.reader != ReaderChoice::kAuto;
  const bool measured = options.preferred != ReaderChoice::kAuto;
  const ReaderChoice by_cores =
      cores < kCoresForThreads ? ReaderChoice::kUring : ReaderChoice::kPread;
  const ReaderChoice found = measured ? options.preferred : by_cores;
  const ReaderChoice wanted = asked ? options.reader : found;
  if (wanted == ReaderChoice::kUring && (asked || any_direct)) {
    ReaderOptions ring;
    if (options.block_bytes > 0) ring.block_bytes = options.block_bytes;
    limit_open_bytes(ring, chunk_bytes);
    readers.direct = make_uring_reader(ring, &uring_refused);
    check<Error>(readers.direct || !asked,
                 "io_uring was asked for and cannot be used: ", uring_refused);
    if (!readers.direct) log_once("reading with pread: " + uring_refused);
  }
  if (!readers.direct && any_direct) {
    ReaderOptions threads;
    threads.block_bytes = options.block_bytes > 0 ? options.block_bytes : kThreadBlockBytes;
    if (options.read_threads > 0) threads.depth = options.read_threads;
    limit_open_bytes(threads, chunk_bytes);
    readers.direct = make_pread_reader(threads);
  }
  readers.why_direct = asked                      ? "the reader was asked for"
                       : !uring_refused.empty()   ? "no io_uring: " + uring_refused
                       : measured                 ? "measured to be the faster one"
                       : cores < kCoresForThreads ? "few cores: one ring"
                                                  : "many cores: threads submit side by side";
  ReaderOptions pool;
  pool.depth = options.read_threads > 0 ? options.read_threads : std::min(cores, kMostReadThreads);
  // What is in memory is read as fast as the processor's cache lets it be: into slots that were
  // just copied out of, not into the next of a long queue. So no more waits than keeps all threads
  // busy: a block for each to read, and one to go on with.
  pool.requests = static_cast<uint32_t>(std::clamp<uint64_t>(
      2ull * pool.depth * pool.block_bytes / std::max(chunk_bytes, uint64_t{1}), kLeastPoolRequests,
      std::max(pool.requests, pool.depth)));
  readers.pool = make_pread_reader(pool);
  return readers;
}

}  // namespace wsm
