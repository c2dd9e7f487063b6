// A shard that is open for reading: a file (direct and buffered), or a tensor that lies in RAM.
//
// Lifecycle: opened at start, shared by the readers, closed with the engine; it outlives every read
// that names it. Thread-safe: all methods may be called from any thread (the latch is atomic).
// Failure: `open` throws IoError naming the path; a file whose direct reads are refused latches to
// buffered ones for good and says why.
#pragma once

#include <sys/types.h>
#include <time.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "storage/page_cache.h"
#include "util/mutex.h"
#include "util/unique_fd.h"

namespace wsm {

enum class DirectMode : uint8_t { kAuto, kOff, kOn };

// What direct I/O needs of `path` (offset, length and address alike), by statx(STATX_DIOALIGN),
// else the page size. Throws IoError where there is no such file.
uint32_t direct_alignment(const std::string& path);
// Whether the file's file system keeps it in memory: tmpfs, ramfs.
bool lies_in_memory(const std::string& path);

class Shard {
 public:
  // Opens a regular file, following symbolic links. kAuto tries O_DIRECT and falls back; kOn throws
  // where it is refused. tmpfs is always buffered: it is memory already.
  static std::unique_ptr<Shard> open(const std::string& path, DirectMode mode = DirectMode::kAuto);
  // Borrows memory that outlives the shard.
  static std::unique_ptr<Shard> from_memory(const std::string& name, const void* data,
                                            uint64_t bytes);

  const std::string& path() const { return path_; }
  uint64_t bytes() const { return bytes_; }
  uint32_t alignment() const { return alignment_; }
  const std::byte* memory() const { return memory_; }  // null for a file

  bool direct() const { return direct_.load(std::memory_order_acquire); }
  int direct_fd() const { return direct_fd_.get(); }  // meaningful while direct()
  int buffered_fd() const { return buffered_fd_.get(); }
  // Latches to buffered reads and keeps the first reason. False where the mode is kOn: nothing is
  // latched, and the read that was refused has failed.
  bool refuse_direct(const std::string& why);
  // Direct reads were wanted and refused: by the file system, at open or later.
  bool direct_refused() const { return direct_refused_.load(std::memory_order_acquire); }
  std::string mode_reason() const;  // why reads are direct or buffered, for stats()

  // Lies in RAM: as a tensor, or on a tmpfs. Its pages are no cache.
  bool in_memory() const { return in_memory_; }
  // How much of the range is in the page cache (cachestat, else mincore).
  Cached cached(uint64_t offset, uint64_t bytes) const;
  // True when every page is, but for a few; false when unknown.
  bool in_page_cache(uint64_t offset, uint64_t bytes) const {
    return mostly(cached(offset, bytes));
  }
  // Tells the kernel that the range will not be used again (POSIX_FADV_DONTNEED). Never fails.
  void drop_from_page_cache(uint64_t offset, uint64_t bytes) const;

  // Gives the descriptors back: nothing of the file is read any more. It still tells which it was.
  void close();
  // The same file, unchanged since both were opened.
  bool same_file(const Shard& other) const;
  // Throws IoError saying what changed (replaced, truncated, grown, modified, deleted) since
  // `open`: device, inode, size and mtime of the path are compared. Nothing to do for memory.
  void check_unchanged() const;

 private:
  Shard() = default;
  void identify();            // what check_unchanged compares, and the file's size
  std::string try_direct();   // opens direct_fd_; why not, else empty
  std::string choose_mode();  // direct, or else why not
  void set_reason(std::string reason);

  std::string path_;
  uint64_t bytes_ = 0;
  uint32_t alignment_ = 1;
  const std::byte* memory_ = nullptr;
  UniqueFd buffered_fd_;
  UniqueFd direct_fd_;
  std::atomic<bool> direct_{false};
  DirectMode mode_ = DirectMode::kAuto;
  std::atomic<bool> direct_refused_{false};
  bool in_memory_ = true;
  mutable Mutex reason_mutex_;
  std::string reason_ GUARDED_BY(reason_mutex_);
  dev_t device_ = 0;
  ino_t inode_ = 0;
  timespec mtime_{};
};

}  // namespace wsm
