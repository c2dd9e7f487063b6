#include "util/copy_past_caches.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

namespace wsm {
namespace {

constexpr size_t kGuard = 128;  // bytes around the target that must stay as they are

std::vector<std::byte> pattern(size_t bytes) {
  std::vector<std::byte> out(bytes);
  for (size_t i = 0; i < bytes; ++i) out[i] = static_cast<std::byte>(i * 7 + i / 251);
  return out;
}

// The first byte of `target` and of `source` are `to` and `from` bytes off whatever they lie at.
void expect_copied(size_t bytes, size_t to, size_t from) {
  const std::vector<std::byte> source = pattern(from + bytes);
  std::vector<std::byte> target(kGuard + to + bytes + kGuard, std::byte{0xEE});
  std::vector<std::byte> expected = target;
  const auto begin = static_cast<ptrdiff_t>(kGuard + to);
  std::copy(source.begin() + static_cast<ptrdiff_t>(from), source.end(), expected.begin() + begin);
  copy_past_caches(target.data() + begin, source.data() + from, bytes);
  EXPECT_TRUE(target == expected) << bytes << " bytes, target off by " << to << ", source " << from;
}

TEST(CopyPastCaches, CopiesAllBytesAndNoMoreAtAnyAlignment) {
  for (const size_t bytes : {size_t{0}, size_t{1}, size_t{63}, size_t{65535}, size_t{65536},
                             size_t{65537}, size_t{65599}, size_t{1000003}}) {
    for (const size_t to : {0, 1, 31, 63}) {
      for (const size_t from : {0, 1, 15, 33}) expect_copied(bytes, to, from);
    }
  }
}

}  // namespace
}  // namespace wsm
