#include "engine/preload.h"

#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <utility>

#include "engine/log.h"
#include "memory/mapped_memory.h"
#include "util/align.h"
#include "util/deadline.h"
#include "util/mutex.h"
#include "util/threads.h"

namespace wsm {
namespace {

constexpr uint64_t kSpanBytes = 4 * kMiB;  // whole huge pages: each is given back by itself
constexpr uint32_t kInFlight = 8;
constexpr int kPollMs = 10;

}  // namespace

struct Preload::Span {
  bool held = false;
  uint32_t users = 0;  // chunks that have not been read from it yet
};

struct Preload::File {
  std::unique_ptr<Shard> shard;  // closed once it was read: it still tells which file it was
  std::unique_ptr<MappedMemory> memory;  // of its beginning, as far as there is room
  std::unique_ptr<Shard> held_shard;     // the same memory, as what it is read from
  std::vector<Span> spans;
  uint32_t flying = 0;  // reads under way

  uint64_t span_bytes(uint64_t span) const {
    return std::min(kSpanBytes, shard->bytes() - span * kSpanBytes);
  }
};

// What the thread works with: its own until `over`.
struct Preload::Reading {
  std::vector<std::string> paths;
  EngineOptions options;
  uint64_t room_spans = 0;  // that may still be mapped
  std::vector<File> files;
  Readers readers;  // after the files: their destructors wait for reads into them

  std::atomic<uint64_t> held_bytes{0};
  std::atomic<uint64_t> ended_reads{0};
  Mutex mutex;
  CondVar changed;
  bool stopping GUARDED_BY(mutex) = false;
  bool over GUARDED_BY(mutex) = false;

  void run();

 private:
  void read_all();
  bool open_next();
  bool next(uint32_t* span);
  bool submit_next();
  bool reap();
  bool asked_to_stop() {
    const MutexLock lock(mutex);
    return stopping;
  }

