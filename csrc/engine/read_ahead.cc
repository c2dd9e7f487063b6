#include "engine/read_ahead.h"

#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <utility>

#include "device/device.h"
#include "engine/engine.h"
#include "engine/log.h"
#include "memory/pinned_buffer.h"
#include "util/align.h"
#include "util/threads.h"

namespace wsm {
namespace {

constexpr uint64_t kSpanBytes = 4 * kMiB;  // whole huge pages: each is given back by itself
constexpr uint32_t kInFlight = 8;
constexpr int kPollMs = 10;

}  // namespace

struct ReadAhead::Span {
  bool held = false;
  uint32_t users = 0;  // chunks that have not been read from it yet
};

struct ReadAhead::File {
  std::unique_ptr<Shard> shard;
  std::unique_ptr<PinnedBuffer> memory;  // mapped only; never page-locked
  std::unique_ptr<Shard> held_shard;     // the same memory, as what it is read from
  std::vector<Span> spans;

  uint64_t span_bytes(uint64_t span) const {
    return std::min(kSpanBytes, shard->bytes() - span * kSpanBytes);
  }
};

// What the thread works with. Its own until `over`.
struct ReadAhead::Reading {
  std::unique_ptr<Device> device = make_host_device();
  std::vector<File> files;
  Readers readers;           // after the files: their destructors wait for reads into them
  Reader* reader = nullptr;  // of these, to the end: what it was given it alone gives back
  bool always_direct = false;
  std::atomic<uint64_t> held_bytes{0};

  std::mutex mutex;
  std::condition_variable changed;
  bool stopping = false;  // guarded by mutex
  bool over = false;      // guarded by mutex

  void open(const std::vector<std::string>& paths, const EngineOptions& options, uint64_t most);
  void run();

 private:
  bool next(uint32_t* file, uint32_t* span);
  bool submit_next();
  bool reap();
  bool asked_to_stop() {
    std::lock_guard lock(mutex);
    return stopping;
  }

