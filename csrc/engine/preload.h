// Reads the beginning of a checkpoint's files into memory while nobody can say yet what of it is
// wanted where: Python imports transformers and builds the module meanwhile, which takes seconds.
//
//   Preload preload(paths, options, most_bytes);  a thread reads, file after file
//   preload.stop();                                 what has arrived stays
//   preload.settle(shards, plan, most_bytes);       what the plan does not need is given back
//   Shard* shard = preload.find(chunk);             the conductor, before it asks the disk
//   preload.acquire(chunk);                            a read from there is under way
//   preload.release(chunk);                            it has ended
//
// Only what direct reads bring: the page cache and tmpfs are memory already. A file lies in spans:
//
//   | span | span | span | span |   each is read, held, and given back when no chunk wants it
//
// Lifecycle: the thread starts with the constructor and ends in `stop`, or the destructor, after
// the reads under way; `drop` frees the memory too. All but `held_bytes` is for one thread at a
// time, and what follows `settle` in the list for after it. Failure: a file that cannot be opened
// or read, or no reader, ends the reading, and nothing is said: the engine meets the same error,
// and tells it. Where no read ends within the time limit, `stop` leaves the thread alone with its
// memory, which goes when the thread does, and nothing is held; so it is in a forked child.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "engine/readers.h"
#include "plan/plan.h"
#include "storage/shard.h"

namespace wsm {

class Preload {
 public:
  // `most_bytes`: of memory, rounded down to whole spans. Throws Error where no thread can be had.
  Preload(std::vector<std::string> paths, const EngineOptions& options, uint64_t most_bytes);
  ~Preload();
  Preload(const Preload&) = delete;
  Preload& operator=(const Preload&) = delete;

  uint64_t held_bytes() const;  // any thread: memory that is taken by what has arrived
  void stop();                  // idempotent
  void drop();                  // holds nothing any more

  // Stops; keeps what chunks of the plan need, of files that have not changed, at most
  // `most_bytes`.
  void settle(const std::vector<std::unique_ptr<Shard>>& shards, const Plan& plan,
              uint64_t most_bytes);
  // Memory at the file's own offsets. Null where the chunk is not here whole, or was taken before:
  // its own shard has it.
  Shard* find(uint32_t chunk) const;
  void acquire(uint32_t chunk);
  void release(uint32_t chunk);

 private:
  struct Span;
  struct File;
  struct Reading;
  struct ChunkSpans {  // where a chunk lies
    uint32_t file = kNone;
    uint32_t first_span = 0;
    uint32_t end_span = 0;
    bool acquired = false;
  };

  void release_span(File& file, uint32_t span);

  std::shared_ptr<Reading> reading_;  // the thread's too, which may outlive a stop that gave up
  std::thread thread_;
  std::vector<ChunkSpans> chunk_spans_;  // by chunk; no file: not here
  double timeout_s_;
  pid_t process_;
};

}  // namespace wsm
