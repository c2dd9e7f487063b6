// Which host memory is page-locked, piece by piece.
//
// A copy out of memory of which a part is registered and a part is not is refused by CUDA, and one
// that crosses from one registration into the next is not promised to work. Copies are cut by
// `uniform_bytes`.
// Lifecycle: a value; thread-safe.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>

#include "util/mutex.h"

namespace wsm {

class Registrations {
 public:
  void add(const void* data, uint64_t bytes) {
    const MutexLock lock(mutex_);
    ends_[address(data)] = address(data) + bytes;
  }

  void remove(const void* data) {
    const MutexLock lock(mutex_);
    ends_.erase(address(data));
  }

  // How many of the `bytes` from `data` on lie in one registration, or in none at all.
  uint64_t uniform_bytes(const void* data, uint64_t bytes) const {
    const uintptr_t begin = address(data);
    const MutexLock lock(mutex_);
    const auto next = ends_.upper_bound(begin);  // the first that begins behind `data`
    if (next != ends_.begin()) {
      const uintptr_t end = std::prev(next)->second;
      if (begin < end) return std::min<uint64_t>(bytes, end - begin);
    }
    return next == ends_.end() ? bytes : std::min<uint64_t>(bytes, next->first - begin);
  }

 private:
  static uintptr_t address(const void* data) { return reinterpret_cast<uintptr_t>(data); }

  mutable Mutex mutex_;
  std::map<uintptr_t, uintptr_t> ends_ GUARDED_BY(mutex_);  // by begin; they do not overlap
};

}  // namespace wsm
