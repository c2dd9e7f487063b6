// What of a file lies in the page cache. Stateless; thread-safe.
#pragma once

#include <cstdint>

namespace wsm {

uint32_t page_bytes();

// kUnknown: the kernel tells only those who own the file or may write it. kMost: all but one page
// in 128, at most. A kernel that is short of memory takes pages here and there; to read a chunk
// past the cache for the sake of a few costs more than these few.
enum class Cached : uint8_t { kUnknown, kNone, kSome, kMost, kAll };

// Whether to read through the page cache.
inline bool mostly(Cached cached) { return cached >= Cached::kMost; }

// How much of the range is cached. The range is not empty and lies inside the file.
Cached cached(int fd, uint64_t offset, uint64_t bytes);

// Drops the clean pages that the range touches. Never fails: it is advice.
void drop_cached(int fd, uint64_t offset, uint64_t bytes);

// The two ways of `cached`, apart for their tests.
Cached cached_by_cachestat(int fd, uint64_t offset, uint64_t bytes);
Cached cached_by_mincore(int fd, uint64_t offset, uint64_t bytes);

}  // namespace wsm
