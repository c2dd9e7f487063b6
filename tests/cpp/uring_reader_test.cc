#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#include <array>
#include <cerrno>
#include <cstddef>
#include <thread>

#include "storage/reader.h"
#include "support/contains.h"
#include "support/reader_cases.h"
#include "support/temp_file.h"
#include "util/align.h"

namespace wsm::testing {
namespace {

#if WSM_HAVE_LIBURING

std::unique_ptr<Reader> make(const ReaderOptions& options) {
  std::string why_not;
  auto reader = make_uring_reader(options, &why_not);
  if (!reader) throw IoError(why_not);
  return reader;
}

class UringReader : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string why_not;
    if (!make_uring_reader({}, &why_not)) GTEST_SKIP() << "no io_uring here: " << why_not;
  }
};

// Makes a system call fail with EPERM for this thread, for as long as it lives.
void forbid(uint32_t number) {
  std::array<sock_filter, 4> program = {{
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  }};
  const sock_fprog filter{static_cast<unsigned short>(program.size()), program.data()};
  ASSERT_EQ(::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
  ASSERT_EQ(::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter), 0);
}

TEST_F(UringReader, ReadsSizesAroundABlock) { reads_sizes_around_a_block(make); }
TEST_F(UringReader, ReadsUnalignedHeadsAndTails) { reads_unaligned_heads_and_tails(make); }
TEST_F(UringReader, AcceptsTheEndOfTheFileWhenEnoughIsThere) {
  accepts_the_end_of_the_file_when_enough_is_there(make);
}
TEST_F(UringReader, TellsATruncatedShard) { tells_a_truncated_shard(make); }
TEST_F(UringReader, TellsPathOffsetAndErrno) { tells_path_offset_and_errno(make); }
TEST_F(UringReader, AnswersFalseWhenAllRequestsAreUsed) {
  answers_false_when_all_requests_are_used(make);
}
TEST_F(UringReader, CompletesManyRequestsOnceEach) { completes_many_requests_once_each(make); }
TEST_F(UringReader, LatchesARefusedDirectRead) { latches_a_refused_direct_read(make); }
TEST_F(UringReader, FailsARefusedDirectReadWhereRequired) {
  fails_a_refused_direct_read_where_required(make);
}
TEST_F(UringReader, DropsBehindOnlyWhatWasNotCached) {
  drops_behind_only_what_was_not_cached(make);
}
TEST_F(UringReader, CompletesRequestsThatCannotBeRead) {
  completes_requests_that_cannot_be_read(make);
}
TEST_F(UringReader, StaysReadyWhileCompletionsAreLeft) {
  stays_ready_while_completions_are_left(make);
}
TEST_F(UringReader, WritesNothingAfterItsEnd) { writes_nothing_after_its_end(make); }
TEST_F(UringReader, WorksInAnotherThreadThanItsMaker) {
  works_in_another_thread_than_its_maker(make);
}
TEST_F(UringReader, RefusesUselessOptions) { refuses_useless_options(make); }

TEST_F(UringReader, ReadsWithOneBlockInFlight) {
  const auto reader = make({4, 64 * kKiB, 1});
  const TempFile file(kMiB);
  const auto shard = Shard::open(file.path());
  const AlignedBuffer buffer(2 * kMiB);
  for (const uint64_t tag : {0, 1}) {
    ASSERT_TRUE(
        reader->submit({shard.get(), 0, kMiB, kMiB, buffer.data() + tag * kMiB, tag, false}));
  }
  for (const ReadCompletion& completion : wait_for(*reader, 2)) EXPECT_EQ(completion.error, "");
  for (const uint64_t tag : {0, 1})
    EXPECT_EQ(first_mismatch(buffer.span(tag * kMiB, kMiB), 0), kMiB);
}

TEST_F(UringReader, RefusesMemoryShards) {
  const auto reader = make({});
  std::array<std::byte, 64> source{};
  const auto shard = Shard::from_memory("tensor", source.data(), source.size());
  const AlignedBuffer buffer(64);
  const auto error = read_one(*reader, {shard.get(), 0, 64, 64, buffer.data(), 0, false}).error;
  EXPECT_TRUE(contains(error, "memory"));
  EXPECT_TRUE(buffer.untouched_from(0));
}

TEST_F(UringReader, SaysWhyARingIsRefused) {
  std::thread([] {
    forbid(__NR_io_uring_setup);
    std::string why_not;
    EXPECT_EQ(make_uring_reader({}, &why_not), nullptr);
    EXPECT_TRUE(contains(why_not, "io_uring_setup: Operation not permitted (errno 1)"));
    EXPECT_TRUE(contains(why_not, "seccomp") || contains(why_not, "sysctl"));
  }).join();
}

TEST_F(UringReader, SaysWhyTheFirstReadIsRefused) {
  std::thread([] {
    forbid(__NR_io_uring_enter);
    std::string why_not;
    EXPECT_EQ(make_uring_reader({}, &why_not), nullptr);
    EXPECT_TRUE(contains(why_not, "io_uring_enter: Operation not permitted (errno 1)"));
  }).join();
}

TEST_F(UringReader, FailsAllReadsOnceTheRingRefuses) {
  const TempFile file(kMiB);
  const auto shard = Shard::open(file.path());
  const AlignedBuffer buffer(kMiB);
  std::thread([&] {
    const auto reader = make({4, 64 * kKiB, 3});
    forbid(__NR_io_uring_enter);
    for (uint64_t tag = 0; tag < 4; ++tag) {
      ASSERT_TRUE(reader->submit({shard.get(), 0, kMiB, kMiB, buffer.data(), tag, false}));
    }
    for (const ReadCompletion& completion : wait_for(*reader, 4)) {
      EXPECT_TRUE(contains(completion.error, "io_uring_enter: Operation not permitted (errno 1)"));
      EXPECT_TRUE(contains(completion.error, file.path()));
    }
  }).join();
  EXPECT_TRUE(buffer.untouched_from(0));
}

#else

TEST(UringReader, SaysThatItWasNotBuilt) {
  std::string why_not;
  EXPECT_EQ(make_uring_reader({}, &why_not), nullptr);
  EXPECT_EQ(why_not, "built without liburing");
}

#endif  // WSM_HAVE_LIBURING

}  // namespace
}  // namespace wsm::testing
