#include "storage/page_cache.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <string>

#include "util/align.h"
#include "util/check.h"

namespace wsm {
namespace {

// One number on every architecture (Linux 6.5); the headers of the build machine may be older.
constexpr long kCachestat = 451;

struct CacheRange {  // struct cachestat_range
  uint64_t offset;
  uint64_t bytes;
};

struct CacheCounts {  // struct cachestat
  uint64_t cached, dirty, writeback, evicted, recently_evicted;
};

struct PageRange {
  uint64_t begin, bytes;  // both multiples of the page size
};

PageRange pages_of(uint64_t offset, uint64_t bytes) {
  const uint64_t begin = align_down(offset, page_bytes());
  return {begin, align_up(offset + bytes, page_bytes()) - begin};
}

constexpr uint64_t kPagesForOneMissing = 128;

Cached judge(uint64_t there, uint64_t pages) {
  if (there == 0) return Cached::kNone;
  if (there >= pages) return Cached::kAll;
  return (pages - there) * kPagesForOneMissing <= pages ? Cached::kMost : Cached::kSome;
}

// mincore answers "all cached" about files of others, so that nobody can spy on them.
bool mincore_is_honest(int fd) {
  struct stat info{};
  if (::fstat(fd, &info) != 0) return false;
  const uid_t user = ::geteuid();
  if (user == 0 || user == info.st_uid) return true;
  return ::access(concat("/proc/self/fd/", fd).c_str(), W_OK) == 0;
}

}  // namespace

uint32_t page_bytes() {
  static const uint32_t bytes = static_cast<uint32_t>(::sysconf(_SC_PAGESIZE));
  return bytes;
}

Cached cached_by_cachestat(int fd, uint64_t offset, uint64_t bytes) {
  const PageRange pages = pages_of(offset, bytes);
  CacheRange range{pages.begin, pages.bytes};
  CacheCounts counts{};
  if (::syscall(kCachestat, fd, &range, &counts, 0) != 0) return Cached::kUnknown;
  return judge(counts.cached, pages.bytes / page_bytes());
}

Cached cached_by_mincore(int fd, uint64_t offset, uint64_t bytes) {
  if (!mincore_is_honest(fd)) return Cached::kUnknown;
  std::array<unsigned char, 4096> resident;
  uint64_t there = 0;
  PageRange pages = pages_of(offset, bytes);
  const uint64_t count = pages.bytes / page_bytes();
  while (pages.bytes > 0) {
    const uint64_t step = std::min<uint64_t>(pages.bytes, resident.size() * page_bytes());
    void* map = ::mmap(nullptr, step, PROT_READ, MAP_SHARED, fd, static_cast<off_t>(pages.begin));
    if (map == MAP_FAILED) return Cached::kUnknown;
    const bool told = ::mincore(map, step, resident.data()) == 0;
    ::munmap(map, step);
    if (!told) return Cached::kUnknown;
    for (size_t page = 0; page < step / page_bytes(); ++page) there += resident[page] & 1;
    pages = {pages.begin + step, pages.bytes - step};
  }
  return judge(there, count);
}

Cached cached(int fd, uint64_t offset, uint64_t bytes) {
  const Cached told = cached_by_cachestat(fd, offset, bytes);
  return told != Cached::kUnknown ? told : cached_by_mincore(fd, offset, bytes);
}

void drop_cached(int fd, uint64_t offset, uint64_t bytes) {
  const PageRange pages = pages_of(offset, bytes);
  (void)::posix_fadvise(fd, static_cast<off_t>(pages.begin), static_cast<off_t>(pages.bytes),
                        POSIX_FADV_DONTNEED);
}

}  // namespace wsm
