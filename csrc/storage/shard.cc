#include "storage/shard.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "storage/page_cache.h"
#include "util/align.h"
#include "util/check.h"

namespace wsm {
namespace {

[[noreturn]] void fail(const std::string& what, const std::string& path, int error) {
  const bool too_many = error == EMFILE || error == ENFILE;
  throw IoError(concat(what, " ", path, ": ", errno_text(error),
                       too_many ? "; raise the limit on open files (ulimit -n)" : ""));
}

bool in_memory_file_system(int fd) {
  struct statfs info{};
  if (::fstatfs(fd, &info) != 0) return false;
  return info.f_type == TMPFS_MAGIC || info.f_type == RAMFS_MAGIC;
}

// Some file systems take O_DIRECT at open and refuse it at the first read.
int error_of_first_direct_read(int fd, uint32_t alignment) {
  const std::unique_ptr<void, decltype(&std::free)> block(std::aligned_alloc(alignment, alignment),
                                                          &std::free);
  if (!block) return ENOMEM;
  const ssize_t got = ::pread(fd, block.get(), alignment, 0);
  return got < 0 && (errno == EINVAL || errno == EOPNOTSUPP) ? errno : 0;
}

bool same_time(const timespec& a, const timespec& b) {
  return a.tv_sec == b.tv_sec && a.tv_nsec == b.tv_nsec;
}

}  // namespace

uint32_t direct_alignment(const std::string& path) {
#ifdef STATX_DIOALIGN
  struct statx info{};
  if (::statx(AT_FDCWD, path.c_str(), 0, STATX_DIOALIGN, &info) == 0) {
    // Zero: the file system answers that it cannot do direct reads, and `open` will find that out.
    const uint32_t align = std::max(info.stx_dio_mem_align, info.stx_dio_offset_align);
    if ((info.stx_mask & STATX_DIOALIGN) && align != 0) return align;
  } else if (errno != ENOSYS && errno != EINVAL) {
    fail("cannot examine", path, errno);
  }
#endif
  return page_bytes();
}

std::unique_ptr<Shard> Shard::open(const std::string& path, DirectMode mode) {
  std::unique_ptr<Shard> shard(new Shard);
  shard->path_ = path;
  shard->mode_ = mode;
  // O_NONBLOCK: a FIFO must not hang the open; it is taken off again, as reads must block.
  shard->buffered_fd_ = UniqueFd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!shard->buffered_fd_.valid()) fail("cannot open", path, errno);
  shard->identify();
  if (::fcntl(shard->buffered_fd(), F_SETFL, 0) != 0) fail("cannot set the flags of", path, errno);
  shard->alignment_ = direct_alignment(path);

  const bool in_memory = in_memory_file_system(shard->buffered_fd());
  shard->may_drop_behind_ = mode == DirectMode::kAuto && !in_memory;
  const std::string refusal = in_memory                  ? "tmpfs"
                              : mode == DirectMode::kOff ? "direct reads are turned off"
                                                         : shard->try_direct();
  check<IoError>(mode != DirectMode::kOn || refusal.empty(), "direct reads of ", path,
                 " are required, but cannot be done: ", refusal,
                 "; let them be chosen automatically, or move the file to a local drive");
  if (refusal.empty()) {
    shard->direct_.store(true, std::memory_order_release);
    shard->set_reason(concat("O_DIRECT, alignment ", shard->alignment_));
  } else {
    shard->refuse_direct(refusal);
  }
  return shard;
}

std::unique_ptr<Shard> Shard::from_memory(const std::string& name, const void* data,
                                          uint64_t bytes) {
  check(data != nullptr || bytes == 0, "memory shard ", name, " has ", bytes, " bytes at null");
  std::unique_ptr<Shard> shard(new Shard);
  shard->path_ = name;
  shard->bytes_ = bytes;
  static constexpr std::byte kNothing{};  // memory() must not be null, or the shard would be a file
  shard->memory_ = data != nullptr ? static_cast<const std::byte*>(data) : &kNothing;
  shard->set_reason("memory");
  return shard;
}

