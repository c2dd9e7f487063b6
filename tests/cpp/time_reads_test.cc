#include "engine/time_reads.h"

#include <gtest/gtest.h>

#include "support/silent_reader.h"
#include "support/temp_file.h"
#include "util/check.h"

namespace wsm {
namespace {

using testing::SilentReader;
using testing::TempFolder;
using testing::write_pattern_file;

constexpr uint32_t kSpan = 1 << 20;
const std::vector<EngineOptions> kOneWay(1);

std::vector<FileExtent> spans_of(uint32_t file, uint32_t count) {
  std::vector<FileExtent> spans;
  for (uint32_t i = 0; i < count; ++i) spans.push_back({file, uint64_t{i} * kSpan, kSpan});
  return spans;
}

TEST(TimeReads, EveryWayHasItsSamples) {
  TempFolder folder;
  const std::string path = folder / "file";
  write_pattern_file(path, 20 * kSpan);
  for (const DirectMode direct : {DirectMode::kAuto, DirectMode::kOff}) {
    std::vector<EngineOptions> ways(2);
    ways[1].block_bytes = 64 << 10;
    ways[1].preferred = ReaderChoice::kPread;
    for (EngineOptions& way : ways) way.direct = direct;
    const auto rates = time_reads({path}, spans_of(0, 20), ways, 0.02, 3);
    ASSERT_EQ(rates.size(), 2u);
    for (const auto& samples : rates) {
      ASSERT_EQ(samples.size(), 3u);
      for (const double rate : samples) EXPECT_GT(rate, 0);
    }
  }
}

TEST(TimeReads, AWayThatCannotBeHadHasNoSamples) {
  TempFolder folder;
  const std::string path = folder / "file";
  write_pattern_file(path, kSpan);
  std::vector<EngineOptions> ways(2);
  ways[0].make_readers = []() -> Readers { throw Error("no such reader"); };
  const auto rates = time_reads({path}, spans_of(0, 1), ways, 0.01, 2);
  EXPECT_TRUE(rates[0].empty());
  EXPECT_EQ(rates[1].size(), 2u);
}

TEST(TimeReads, OnlyWhatIsBegunInTimeIsRead) {
  TempFolder folder;
  const std::string path = folder / "file";
  write_pattern_file(path, kSpan);
  // All but the first lie past the end: reading them would fail.
  EXPECT_EQ(time_reads({path}, spans_of(0, 3), kOneWay, 0)[0][0], 0);
  EXPECT_THROW(time_reads({path}, spans_of(0, 3), kOneWay, 60), IoError);
}

TEST(TimeReads, WhenTheTimeIsOverNoSampleIsBegun) {
  TempFolder folder;
  const std::string path = folder / "file";
  write_pattern_file(path, kSpan);
  const std::vector<EngineOptions> ways(2);
  const auto rates = time_reads({path}, spans_of(0, 1), ways, 0.02, 5, 0.01);
  EXPECT_EQ(rates[0].size(), 1u);
  EXPECT_EQ(rates[1].size(), 0u);
}

TEST(TimeReads, WhatCannotBeReadIsAnError) {
  TempFolder folder;
  const std::string path = folder / "file";
  write_pattern_file(path, kSpan);
  EXPECT_THROW(time_reads({path}, {}, kOneWay, 1), InvalidArgument);
  EXPECT_THROW(time_reads({path}, spans_of(1, 1), kOneWay, 1), InvalidArgument);
  EXPECT_THROW(time_reads({folder / "gone"}, spans_of(0, 1), kOneWay, 1), IoError);
}

TEST(TimeReads, ADriveThatDoesNotAnswerIsATimeout) {
  TempFolder folder;
  const std::string path = folder / "file";
  write_pattern_file(path, kSpan);
  EngineOptions options;
  options.read_timeout_s = 0.05;
  options.make_readers = [] {
    Readers readers;
    readers.direct = std::make_unique<SilentReader>();
    readers.pool = std::make_unique<SilentReader>();
    return readers;
  };
  EXPECT_THROW(time_reads({path}, spans_of(0, 1), {options}, 1), TimeoutError);
}

}  // namespace
}  // namespace wsm
