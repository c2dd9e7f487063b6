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

bool keeps_files_in_memory(const struct statfs& file_system) {
  return file_system.f_type == TMPFS_MAGIC || file_system.f_type == RAMFS_MAGIC;
}

bool in_memory_file_system(int fd) {
  struct statfs info{};
  return ::fstatfs(fd, &info) == 0 && keeps_files_in_memory(info);
}

// Some file systems take O_DIRECT at open and refuse it at the first read.
int error_of_first_direct_read(int fd, uint32_t alignment) {
  const std::unique_ptr<void, decltype(&std::free)> block(std::aligned_alloc(alignment, alignment),
                                                          &std::free);
  if (!block) return ENOMEM;
  const ssize_t got = ::pread(fd, block.get(), alignment, 0);
  return got < 0 && (errno == EINVAL || errno == EOPNOTSUPP) ? errno : 0;
}

struct DirectFacts {
  uint32_t alignment = page_bytes();
  bool none = false;  // the file system says that it does no direct reads of this file
  int error = 0;      // it was not asked: there is no such file, or statx is not to be had
};

DirectFacts direct_facts(int folder, const char* path, int flags) {
  DirectFacts facts;
#ifdef STATX_DIOALIGN
  struct statx info{};
  if (::statx(folder, path, flags, STATX_DIOALIGN, &info) != 0) {
    facts.error = errno;
  } else if (info.stx_mask & STATX_DIOALIGN) {
    const uint32_t alignment = std::max(info.stx_dio_mem_align, info.stx_dio_offset_align);
    facts.none = alignment == 0;
    if (!facts.none) facts.alignment = alignment;
  }
#else
  if (::faccessat(folder, path, F_OK, flags) != 0) facts.error = errno;
#endif
  return facts;
}

bool same_time(const timespec& a, const timespec& b) {
  return a.tv_sec == b.tv_sec && a.tv_nsec == b.tv_nsec;
}

}  // namespace

uint32_t direct_alignment(const std::string& path) {
  const DirectFacts facts = direct_facts(AT_FDCWD, path.c_str(), 0);
  if (facts.error == ENOENT || facts.error == ENOTDIR) fail("cannot examine", path, facts.error);
  return facts.alignment;
}

bool lies_in_memory(const std::string& path) {
  struct statfs info{};
  return ::statfs(path.c_str(), &info) == 0 && keeps_files_in_memory(info);
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
  shard->in_memory_ = in_memory_file_system(shard->buffered_fd());
  // Without read-ahead, pages found in the cache before a read were not put there by the one before
  // it: what decides whether they are dropped stays true.
  if (!shard->in_memory_) (void)::posix_fadvise(shard->buffered_fd(), 0, 0, POSIX_FADV_RANDOM);
  const std::string refusal = shard->choose_mode();
  check<IoError>(mode != DirectMode::kOn || refusal.empty(), "direct reads of ", path,
                 " are required, but cannot be done: ", refusal,
                 "; let them be chosen automatically, or move the file to a local drive");
  if (refusal.empty()) {
    shard->direct_.store(true, std::memory_order_release);
    shard->set_reason(concat("O_DIRECT, alignment ", shard->alignment_));
  } else {
    shard->set_reason(refusal);
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

std::string Shard::choose_mode() {
  const DirectFacts facts = direct_facts(buffered_fd(), "", AT_EMPTY_PATH);
  alignment_ = facts.alignment;
  if (in_memory_) return "tmpfs";
  if (mode_ == DirectMode::kOff) return "direct reads are turned off";
  // Some such files take O_DIRECT all the same, and read through the page cache.
  std::string refusal = facts.none ? "this file system does no direct reads of it" : try_direct();
  direct_refused_ = !refusal.empty();
  return refusal;
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
  const MutexLock lock(reason_mutex_);
  if (!direct()) return true;
  reason_ = why;
  direct_refused_.store(true, std::memory_order_release);
  direct_.store(false, std::memory_order_release);
  return true;
}

void Shard::set_reason(std::string reason) {
  const MutexLock lock(reason_mutex_);
  reason_ = std::move(reason);
}

std::string Shard::mode_reason() const {
  const MutexLock lock(reason_mutex_);
  return reason_;
}

Cached Shard::cached(uint64_t offset, uint64_t bytes) const {
  if (memory_ != nullptr) return Cached::kAll;
  if (offset >= bytes_) return Cached::kNone;
  return wsm::cached(buffered_fd(), offset, std::min(bytes, bytes_ - offset));
}

void Shard::drop_from_page_cache(uint64_t offset, uint64_t bytes) const {
  if (memory_ != nullptr || offset >= bytes_) return;
  drop_cached(buffered_fd(), offset, std::min(bytes, bytes_ - offset));
}

void Shard::close() {
  buffered_fd_ = {};
  direct_fd_ = {};
}

bool Shard::same_file(const Shard& other) const {
  return device_ == other.device_ && inode_ == other.inode_ && bytes_ == other.bytes_ &&
         same_time(mtime_, other.mtime_);
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
