// Alignment arithmetic, checked: sizes come from untrusted files.
#pragma once

#include <cstdint>

#include "util/check.h"

namespace wsm {

inline constexpr uint64_t kKiB = 1024;
inline constexpr uint64_t kMiB = 1024 * kKiB;
inline constexpr uint64_t kGiB = 1024 * kMiB;

// `alignment` need not be a power of two; it must not be zero.
constexpr uint64_t align_down(uint64_t value, uint64_t alignment) {
  return value - value % alignment;
}

inline uint64_t checked_add(uint64_t a, uint64_t b) {
  uint64_t sum = 0;
  check(!__builtin_add_overflow(a, b, &sum), "size overflows 64 bits: ", a, " + ", b);
  return sum;
}

inline uint64_t align_up(uint64_t value, uint64_t alignment) {
  return align_down(checked_add(value, alignment - 1), alignment);
}

}  // namespace wsm
