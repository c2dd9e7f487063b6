#include <gtest/gtest.h>

#include <vector>

#include "storage/reader.h"
#include "support/contains.h"
#include "support/reader_cases.h"
#include "support/temp_file.h"
#include "util/align.h"

namespace wsm::testing {
namespace {

TEST(PreadReader, ReadsSizesAroundABlock) { reads_sizes_around_a_block(make_pread_reader); }
TEST(PreadReader, ReadsUnalignedHeadsAndTails) {
  reads_unaligned_heads_and_tails(make_pread_reader);
}
TEST(PreadReader, AcceptsTheEndOfTheFileWhenEnoughIsThere) {
  accepts_the_end_of_the_file_when_enough_is_there(make_pread_reader);
}
TEST(PreadReader, TellsATruncatedShard) { tells_a_truncated_shard(make_pread_reader); }
TEST(PreadReader, TellsPathOffsetAndErrno) { tells_path_offset_and_errno(make_pread_reader); }
TEST(PreadReader, AnswersFalseWhenAllRequestsAreUsed) {
  answers_false_when_all_requests_are_used(make_pread_reader);
}
TEST(PreadReader, CompletesManyRequestsOnceEach) {
  completes_many_requests_once_each(make_pread_reader);
}
TEST(PreadReader, LatchesARefusedDirectRead) { latches_a_refused_direct_read(make_pread_reader); }
TEST(PreadReader, FailsARefusedDirectReadWhereRequired) {
  fails_a_refused_direct_read_where_required(make_pread_reader);
}
TEST(PreadReader, DropsBehindOnlyWhatWasNotCached) {
  drops_behind_only_what_was_not_cached(make_pread_reader);
}
TEST(PreadReader, CompletesRequestsThatCannotBeRead) {
  completes_requests_that_cannot_be_read(make_pread_reader);
}
TEST(PreadReader, StaysReadyWhileCompletionsAreLeft) {
  stays_ready_while_completions_are_left(make_pread_reader);
}
TEST(PreadReader, WritesNothingAfterItsEnd) { writes_nothing_after_its_end(make_pread_reader); }
TEST(PreadReader, WorksInAnotherThreadThanItsMaker) {
  works_in_another_thread_than_its_maker(make_pread_reader);
}
TEST(PreadReader, RefusesUselessOptions) { refuses_useless_options(make_pread_reader); }

TEST(PreadReader, ReadsMemoryShards) {
  constexpr uint32_t kBlock = 64 * kKiB;
  std::vector<std::byte> source(5 * kBlock + 3);
  fill_pattern(source, 0);
  const auto shard = Shard::from_memory("tensor", source.data(), source.size());
  const auto reader = make_pread_reader({8, kBlock, 4});
  for (const uint32_t bytes : {1u, kBlock - 1, kBlock, kBlock + 1, 4 * kBlock + 9}) {
    const AlignedBuffer buffer(bytes);
    const ReadCompletion completion =
        read_one(*reader, {shard.get(), 13, bytes, bytes, buffer.data(), 0, false});
    EXPECT_EQ(completion.error, "");
    EXPECT_EQ(completion.bytes, bytes);
    EXPECT_EQ(first_mismatch(buffer.span(0, bytes), 13), bytes);
    EXPECT_TRUE(buffer.guard_whole());
  }
}

TEST(PreadReader, ReadsNothingBehindTheEndOfAMemoryShard) {
  std::vector<std::byte> source(1000);
  fill_pattern(source, 0);
  const auto shard = Shard::from_memory("tensor", source.data(), source.size());
  const auto reader = make_pread_reader({8, 64, 4});
  const AlignedBuffer buffer(4096);
  const ReadCompletion enough =
      read_one(*reader, {shard.get(), 900, 4096, 100, buffer.data(), 0, false});
  EXPECT_EQ(enough.error, "");
  EXPECT_EQ(enough.bytes, 100u);
  EXPECT_TRUE(buffer.untouched_from(100));
  const ReadCompletion short_of =
      read_one(*reader, {shard.get(), 900, 4096, 101, buffer.data(), 0, false});
  EXPECT_TRUE(contains(short_of.error, "tensor: truncated"));
}

TEST(PreadReader, ReadsFromTmpfs) {
  const TempFolder folder("/dev/shm");
  write_pattern_file(folder / "shard", 3 * kMiB + 5);
  const auto shard = Shard::open(folder / "shard");
  const auto reader = make_pread_reader({});
  const AlignedBuffer buffer(3 * kMiB);
  const ReadCompletion completion =
      read_one(*reader, {shard.get(), 5, 3 * kMiB, 3 * kMiB, buffer.data(), 0, false});
  EXPECT_EQ(completion.error, "");
  EXPECT_EQ(first_mismatch(buffer.span(0, 3 * kMiB), 5), 3 * kMiB);
}

}  // namespace
}  // namespace wsm::testing
