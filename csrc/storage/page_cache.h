// What of a file lies in the page cache. Stateless; thread-safe.
#pragma once

#include <cstdint>

namespace wsm {

uint32_t page_bytes();

// True when every page of the range is cached; false when not, or when the kernel does not tell: it
// tells only those who own the file or may write it. The range is not empty and lies inside the
// file.
bool cached_whole(int fd, uint64_t offset, uint64_t bytes);

// Drops the clean pages that the range touches. Never fails: it is advice.
void drop_cached(int fd, uint64_t offset, uint64_t bytes);

// The two ways of `cached_whole`, apart for their tests. Negative: unknown; else whether all is
// cached.
int cached_by_cachestat(int fd, uint64_t offset, uint64_t bytes);
int cached_by_mincore(int fd, uint64_t offset, uint64_t bytes);

}  // namespace wsm
