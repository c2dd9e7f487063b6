#include "support/faulty_reader.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>

#include "support/contains.h"
#include "support/reader_cases.h"
#include "support/temp_file.h"
#include "util/align.h"

namespace wsm::testing {
namespace {

constexpr uint32_t kBlock = 64 * kKiB;
constexpr uint32_t kBytes = 10 * kBlock;
const ReaderOptions kReader{8, kBlock, 4};

class FaultyReaderTest : public ::testing::Test {
 protected:
  ReadRequest request(uint64_t tag = 0, bool buffered = false) {
    return {shard_.get(), 0, kBytes, kBytes, buffer_.data() + tag * kBytes, tag, buffered};
  }
  size_t mismatch(uint64_t tag = 0) {
    return first_mismatch(buffer_.span(tag * kBytes, kBytes), 0);
  }

  TempFile file_{kBytes};
  std::unique_ptr<Shard> shard_ = Shard::open(file_.path());
  AlignedBuffer buffer_{4 * kBytes};
};

TEST(FaultyReader, WithoutFaultsIsAReader) {
  const MakeReader make = [](const ReaderOptions& options) {
    return std::make_unique<FaultyReader>(1, FaultyOptions{.reader = options});
  };
  reads_unaligned_heads_and_tails(make);
  completes_many_requests_once_each(make);
  stays_ready_while_completions_are_left(make);
}

TEST_F(FaultyReaderTest, ShortAndInterruptedReadsBringTheSameBytes) {
  const uint64_t seed = test_seed();
  for (const bool buffered : {false, true}) {
    FaultyReader reader(seed, {.reader = kReader, .short_chance = 0.6, .interrupt_chance = 0.3});
    EXPECT_EQ(read_one(reader, request(0, buffered)).error, "");
    EXPECT_GT(reader.log().total(), 0u);
    EXPECT_GT(reader.reads(), kBytes / kBlock);
    EXPECT_EQ(mismatch(), kBytes);
  }
}

TEST_F(FaultyReaderTest, AnErrorOnceIsGoneAtTheNextRequest) {
  FaultyReader reader(1, {.reader = kReader, .eio_from_read = 2});
  EXPECT_TRUE(contains(read_one(reader, request()).error, "(errno 5)"));
  EXPECT_EQ(read_one(reader, request()).error, "");
  EXPECT_EQ(mismatch(), kBytes);
}

TEST_F(FaultyReaderTest, AnErrorForEverStays) {
  FaultyReader reader(1, {.reader = kReader, .eio_from_read = 2, .eio_reads = kNever});
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(contains(read_one(reader, request()).error, "(errno 5)"));
}

TEST_F(FaultyReaderTest, ALostReadNeverCompletesAndTheOthersDo) {
  FaultyReader reader(1, {.reader = kReader, .lost_read = 0});
  for (uint64_t tag = 0; tag < 4; ++tag) ASSERT_TRUE(reader.submit(request(tag)));
  for (const ReadCompletion& completion : wait_for(reader, 3)) EXPECT_NE(completion.tag, 0u);
  std::array<ReadCompletion, 4> more;
  while (is_ready(reader)) ASSERT_EQ(reader.poll(more), 0u);
  EXPECT_EQ(reader.poll(more), 0u);
}

TEST_F(FaultyReaderTest, FlippedBitsArrive) {
  FaultyReader reader(test_seed(), {.reader = kReader, .flip_chance = 1});
  EXPECT_EQ(read_one(reader, request()).error, "");
  EXPECT_LT(mismatch(), kBytes);
}

TEST_F(FaultyReaderTest, TheSameSeedGivesTheSameOrder) {
  const auto order = [&](uint64_t seed) {
    ReaderOptions options = kReader;
    options.depth = 40;
    FaultyReader reader(seed, {.reader = options, .max_delay_polls = 50, .shuffled = true});
    for (uint64_t tag = 0; tag < 4; ++tag) EXPECT_TRUE(reader.submit(request(tag)));
    std::vector<uint64_t> tags;
    for (const ReadCompletion& completion : wait_for(reader, 4)) {
      EXPECT_EQ(completion.error, "");
      tags.push_back(completion.tag);
    }
    for (uint64_t tag = 0; tag < 4; ++tag) EXPECT_EQ(mismatch(tag), kBytes);
    return tags;
  };
  bool any_out_of_order = false;
  for (uint64_t seed = 0; seed < 8; ++seed) {
    const auto tags = order(seed);
    EXPECT_EQ(tags, order(seed));
    any_out_of_order |= !std::is_sorted(tags.begin(), tags.end());
  }
  EXPECT_TRUE(any_out_of_order);
}

}  // namespace
}  // namespace wsm::testing
