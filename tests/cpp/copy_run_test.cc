#include "engine/copy_run.h"

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "support/failing_device.h"
#include "util/align.h"

namespace wsm {
namespace {

using testing::DeviceLedger;
using testing::FailingDevice;

// Copies into `arrived` what is in `wanted`, in pieces.
class CopyRunTest : public ::testing::Test {
 protected:
  explicit CopyRunTest(uint64_t bytes = kMiB) : wanted_(bytes), arrived_(bytes) {
    for (size_t i = 0; i < bytes; ++i) wanted_[i] = static_cast<std::byte>(i * 2654435761u >> 16);
  }
  void add(uint64_t to, uint64_t from, uint64_t bytes) {
    run_.add(arrived_.data() + to, wanted_.data() + from, bytes);
  }
  void expect_arrived(uint64_t to, uint64_t from, uint64_t bytes) {
    EXPECT_EQ(std::memcmp(arrived_.data() + to, wanted_.data() + from, bytes), 0) << to;
  }

  std::vector<std::byte> wanted_, arrived_;
  DeviceLedger ledger_;
  FailingDevice device_{make_host_device(), ledger_};
  CopyRun run_{device_};
};

TEST_F(CopyRunTest, WhatTouchesOnBothSidesIsOneCopy) {
  for (uint64_t at = 0; at < 40; at += 10) add(100 + at, at, 10);
  EXPECT_EQ(ledger_.copies, 0u);
  run_.flush();
  run_.flush();
  device_.drain();
  EXPECT_EQ(ledger_.copies, 1u);
  expect_arrived(100, 0, 40);
}

TEST_F(CopyRunTest, WhatTouchesOnOneSideAloneIsNot) {
  add(0, 0, 10);
  add(10, 11, 10);  // on the device
  add(21, 21, 10);  // in host memory
  add(21, 31, 10);  // in host memory, and over it on the device
  run_.flush();
  device_.drain();
  EXPECT_EQ(ledger_.copies, 4u);
  expect_arrived(0, 0, 10);
  expect_arrived(10, 11, 10);
  expect_arrived(21, 31, 10);
}

TEST_F(CopyRunTest, AfterAFlushNothingIsAddedToWhatWent) {
  add(0, 0, 10);
  run_.flush();
  add(10, 10, 10);
  run_.flush();
  device_.drain();
  EXPECT_EQ(ledger_.copies, 2u);
  expect_arrived(0, 0, 20);
}

class LongCopyRunTest : public CopyRunTest {
 protected:
  LongCopyRunTest() : CopyRunTest(CopyRun::kLongest + 3 * kMiB) {}
};

TEST_F(LongCopyRunTest, NoneIsLongerThanTheLongest) {
  for (uint64_t at = 0; at < wanted_.size(); at += kMiB) add(at, at, kMiB);
  run_.flush();
  device_.drain();
  EXPECT_EQ(ledger_.copies, 2u);
  expect_arrived(0, 0, wanted_.size());
}

}  // namespace
}  // namespace wsm
