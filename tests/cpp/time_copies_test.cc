#include "memory/time_copies.h"

#include <gtest/gtest.h>

#include <vector>

#include "support/wait_until.h"
#include "util/check.h"

namespace wsm {
namespace {

TEST(TimeCopies, EverySizeIsTimedAndTheBytesArrive) {
  const auto device = make_host_device();
  std::vector<std::byte> target(1 << 20, std::byte{7});
  const auto larger_takes_longer = [&] {
    const auto seconds =
        time_copies(*device, target.data(), target.size(), 4 << 20, {1 << 20, 4096});
    EXPECT_EQ(seconds.size(), 2u);
    EXPECT_GT(seconds[1], 0);
    return seconds[0] > seconds[1];
  };
  // On a busy machine a few small ones may be held up for longer than a large one takes.
  testing::wait_until(larger_takes_longer, "a large copy that takes longer than a small one");
  EXPECT_EQ(target.front(), std::byte{0});
  EXPECT_EQ(target.back(), std::byte{0});
}

TEST(TimeCopies, SizesThatDoNotFitAreErrors) {
  const auto device = make_host_device();
  std::vector<std::byte> target(4096);
  const auto with = [&](uint64_t source, uint64_t size) {
    return time_copies(*device, target.data(), target.size(), source, {size});
  };
  EXPECT_THROW(with(8192, 0), InvalidArgument);
  EXPECT_THROW(with(8192, 4097), InvalidArgument);
  EXPECT_THROW(with(1024, 2048), InvalidArgument);
}

}  // namespace
}  // namespace wsm
