// Reads the beginning of a checkpoint's files into memory while nobody can say yet what of it is
// wanted where: Python imports transformers and builds the module meanwhile, which takes seconds.
//
//   ReadAhead ahead(paths, options, most_bytes);     a thread reads, file after file
//   ... the plan is made ...
//   ahead.stop();                                    what has arrived stays
//   ahead.settle(shards, plan, room_bytes);          what the plan does not need is given back
//   Shard* shard = ahead.find(chunk)                 by the conductor, before it asks the disk:
//   ahead.take(chunk)                                memory, at the file's own offsets
//   ... the read from there ends ...
//   ahead.used(chunk)                                the memory of the last user is given back
//
// Only what direct reads bring: the page cache and tmpfs are memory already. A span is held whole
// or not at all:
//
//   file    | span | span | span | span |     span: read, held, `users` chunks want it -> given
//   back
//             held   held   under way
//
// Lifecycle: the thread starts with the constructor and ends in `stop` (or the destructor), after
// the reads under way. What is below `stop` is for one thread, after it. Thread-safe above that.
// Failure: a file that cannot be opened or read ends the reading, and nothing is said: the engine
// meets the same error, and tells it. A read that does not end within the time limit is left to the
// process with all that it may write to, and nothing is held then; so it is in a forked child.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "plan/plan.h"
#include "storage/shard.h"

namespace wsm {

struct EngineOptions;

class ReadAhead {
 public:
  // `most_bytes`: of memory, rounded down to whole spans. Throws where no reader or no thread can
  // be had; InvalidArgument for options that no reader can work with.
  ReadAhead(const std::vector<std::string>& paths, const EngineOptions& options,
            uint64_t most_bytes);
  ~ReadAhead();
  ReadAhead(const ReadAhead&) = delete;
  ReadAhead& operator=(const ReadAhead&) = delete;

  void stop();                  // idempotent
  uint64_t held_bytes() const;  // memory that is taken by what has arrived

  // Keeps what chunks of the plan need, of files that have not changed, at most `most_bytes`.
  void settle(const std::vector<std::unique_ptr<Shard>>& shards, const Plan& plan,
              uint64_t most_bytes);
  // Where the chunk can be read from, at its own offset; null where it is not here whole, or was
  // taken before: then it is read from its own shard.
  Shard* find(uint32_t chunk) const;
  void take(uint32_t chunk);  // a read of it is under way: there is no second one from here
  void used(uint32_t chunk);  // that read has ended

 private:
  struct Span;
  struct File;
  struct Reading;
  struct Place {  // of a chunk
    uint32_t file = kNone;
    uint32_t first_span = 0;
    uint32_t end_span = 0;
    bool taken = false;
  };

  void abandon();
  void give_back(File& file, uint32_t span);

  std::shared_ptr<Reading> reading_;  // the thread's too, which may outlive a stop that gave up
  std::thread thread_;
  std::vector<Place> places_;  // by chunk; no file: not here
  double timeout_s_;
  pid_t process_;
};

}  // namespace wsm