  uint32_t file_ = 0;
  uint32_t span_ = 0;
  uint32_t in_flight_ = 0;
  bool failed_ = false;
};

void ReadAhead::Reading::open(const std::vector<std::string>& paths, const EngineOptions& options,
                              uint64_t most) {
  for (const std::string& path : paths) {
    const uint64_t room = most / kSpanBytes;
    if (room == 0) break;
    File file;
    try {
      file.shard = Shard::open(path, options.direct);
    } catch (const IoError&) {
      break;  // who needs the file says why
    }
    if (!file.shard->direct() || file.shard->bytes() == 0) continue;
    const uint64_t wanted = align_up(file.shard->bytes(), kSpanBytes) / kSpanBytes;
    file.spans.resize(std::min(wanted, room));
    const uint64_t bytes = file.spans.size() * kSpanBytes;
    file.memory = PinnedBuffer::unprepared(*device, bytes, {});
    file.held_shard = Shard::from_memory(path, file.memory->data(), file.shard->bytes());
    most -= bytes;
    files.push_back(std::move(file));
  }
  if (files.empty()) return;
  readers = make_readers(options, true, kSpanBytes);
  reader = &readers.for_direct();
  always_direct = options.direct == DirectMode::kOn;
}

void ReadAhead::Reading::run() {
  const uint32_t most = std::min(kInFlight, reader->capacity());
  bool more = true;
  while (more || in_flight_ > 0) {
    more = more && !failed_ && !asked_to_stop();
    while (more && in_flight_ < most) more = submit_next();
    if (in_flight_ > 0 && !reap()) {
      pollfd ready{reader->ready_fd(), POLLIN, 0};
      ::poll(&ready, 1, kPollMs);
    }
  }
  std::lock_guard lock(mutex);
  over = true;
  changed.notify_all();
}

// The next span in order that is not in the page cache.
bool ReadAhead::Reading::next(uint32_t* file, uint32_t* span) {
  for (; file_ < files.size(); ++file_, span_ = 0) {
    const File& now = files[file_];
    while (span_ < now.spans.size()) {
      *file = file_;
      *span = span_++;
      if (always_direct) return true;
      if (!now.shard->in_page_cache(*span * kSpanBytes, now.span_bytes(*span))) return true;
    }
  }
  return false;
}

bool ReadAhead::Reading::submit_next() {
  uint32_t at = 0, span = 0;
  if (!next(&at, &span)) return false;
  File& file = files[at];
  const uint64_t offset = span * kSpanBytes;
  const auto need = static_cast<uint32_t>(file.span_bytes(span));
  ReadRequest request;
  request.shard = file.shard.get();
  request.offset = offset;
  request.bytes = static_cast<uint32_t>(align_up(need, file.shard->alignment()));
  request.need_bytes = need;
  request.target = file.memory->data() + offset;
  request.tag = uint64_t{at} << 32 | span;
  if (!reader->submit(request)) return false;  // cannot be: fewer are under way than it takes
  ++in_flight_;
  return true;
}

bool ReadAhead::Reading::reap() {
  std::array<ReadCompletion, kInFlight> done;
  const size_t count = reader->poll(done);
  for (size_t i = 0; i < count; ++i) {
    --in_flight_;
    File& file = files[done[i].tag >> 32];
    const auto span = static_cast<uint32_t>(done[i].tag);
    // A file that has come to refuse direct reads passes through the page cache: no more of it.
    failed_ |= !done[i].error.empty() || !file.shard->direct();
    if (!done[i].error.empty()) continue;
    file.spans[span].held = true;
    held_bytes += kSpanBytes;
  }
  return count > 0;
}

ReadAhead::ReadAhead(const std::vector<std::string>& paths, const EngineOptions& options,
                     uint64_t most_bytes)
    : reading_(std::make_shared<Reading>()),
      timeout_s_(options.read_timeout_s),
      process_(::getpid()) {
  reading_->open(paths, options, most_bytes);
  if (reading_->files.empty()) return;
  thread_ = start_thread("wsm-ahead", "reading ahead", [reading = reading_] { reading->run(); });
}

ReadAhead::~ReadAhead() { stop(); }

void ReadAhead::stop() {
  if (!thread_.joinable()) return;
  if (::getpid() != process_) return abandon();
  bool over = false;
  {
    std::unique_lock lock(reading_->mutex);
    reading_->stopping = true;
    over = reading_->changed.wait_for(lock, std::chrono::duration<double>(timeout_s_),
                                      [this] { return reading_->over; });
  }
  if (over) return thread_.join();
  log_warning(concat("reading ahead: a read of ", reading_->files[0].shard->path(),
                     " has not ended in ", timeout_s_, " s; its memory is left to the process"));
  abandon();
}

// The thread is there and stuck, or was the parent's: neither it nor its memory is touched again.
void ReadAhead::abandon() {
  static auto* const kept = new std::vector<std::pair<std::shared_ptr<Reading>, std::thread>>;
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  kept->emplace_back(std::exchange(reading_, std::make_shared<Reading>()), std::move(thread_));
}

uint64_t ReadAhead::held_bytes() const { return reading_->held_bytes; }

void ReadAhead::settle(const std::vector<std::unique_ptr<Shard>>& shards, const Plan& plan,
                       uint64_t most_bytes) {
  stop();
  std::vector<File>& files = reading_->files;
  // From the end: what comes last is used last.
  for (size_t f = files.size(); f-- > 0;) {
    for (size_t s = files[f].spans.size(); s-- > 0 && held_bytes() > most_bytes;) {
      give_back(files[f], static_cast<uint32_t>(s));
    }
  }
  std::vector<uint32_t> file_of(shards.size(), kNone);
  for (size_t i = 0; i < shards.size(); ++i) {
    for (uint32_t f = 0; f < files.size(); ++f) {
      if (shards[i]->memory() == nullptr && files[f].shard->same_file(*shards[i])) file_of[i] = f;
    }
  }
  places_.assign(plan.chunks.size(), {});
  for (size_t c = 0; c < plan.chunks.size(); ++c) {
    const Chunk& chunk = plan.chunks[c];
    if (file_of[chunk.shard] == kNone) continue;
    std::vector<Span>& spans = files[file_of[chunk.shard]].spans;
    const uint64_t first = chunk.read_offset / kSpanBytes;
    const uint64_t end = align_up(chunk.read_offset + chunk.need_bytes, kSpanBytes) / kSpanBytes;
    bool here = end <= spans.size();
    for (uint64_t s = first; here && s < end; ++s) here = spans[s].held;
    if (!here) continue;
    for (uint64_t s = first; s < end; ++s) ++spans[s].users;
    places_[c] = {file_of[chunk.shard], static_cast<uint32_t>(first), static_cast<uint32_t>(end),
                  false};
  }
  for (File& file : files) {
    for (uint32_t s = 0; s < file.spans.size(); ++s) {
      if (file.spans[s].users == 0) give_back(file, s);
    }
  }
}

Shard* ReadAhead::find(uint32_t chunk) const {
  const Place& place = places_[chunk];
  if (place.file == kNone || place.taken) return nullptr;
  return reading_->files[place.file].held_shard.get();
}

void ReadAhead::take(uint32_t chunk) { places_[chunk].taken = true; }

void ReadAhead::used(uint32_t chunk) {
  const Place& place = places_[chunk];
  File& file = reading_->files[place.file];
  for (uint32_t s = place.first_span; s < place.end_span; ++s) {
    if (--file.spans[s].users == 0) give_back(file, s);
  }
}

void ReadAhead::give_back(File& file, uint32_t span) {
  if (!std::exchange(file.spans[span].held, false)) return;
  file.memory->give_back(span * kSpanBytes, kSpanBytes);
  reading_->held_bytes -= kSpanBytes;
}

}  // namespace wsm
