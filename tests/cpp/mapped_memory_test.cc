#include "memory/mapped_memory.h"

#include <gtest/gtest.h>

#include <cstring>
#include <limits>

#include "util/align.h"
#include "util/check.h"

namespace wsm {
namespace {

TEST(MappedMemory, BeginsAtAHugePageAndHasWholePages) {
  const MappedMemory memory(3 * kMiB + 5);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(memory.data()) % (2 * kMiB), 0u);
  EXPECT_EQ(memory.bytes(), align_up(3 * kMiB + 5, map_page_bytes()));
  std::memset(memory.data(), 7, memory.bytes());
}

TEST(MappedMemory, NothingIsMappedForNothing) {
  MappedMemory none(0);
  EXPECT_EQ(none.data(), nullptr);
  EXPECT_EQ(none.bytes(), 0u);
  none.truncate(0);
}

TEST(MappedMemory, WhatIsGivenBackHasLostItsBytesAndMayBeWrittenAgain) {
  MappedMemory memory(8 * kMiB);
  std::memset(memory.data(), 7, memory.bytes());
  memory.release(2 * kMiB, 4 * kMiB);
  EXPECT_EQ(memory.data()[2 * kMiB - 1], std::byte{7});
  EXPECT_EQ(memory.data()[2 * kMiB], std::byte{0});
  EXPECT_EQ(memory.data()[6 * kMiB - 1], std::byte{0});
  EXPECT_EQ(memory.data()[6 * kMiB], std::byte{7});
  std::memset(memory.data(), 8, memory.bytes());
  EXPECT_THROW(memory.release(1, map_page_bytes()), InvalidArgument);
  EXPECT_THROW(memory.release(8 * kMiB, map_page_bytes()), InvalidArgument);
}

TEST(MappedMemory, WhatIsCutOffIsNotThereAnyMore) {
  MappedMemory memory(4 * kMiB);
  std::memset(memory.data(), 7, memory.bytes());
  memory.truncate(5 * kMiB);
  EXPECT_EQ(memory.bytes(), 4 * kMiB);
  memory.truncate(kMiB);
  EXPECT_EQ(memory.bytes(), kMiB);
  EXPECT_EQ(memory.data()[kMiB - 1], std::byte{7});
  memory.truncate(0);
  EXPECT_EQ(memory.data(), nullptr);
}

TEST(MappedMemory, MoreThanThereIsIsAnError) {
  EXPECT_THROW(MappedMemory(uint64_t{1} << 60), OutOfMemory);
  EXPECT_THROW(MappedMemory(std::numeric_limits<uint64_t>::max()), InvalidArgument);
}

}  // namespace
}  // namespace wsm
