// Turns read requests into completions.
//
// Lifecycle: made at start with a fixed number of requests; used from one thread (the conductor's);
// the destructor waits until no read writes into a target any more. A request's shard and target
// must live until its completion was returned by `poll`.
// Failure: a read that fails completes with an error; nothing is thrown on the hot path.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "storage/shard.h"

namespace wsm {

struct ReadRequest {
  Shard* shard = nullptr;
  uint64_t offset = 0;      // aligned for a direct read
  uint32_t bytes = 0;       // aligned for a direct read; the end may lie past the end of the file
  uint32_t need_bytes = 0;  // fewer than these is an error
  std::byte* target = nullptr;
  uint64_t tag = 0;       // returned with the completion
  bool buffered = false;  // read through the page cache even where direct reads work
};

struct ReadCompletion {
  uint64_t tag = 0;
  uint64_t bytes = 0;  // that were read, alignment included
  std::string error;   // empty: done; else what failed, with path, offset and errno
};

class Reader {
 public:
  virtual ~Reader() = default;

  // Takes the request, or returns false when it is full: the caller waits.
  virtual bool submit(const ReadRequest& request) = 0;
  // Completions that are there, as many as fit; never blocks. Also pushes waiting reads on.
  virtual size_t poll(std::span<ReadCompletion> completions) = 0;
  // Readable (POLLIN) when `poll` may have something to return.
  virtual int ready_fd() const = 0;
  virtual uint32_t capacity() const = 0;
  // Whether `submit` would answer false now: as many as `capacity` are under way, or enough bytes.
  virtual bool full() = 0;
  virtual const char* name() const = 0;  // "uring" or "pread"
  // The errno by which it was refused for good: from then on every read fails, and another reader
  // must do them. 0 while it works. Thread-safe.
  virtual int broken() const { return 0; }
};

struct ReaderOptions {
  uint32_t requests = 64;            // that may be under way at once
  uint32_t block_bytes = 1 << 20;    // a request is read in blocks this large
  uint32_t depth = 16;               // uring: blocks in flight; pread: threads
  uint64_t open_bytes = UINT64_MAX;  // of requests under way: then no further one is taken
};

// Probes with a real ring and one real read. Returns null where io_uring cannot be used, and says
// why: the errno and, where it is the cause, the sysctl.
std::unique_ptr<Reader> make_uring_reader(const ReaderOptions& options, std::string* why_not);
std::unique_ptr<Reader> make_pread_reader(const ReaderOptions& options);

}  // namespace wsm