  Reader* reader_ = nullptr;  // of the readers, to the end: what it was given it alone gives back
  size_t path_ = 0;           // the next to open
  uint32_t span_ = 0;         // the next of the last file
  uint32_t in_flight_ = 0;
  bool failed_ = false;
};

void Preload::Reading::run() {
  try {
    read_all();
  } catch (const std::exception&) {
    // Who reads the same tells it.
  }
  // A read into memory is never left behind.
  while (in_flight_ > 0) {
    if (!reap()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  for (File& file : files) file.shard->close();
  const MutexLock lock(mutex);
  over = true;
  changed.notify_all();
}

void Preload::Reading::read_all() {
  bool more = true;
  while (more || in_flight_ > 0) {
    more = more && !failed_ && !asked_to_stop();
    while (more && (!reader_ || (in_flight_ < kInFlight && !reader_->full()))) {
      more = submit_next();
    }
    if (in_flight_ > 0 && !reap()) {
      pollfd ready{reader_->ready_fd(), POLLIN, 0};
      ::poll(&ready, 1, kPollMs);
    }
  }
}

// The next file that direct reads can read; false when there is none, or no room.
bool Preload::Reading::open_next() {
  while (path_ < paths.size() && room_spans > 0) {
    File file;
    file.shard = Shard::open(paths[path_++], options.direct);
    if (!file.shard->direct() || file.shard->bytes() == 0) continue;
    if (!reader_) {
      readers = make_readers(options, true, kSpanBytes);
      reader_ = &readers.for_direct();
    }
    const uint64_t wanted = align_up(file.shard->bytes(), kSpanBytes) / kSpanBytes;
    file.spans.resize(std::min(wanted, room_spans));
    room_spans -= file.spans.size();
    file.memory = std::make_unique<MappedMemory>(file.spans.size() * kSpanBytes);
    file.held_shard =
        Shard::from_memory(file.shard->path(), file.memory->data(), file.shard->bytes());
    files.push_back(std::move(file));
    span_ = 0;
    return true;
  }
  return false;
}

// The next span of the last file, or of the one after it, that is not in the page cache.
bool Preload::Reading::next(uint32_t* span) {
  while (!asked_to_stop()) {
    if (files.empty() || span_ == files.back().spans.size()) {
      if (!files.empty() && files.back().flying == 0) files.back().shard->close();
      if (!open_next()) return false;
    }
    const File& file = files.back();
    *span = span_++;
    const bool cached = options.direct != DirectMode::kOn &&
                        file.shard->in_page_cache(*span * kSpanBytes, file.span_bytes(*span));
    if (!cached) return true;
  }
  return false;
}

bool Preload::Reading::submit_next() {
  uint32_t span = 0;
  if (!next(&span)) return false;
  File& file = files.back();
  const uint64_t offset = span * kSpanBytes;
  const auto need = static_cast<uint32_t>(file.span_bytes(span));
  ReadRequest request;
  request.shard = file.shard.get();
  request.offset = offset;
  request.bytes = static_cast<uint32_t>(align_up(need, file.shard->alignment()));
  request.need_bytes = need;
  request.target = file.memory->data() + offset;
  request.tag = (files.size() - 1) << 32 | span;
  if (!reader_->submit(request)) return false;  // cannot be: it was not full
  ++in_flight_;
  ++file.flying;
  return true;
}

bool Preload::Reading::reap() {
  std::array<ReadCompletion, kInFlight> done;
  const size_t count = reader_->poll(done);
  for (size_t i = 0; i < count; ++i) {
    --in_flight_;
    ++ended_reads;
    File& file = files[done[i].tag >> 32];
    // A file that has come to refuse direct reads passes through the page cache: no more of it.
    failed_ |= !done[i].error.empty() || !file.shard->direct();
    if (done[i].error.empty()) {
      file.spans[static_cast<uint32_t>(done[i].tag)].held = true;
      held_bytes += kSpanBytes;
    }
    if (--file.flying == 0 && &file != &files.back()) file.shard->close();
  }
  return count > 0;
}

Preload::Preload(std::vector<std::string> paths, const EngineOptions& options, uint64_t most_bytes)
    : reading_(std::make_shared<Reading>()),
      timeout_s_(options.read_timeout_s),
      process_(::getpid()) {
  reading_->paths = std::move(paths);
  reading_->options = options;
  reading_->room_spans = most_bytes / kSpanBytes;
  thread_ = start_thread("wsm-ahead", "reading ahead", [reading = reading_] { reading->run(); });
}

Preload::~Preload() { stop(); }

void Preload::stop() {
  if (::getpid() != process_) {
    // The threads are the parent's, and would be waited for: nothing of it is touched.
    if (reading_) new std::pair(std::move(reading_), std::move(thread_));
    return;
  }
  if (!thread_.joinable()) return;
  bool over = false;
  {
    Reading& reading = *reading_;
    const MutexLock lock(reading.mutex);
    reading.stopping = true;
    uint64_t ended = reading.ended_reads;
    auto deadline = deadline_after(timeout_s_);
    while (!reading.over) {
      if (reading.changed.wait_until(reading.mutex, deadline)) continue;
      if (reading.ended_reads == ended) break;
      ended = reading.ended_reads;
      deadline = deadline_after(timeout_s_);
    }
    over = reading.over;
  }
  if (over) {
    thread_.join();
    reading_->readers = {};  // and their threads
    return;
  }
  log_warning(concat("reading ahead: no read has ended in ", timeout_s_,
                     " s; their memory is left to the process"));
  thread_.detach();
  reading_.reset();
}

void Preload::drop() {
  stop();
  reading_.reset();
  chunk_spans_.clear();
}

uint64_t Preload::held_bytes() const { return reading_ ? reading_->held_bytes.load() : 0; }

void Preload::settle(const std::vector<std::unique_ptr<Shard>>& shards, const Plan& plan,
                     uint64_t most_bytes) {
  stop();
  chunk_spans_.assign(plan.chunks.size(), {});
  if (!reading_) return;
  std::vector<File>& files = reading_->files;
  // From the end: what comes last is used last.
  for (size_t f = files.size(); f-- > 0;) {
    for (size_t s = files[f].spans.size(); s-- > 0 && held_bytes() > most_bytes;) {
      release_span(files[f], static_cast<uint32_t>(s));
    }
  }
  std::vector<uint32_t> file_of(shards.size(), kNone);
  for (size_t i = 0; i < shards.size(); ++i) {
    for (uint32_t f = 0; f < files.size(); ++f) {
      if (shards[i]->memory() == nullptr && files[f].shard->same_file(*shards[i])) file_of[i] = f;
    }
  }
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
    chunk_spans_[c] = {file_of[chunk.shard], static_cast<uint32_t>(first),
                       static_cast<uint32_t>(end), false};
  }
  for (File& file : files) {
    for (uint32_t s = 0; s < file.spans.size(); ++s) {
      if (file.spans[s].users == 0) release_span(file, s);
    }
  }
}

Shard* Preload::find(uint32_t chunk) const {
  const ChunkSpans& spans = chunk_spans_[chunk];
  if (spans.file == kNone || spans.acquired) return nullptr;
  return reading_->files[spans.file].held_shard.get();
}

void Preload::acquire(uint32_t chunk) { chunk_spans_[chunk].acquired = true; }

void Preload::release(uint32_t chunk) {
  const ChunkSpans& spans = chunk_spans_[chunk];
  File& file = reading_->files[spans.file];
  for (uint32_t s = spans.first_span; s < spans.end_span; ++s) {
    if (--file.spans[s].users == 0) release_span(file, s);
  }
}

void Preload::release_span(File& file, uint32_t span) {
  if (!std::exchange(file.spans[span].held, false)) return;
  file.memory->release(span * kSpanBytes, kSpanBytes);
  reading_->held_bytes -= kSpanBytes;
}

}  // namespace wsm
