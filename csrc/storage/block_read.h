// One block of a request on its way from the shard to the target: the one place where reads
// advance, are retried and fail.
//
//   start -> read [offset(), +length()) into target() -> advance(result) -> false: read again
//                                                                       -> true: finished
//
// The reader does the read, by whatever means, and hands over what it gave: bytes, or -errno.
//
// Lifecycle: made by RequestQueue, owned by the reader (a thread's stack, a fixed pool); used by
// one thread at a time; shard and target outlive it. Allocates only to tell an error.
// Failure: `error` says path, offset and errno. EINTR, EAGAIN and reads without progress are
// retried up to kMaxIdleReads times in a row. A direct read that the kernel refuses latches its
// shard to buffered reads, and goes on there. What a buffered read brings into the page cache is
// dropped from it again, so that streaming does not evict the user's other files; what was there
// before stays.
#pragma once

#include <bitset>
#include <cstddef>
#include <cstdint>
#include <string>

#include "storage/reader.h"
#include "storage/shard.h"

namespace wsm {

class BlockRead {
 public:
  static constexpr uint32_t kMaxIdleReads = 64;
  static constexpr uint32_t kStrips = 256;  // of a block, each wholly dropped behind or not at all

  BlockRead() = default;
  // [begin, +bytes) of the request; `slot` is the queue's.
  BlockRead(const ReadRequest& request, uint32_t slot, uint32_t begin, uint32_t bytes);

  // Decides between the direct and the buffered way. May ask the kernel: not to be called under a
  // lock.
  void start();

  bool direct() const { return direct_; }
  int fd() const { return direct_ ? shard_->direct_fd() : shard_->buffered_fd(); }
  uint64_t offset() const { return offset_ + from(); }
  uint32_t length() const { return bytes_ - from(); }
  std::byte* target() const { return target_ + from(); }
  const Shard& shard() const { return *shard_; }

  // True when finished: `done` bytes are there, or `error` says why not.
  bool advance(int64_t result);
  // Finishes the block with an error: its read could not even be tried. Returns true, as `advance`.
  bool fail(const std::string& why);

  uint32_t slot() const { return slot_; }
  uint32_t done() const { return done_; }
  std::string& error() { return error_; }

 private:
  // Where the next read begins. A direct read begins aligned also after a short one: the few bytes
  // between are read again.
  uint32_t from() const;
  bool advance_by(uint32_t got);
  bool retry_after(int error);
  bool retry_idle(const std::string& why);
  uint64_t file_end() const;  // now
  std::bitset<kStrips> find_cold_strips() const;
  void drop_cold_strips() const;
  bool finish_at_end();
  bool finish();

  Shard* shard_ = nullptr;
  uint64_t offset_ = 0;
  std::byte* target_ = nullptr;
  uint32_t bytes_ = 0;
  uint32_t need_ = 0;
  uint32_t done_ = 0;  // bytes that are in place, from the block's start
  uint32_t slot_ = 0;
  uint32_t idle_reads_ = 0;  // in a row that brought nothing
  bool buffered_ = false;    // the request asked for a buffered read
  bool direct_ = false;
  std::bitset<kStrips> cold_strips_;  // of which nothing was in the page cache before
  std::string error_;
};

// Reads the range here and now, through the page cache. Throws IoError as the block's error says.
void read_extent(Shard& shard, uint64_t offset, uint64_t bytes, std::byte* target);

// The block's next read, done here and now by pread, or memcpy from a memory shard.
int64_t read_now(const BlockRead& block);

}  // namespace wsm
