#include "util/copy_past_caches.h"

#include <cstdint>
#include <cstring>

// Sanitizers do not see what these instructions read and write.
#if defined(__SSE2__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#include <emmintrin.h>
#define WSM_NON_TEMPORAL 1
#else
#define WSM_NON_TEMPORAL 0
#endif

namespace wsm {
namespace {

#if WSM_NON_TEMPORAL
constexpr size_t kLeast = 64 << 10;
constexpr size_t kLine = 64;  // stored whole, so that the line need not be read

void copy_lines(std::byte* target, const std::byte* source, size_t lines) {
  for (; lines > 0; --lines, target += kLine, source += kLine) {
    const auto* from = reinterpret_cast<const __m128i*>(source);
    auto* to = reinterpret_cast<__m128i*>(target);
    const __m128i a = _mm_loadu_si128(from);
    const __m128i b = _mm_loadu_si128(from + 1);
    const __m128i c = _mm_loadu_si128(from + 2);
    const __m128i d = _mm_loadu_si128(from + 3);
    _mm_stream_si128(to, a);
    _mm_stream_si128(to + 1, b);
    _mm_stream_si128(to + 2, c);
    _mm_stream_si128(to + 3, d);
  }
  _mm_sfence();
}
#endif

}  // namespace

void copy_past_caches(void* target, const void* source, size_t bytes) {
  if (bytes == 0) return;  // then either may be null
#if WSM_NON_TEMPORAL
  if (bytes >= kLeast) {
    auto* to = static_cast<std::byte*>(target);
    const auto* from = static_cast<const std::byte*>(source);
    const size_t head = -reinterpret_cast<uintptr_t>(to) % kLine;
    const size_t lines = (bytes - head) / kLine;
    const size_t tail = head + lines * kLine;
    std::memcpy(to, from, head);
    copy_lines(to + head, from + head, lines);
    std::memcpy(to + tail, from + tail, bytes - tail);
    return;
  }
#endif
  std::memcpy(target, source, bytes);
}

}  // namespace wsm
