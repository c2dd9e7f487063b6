// The requests of a reader, in a fixed pool: cut into blocks first come, first served, and
// completed when the last block of theirs has finished.
//
//   free --add--> waiting --next (last block cut)--> flying --finish (last block)--> done
//    ^               |                                                                ^ |
//    |               +--- finish of a failed block: no further ones are cut ----------+ |
//    +----------------------------------- take -----------------------------------------+
//
// Lifecycle: owned by a reader; not thread-safe. Allocates at construction only, errors aside.
// Failure: `add` answers false when the pool is used up, or enough bytes are under way; a request
// that cannot be read is done at once, with an error.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "storage/block_read.h"
#include "storage/reader.h"

namespace wsm {

// First in, first out, of at most `capacity` indices.
class IndexFifo {
 public:
  explicit IndexFifo(uint32_t capacity) : ring_(capacity) {}
  bool empty() const { return count_ == 0; }
  uint32_t front() const { return ring_[head_]; }
  void push(uint32_t index) { ring_[(head_ + count_++) % ring_.size()] = index; }
  uint32_t pop() {
    const uint32_t index = ring_[head_];
    head_ = static_cast<uint32_t>((head_ + 1) % ring_.size());
    --count_;
    return index;
  }

 private:
  std::vector<uint32_t> ring_;
  uint32_t head_ = 0;
  uint32_t count_ = 0;
};

class RequestQueue {
 public:
  // Throws InvalidArgument for options that no reader can work with.
  explicit RequestQueue(const ReaderOptions& options);

  // `refusal`: why this reader cannot serve the request; it is then done with that error.
  bool add(const ReadRequest& request, std::string refusal = {});
  // The next block in order; false when none waits.
  bool next(BlockRead* block);
  // A block has finished. True when its request is done with it.
  bool finish(BlockRead& block);
  // Hands over what is done, as many as fit, in the order in which they were done.
  size_t pop_done(std::span<ReadCompletion> completions);

  bool full() const { return free_.empty() || open_bytes_ >= most_open_bytes_; }
  bool any_waiting() const { return !waiting_.empty(); }
  bool any_done() const { return !done_.empty(); }
  uint32_t capacity() const { return static_cast<uint32_t>(slots_.size()); }

 private:
  struct Slot {
    ReadRequest request;
    uint32_t cut_bytes = 0;      // that blocks were made of
    uint32_t flying_blocks = 0;  // made, not finished
    uint64_t done_bytes = 0;
    std::string error;  // of the first block that failed
  };

  uint32_t block_bytes_;
  uint64_t most_open_bytes_;
  uint64_t open_bytes_ = 0;  // of requests that were added, and are not done
  std::vector<Slot> slots_;
  IndexFifo free_;
  IndexFifo waiting_;  // only the first is cut in part
  IndexFifo done_;
};

}  // namespace wsm