void Shard::identify() {
  struct stat info{};
  if (::fstat(buffered_fd(), &info) != 0) fail("cannot examine", path_, errno);
  check<IoError>(S_ISREG(info.st_mode), path_, " is ",
                 S_ISDIR(info.st_mode) ? "a directory" : "not a regular file",
                 "; weights are read from regular files");
  bytes_ = static_cast<uint64_t>(info.st_size);
  device_ = info.st_dev;
  inode_ = info.st_ino;
  mtime_ = info.st_mtim;
}

std::string Shard::try_direct() {
  const int flags = O_RDONLY | O_CLOEXEC | O_DIRECT;
  // By way of the open descriptor it is the same file whatever happens to the path.
  UniqueFd fd(::open(concat("/proc/self/fd/", buffered_fd()).c_str(), flags));
  if (!fd.valid() && errno == ENOENT) fd = UniqueFd(::open(path_.c_str(), flags));
  if (!fd.valid()) return concat("O_DIRECT refused at open: ", errno_text(errno));
  struct stat info{};
  if (::fstat(fd.get(), &info) != 0 || info.st_dev != device_ || info.st_ino != inode_) {
    return "the file was replaced while it was opened";
  }
  const int error = error_of_first_direct_read(fd.get(), alignment_);
  if (error != 0) return concat("O_DIRECT refused at the first read: ", errno_text(error));
  direct_fd_ = std::move(fd);
  return {};
}

bool Shard::refuse_direct(const std::string& why) {
  if (mode_ == DirectMode::kOn) return false;
  const std::lock_guard lock(reason_mutex_);
  if (!reason_.empty() && !direct()) return true;
  // Without read-ahead, pages found in the cache before a read were not put there by the one before
  // it: what decides whether they are dropped stays true.
  if (may_drop_behind_) (void)::posix_fadvise(buffered_fd(), 0, 0, POSIX_FADV_RANDOM);
  reason_ = why;
  direct_.store(false, std::memory_order_release);
  return true;
}

void Shard::set_reason(std::string reason) {
  const std::lock_guard lock(reason_mutex_);
  reason_ = std::move(reason);
}

std::string Shard::mode_reason() const {
  const std::lock_guard lock(reason_mutex_);
  return reason_;
}

bool Shard::in_page_cache(uint64_t offset, uint64_t bytes) const {
  if (memory_ != nullptr) return true;
  if (offset >= bytes_) return false;
  return cached_whole(buffered_fd(), offset, std::min(bytes, bytes_ - offset));
}

void Shard::drop_from_page_cache(uint64_t offset, uint64_t bytes) const {
  if (memory_ != nullptr || offset >= bytes_) return;
  drop_cached(buffered_fd(), offset, std::min(bytes, bytes_ - offset));
}

void Shard::check_unchanged() const {
  if (memory_ != nullptr) return;
  struct stat now{};
  const int error = ::stat(path_.c_str(), &now) == 0 ? 0 : errno;
  const uint64_t size = static_cast<uint64_t>(now.st_size);
  std::string change;
  if (error == ENOENT || error == ENOTDIR) {
    change = "deleted";
  } else if (error != 0) {
    fail("cannot examine", path_, error);
  } else if (now.st_dev != device_ || now.st_ino != inode_) {
    change = "replaced by another file";
  } else if (size < bytes_) {
    change = concat("truncated from ", bytes_, " to ", size, " bytes");
  } else if (size > bytes_) {
    change = concat("grown from ", bytes_, " to ", size, " bytes");
  } else if (!same_time(now.st_mtim, mtime_)) {
    change = "modified";
  }
  check<IoError>(change.empty(), path_, " was ", change,
                 " while it was being streamed; put the file back, or load the model again");
}

}  // namespace wsm
