#include "storage/block_read.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cerrno>

#include "support/contains.h"
#include "support/reader_cases.h"
#include "support/temp_file.h"
#include "util/check.h"

namespace wsm::testing {
namespace {

constexpr uint32_t kBytes = 32768;

// A block of a real shard, whose reads the test makes up.
class BlockReadTest : public ::testing::Test {
 protected:
  BlockRead block(uint32_t bytes = kBytes, uint32_t need = kBytes, bool buffered = true) {
    BlockRead made({shard_.get(), 0, bytes, need, buffer_.data(), 0, buffered}, 3, 0, bytes);
    made.start();
    return made;
  }
  BlockRead direct_block(uint32_t bytes = kBytes, uint32_t need = kBytes) {
    return block(bytes, need, false);
  }

  TempFile file_{4 * kBytes};
  std::unique_ptr<Shard> shard_ = Shard::open(file_.path());
  AlignedBuffer buffer_{4 * kBytes};
};

TEST_F(BlockReadTest, FinishesAfterOneWholeRead) {
  BlockRead read = block();
  EXPECT_EQ(read.offset(), 0u);
  EXPECT_EQ(read.length(), kBytes);
  EXPECT_TRUE(read.advance(kBytes));
  EXPECT_EQ(read.error(), "");
  EXPECT_EQ(read.done(), kBytes);
  EXPECT_EQ(read.slot(), 3u);
}

TEST_F(BlockReadTest, CoversItsPartOfTheRequest) {
  BlockRead read({shard_.get(), 4096, 3 * kBytes, 2 * kBytes + 5, buffer_.data(), 0, true}, 0,
                 2 * kBytes, kBytes);
  read.start();
  EXPECT_EQ(read.offset(), 4096u + 2 * kBytes);
  EXPECT_EQ(read.target(), buffer_.data() + 2 * kBytes);
  EXPECT_FALSE(read.advance(4)) << "five bytes of this block are needed";
  EXPECT_TRUE(read.advance(1));
  EXPECT_EQ(read.error(), "");
}

TEST_F(BlockReadTest, GoesOnAfterAShortRead) {
  BlockRead read = block();
  EXPECT_FALSE(read.advance(1));
  EXPECT_EQ(read.offset(), 1u);
  EXPECT_EQ(read.target(), buffer_.data() + 1);
  EXPECT_FALSE(read.advance(5000));
  EXPECT_EQ(read.offset(), 5001u);
  EXPECT_EQ(read.length(), kBytes - 5001);
  EXPECT_TRUE(read.advance(kBytes - 5001));
  EXPECT_EQ(read.done(), kBytes);
}

TEST_F(BlockReadTest, AlignsAgainAfterAShortDirectRead) {
  if (!shard_->direct()) GTEST_SKIP() << "no direct reads here";
  const uint32_t alignment = shard_->alignment();
  BlockRead read = direct_block();
  EXPECT_TRUE(read.direct());
  EXPECT_FALSE(read.advance(alignment + 7));
  EXPECT_EQ(read.offset(), alignment);
  EXPECT_EQ(read.target(), buffer_.data() + alignment);
  EXPECT_EQ(read.length(), kBytes - alignment);
  EXPECT_EQ(read.done(), alignment + 7) << "what is there stays counted";
  EXPECT_FALSE(read.advance(3))
      << "shorter than what is there already, but not the end of the file";
  EXPECT_EQ(read.done(), alignment + 7);
  EXPECT_TRUE(read.advance(kBytes - alignment));
  EXPECT_EQ(read.done(), kBytes);
  EXPECT_EQ(read.error(), "");
}

TEST_F(BlockReadTest, AcceptsTheEndOnceEnoughIsThere) {
  BlockRead enough = block(kBytes, 5000);
  EXPECT_TRUE(enough.advance(5000));
  EXPECT_EQ(enough.error(), "");
  EXPECT_EQ(enough.done(), 5000u);

  BlockRead nothing_needed = block(kBytes, 0);
  EXPECT_TRUE(nothing_needed.advance(0));
  EXPECT_EQ(nothing_needed.error(), "");
}

TEST_F(BlockReadTest, TellsTheEndBeforeEnoughIsThere) {
  BlockRead read = block(kBytes, 5000);
  EXPECT_FALSE(read.advance(4999));
  EXPECT_TRUE(read.advance(0));
  EXPECT_TRUE(contains(read.error(), "truncated: the file ends at 4999, but must reach to 5000"));
  EXPECT_TRUE(contains(read.error(), file_.path()));
}

TEST_F(BlockReadTest, TellsTheEndOfATruncatedFileFromADirectReadThatBringsNothingNew) {
  if (!shard_->direct()) GTEST_SKIP() << "no direct reads here";
  const uint32_t end = shard_->alignment() + 9;
  ASSERT_EQ(::truncate(file_.path().c_str(), end), 0);
  BlockRead read = direct_block();
  EXPECT_FALSE(read.advance(end));
  EXPECT_TRUE(read.advance(9));
  EXPECT_TRUE(contains(read.error(), "truncated"));
}

TEST_F(BlockReadTest, RetriesInterruptedReadsWithABound) {
  for (const int error : {EINTR, EAGAIN}) {
    BlockRead read = block();
    for (uint32_t i = 0; i < BlockRead::kMaxIdleReads; ++i) ASSERT_FALSE(read.advance(-error));
    EXPECT_FALSE(read.advance(100)) << "progress starts the count anew";
    for (uint32_t i = 0; i < BlockRead::kMaxIdleReads; ++i) ASSERT_FALSE(read.advance(-error));
    EXPECT_TRUE(read.advance(-error));
    EXPECT_TRUE(contains(read.error(), errno_text(error)));
    EXPECT_TRUE(contains(read.error(), "times in a row"));
  }
}

TEST_F(BlockReadTest, GivesUpOnDirectReadsWithoutProgress) {
  if (!shard_->direct()) GTEST_SKIP() << "no direct reads here";
  BlockRead read = direct_block();
  ASSERT_FALSE(read.advance(100));
  for (uint32_t i = 0; i < BlockRead::kMaxIdleReads; ++i) ASSERT_FALSE(read.advance(100));
  EXPECT_TRUE(read.advance(100));
  EXPECT_TRUE(contains(read.error(), "nothing new"));
}

TEST_F(BlockReadTest, TellsPathOffsetAndErrno) {
  BlockRead read = block();
  EXPECT_FALSE(read.advance(4097));
  EXPECT_TRUE(read.advance(-EIO));
  EXPECT_TRUE(contains(read.error(), "offset 4097"));
  EXPECT_TRUE(contains(read.error(), file_.path()));
  EXPECT_TRUE(contains(read.error(), "Input/output error (errno 5)"));
}

TEST_F(BlockReadTest, GoesOnBufferedWhereDirectIsRefused) {
  if (!shard_->direct()) GTEST_SKIP() << "no direct reads here";
  for (const int error : {EINVAL, EOPNOTSUPP}) {
    shard_ = Shard::open(file_.path());
    const uint32_t alignment = shard_->alignment();
    BlockRead read = direct_block();
    BlockRead other = direct_block();
    EXPECT_EQ(read.fd(), shard_->direct_fd());
    EXPECT_FALSE(read.advance(alignment + 5));
    EXPECT_FALSE(read.advance(-error));
    EXPECT_FALSE(shard_->direct());
    EXPECT_TRUE(contains(shard_->mode_reason(), errno_text(error)));
    EXPECT_EQ(read.fd(), shard_->buffered_fd());
    EXPECT_EQ(read.offset(), alignment + 5) << "buffered reads need no alignment";
    const std::string reason = shard_->mode_reason();
    EXPECT_FALSE(other.advance(-error)) << "one that was under way when the shard was latched";
    EXPECT_EQ(other.fd(), shard_->buffered_fd());
    EXPECT_EQ(shard_->mode_reason(), reason) << "the first reason is kept";
    EXPECT_TRUE(read.advance(-EINVAL)) << "nothing is left to fall back to";
    EXPECT_TRUE(contains(read.error(), "(errno 22)"));
  }
}

TEST_F(BlockReadTest, ReadsOneBlockNow) {
  BlockRead read = block();
  while (!read.advance(read_now(read))) {
  }
  EXPECT_EQ(read.error(), "");
  EXPECT_EQ(first_mismatch(buffer_.span(0, kBytes), 0), kBytes);
  EXPECT_TRUE(buffer_.untouched_from(kBytes));
}

}  // namespace
}  // namespace wsm::testing
