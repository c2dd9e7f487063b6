#include "memory/pinned_buffer.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <map>

#include "util/align.h"

namespace wsm {
namespace {

const uint64_t kPage = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));

// Registers at most `most_at_once` bytes by a call and `quota` in all; remembers what it was asked.
class LimitedDevice final : public Device {
 public:
  uint64_t most_at_once = UINT64_MAX;
  uint64_t quota = UINT64_MAX;
  bool broken = false;                        // throws from the second registration on
  std::map<std::byte*, uint64_t> registered;  // by begin
  std::vector<uint64_t> asked;

  bool register_host(void* data, size_t bytes, std::string* why) override {
    if (broken && !registered.empty()) throw Error("the device is gone");
    asked.push_back(bytes);
    if (bytes > most_at_once || bytes > quota) {
      *why = "no more than that";
      return false;
    }
    quota -= bytes;
    registered[static_cast<std::byte*>(data)] = bytes;
    return true;
  }
  void unregister_host(void* data) noexcept override {
    unregistered += registered.erase(static_cast<std::byte*>(data));
  }
  size_t unregistered = 0;

  const char* kind() const override { return "limited"; }
  int index() const override { return 0; }
  void copy_to_device(void*, const void*, size_t) override {}
  void fill(void*, uint8_t, size_t) override {}
  StreamHandle copy_stream() const override { return 1; }
  std::unique_ptr<Event> make_event(bool) override { return std::make_unique<Event>(); }
  void record(Event&, StreamHandle) override {}
  void wait(StreamHandle, const Event&) override {}
  bool done(const Event&) override { return true; }
  double elapsed_seconds(const Event&, const Event&) override { return 0; }
  void drain() override {}
};

struct Residence {
  uint64_t mapped = 0;
  uint64_t resident = 0;
  bool stays_out_of_children = true;
};

// What the kernel says of the mappings in [data, +bytes).
Residence residence(const std::byte* data, uint64_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  Residence found;
  bool inside = false;
  std::ifstream smaps("/proc/self/smaps");
  for (std::string line; std::getline(smaps, line);) {
    uintptr_t from = 0, to = 0;
    uint64_t kib = 0;
    if (std::sscanf(line.c_str(), "%lx-%lx ", &from, &to) == 2) {
      inside = from >= begin && to <= begin + bytes;
      if (inside) found.mapped += to - from;
    } else if (inside && std::sscanf(line.c_str(), "Rss: %lu kB", &kib) == 1) {
      found.resident += kib * kKiB;
    } else if (inside && line.starts_with("VmFlags:")) {
      found.stays_out_of_children &= line.find(" dc") != std::string::npos;
    }
  }
  return found;
}

class PinnedBufferSizes : public testing::TestWithParam<uint64_t> {};

TEST_P(PinnedBufferSizes, TakesWhatItSaysAndNoMore) {
  const uint64_t bytes = GetParam();
  LimitedDevice device;
  const PinnedBuffer buffer(device, bytes);
  EXPECT_EQ(buffer.bytes(), bytes);
  EXPECT_EQ(buffer.mapped_bytes(), align_up(bytes, kPage));
  EXPECT_EQ(buffer.pinned_bytes(), buffer.mapped_bytes());
  EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % (2 * kMiB), 0u);
  EXPECT_TRUE(buffer.warnings().empty());
  const Residence found = residence(buffer.data(), buffer.mapped_bytes());
  EXPECT_EQ(found.mapped, buffer.mapped_bytes());
  EXPECT_EQ(found.resident, buffer.mapped_bytes()) << "touched whole, and nothing beyond";
  EXPECT_TRUE(found.stays_out_of_children);
  std::memset(buffer.data(), 0x3c, bytes);
}

INSTANTIATE_TEST_SUITE_P(ByCase, PinnedBufferSizes,
                         testing::Values(1, 4096, 4097, 2 * kMiB - 1, 2 * kMiB, 2 * kMiB + 1,
                                         5 * kMiB + 12345, 33 * kMiB));

TEST(PinnedBuffer, AnyNumberOfThreadsTouchesItAll) {
  LimitedDevice device;
  for (unsigned threads : {1u, 2u, 3u, 40u}) {
    const PinnedBuffer buffer(device, 9 * kMiB + 1, {}, threads);
    EXPECT_EQ(residence(buffer.data(), buffer.mapped_bytes()).resident, buffer.mapped_bytes());
  }
}

TEST(PinnedBuffer, NoBytesMapNothing) {
  LimitedDevice device;
  const PinnedBuffer buffer(device, 0);
  EXPECT_EQ(buffer.data(), nullptr);
  EXPECT_EQ(buffer.mapped_bytes(), 0u);
  EXPECT_TRUE(device.asked.empty());
}

TEST(PinnedBuffer, RegistersTheSegmentsGivenAndUnregistersThem) {
  LimitedDevice device;
  {
    const PinnedBuffer buffer(device, 100 * kKiB + 1, {4 * kKiB, 64 * kKiB, 100 * kKiB + 1});
    const std::map<std::byte*, uint64_t> expected = {{buffer.data(), 4 * kKiB},
                                                     {buffer.data() + 4 * kKiB, 60 * kKiB},
                                                     {buffer.data() + 64 * kKiB, 40 * kKiB}};
    EXPECT_EQ(device.registered, expected);
  }
  EXPECT_TRUE(device.registered.empty());
  EXPECT_EQ(device.unregistered, 3u);
}

TEST(PinnedBuffer, SegmentsAre256MiBWhenNoneAreGiven) {
  LimitedDevice device;
  const PinnedBuffer buffer(device, 257 * kMiB);
  EXPECT_EQ(device.asked, (std::vector<uint64_t>{256 * kMiB, kMiB}));
}

TEST(PinnedBuffer, BadSegmentsAreRefused) {
  LimitedDevice device;
  const auto make = [&](std::vector<uint64_t> ends) { PinnedBuffer(device, 3 * kPage, ends); };
  EXPECT_THROW(make({kPage, kPage, 3 * kPage}), InvalidArgument);      // empty
  EXPECT_THROW(make({2 * kPage, kPage, 3 * kPage}), InvalidArgument);  // descending
  EXPECT_THROW(make({kPage + 1, 3 * kPage}), InvalidArgument);         // inside a page
  EXPECT_THROW(make({2 * kPage}), InvalidArgument);                    // too short
  EXPECT_THROW(make({4 * kPage}), InvalidArgument);                    // too long
  EXPECT_THROW(PinnedBuffer(device, 0, {kPage}), InvalidArgument);
  EXPECT_TRUE(device.asked.empty());
}

TEST(PinnedBuffer, RefusedSizeIsHalvedOnceForAllSegments) {
  LimitedDevice device;
  device.most_at_once = 40 * kMiB;
  const PinnedBuffer buffer(device, 200 * kMiB, {100 * kMiB, 200 * kMiB});
  EXPECT_EQ(buffer.pinned_bytes(), buffer.mapped_bytes());
  EXPECT_EQ(device.asked,
            (std::vector<uint64_t>{100 * kMiB, 50 * kMiB, 26 * kMiB, 26 * kMiB, 26 * kMiB,
                                   22 * kMiB, 26 * kMiB, 26 * kMiB, 26 * kMiB, 22 * kMiB}));
  ASSERT_EQ(buffer.warnings().size(), 1u);
  EXPECT_NE(buffer.warnings()[0].find("50 MiB at once was refused (no more than that)"),
            std::string::npos)
      << buffer.warnings()[0];
}

TEST(PinnedBuffer, WhatTheQuotaDoesNotCoverStaysPageable) {
  LimitedDevice device;
  device.quota = 70 * kMiB;
  {
    const PinnedBuffer buffer(device, 100 * kMiB, {50 * kMiB, 100 * kMiB});
    // 50 MiB fit; of the next, 50 and 26 do not, 16 do, and then 16 do not.
    EXPECT_EQ(buffer.pinned_bytes(), 66 * kMiB);
    EXPECT_EQ(device.registered.size(), 2u);
    ASSERT_EQ(buffer.warnings().size(), 1u);
    const std::string warning = buffer.warnings()[0];
    for (const char* part : {"16 MiB at once was refused (no more than that)", "66 MiB of 100 MiB",
                             "34 MiB stay pageable", "RLIMIT_MEMLOCK is", "WSL2"}) {
      EXPECT_NE(warning.find(part), std::string::npos) << part << " in " << warning;
    }
    std::memset(buffer.data(), 1, buffer.bytes());
  }
  EXPECT_TRUE(device.registered.empty());
}

TEST(PinnedBuffer, NothingRegisteredIsStillMemory) {
  LimitedDevice device;
  device.quota = 0;
  const PinnedBuffer buffer(device, 300 * kKiB);
  EXPECT_EQ(buffer.pinned_bytes(), 0u);
  EXPECT_EQ(device.asked.size(), 1u);
  EXPECT_EQ(buffer.warnings().size(), 1u);
  std::memset(buffer.data(), 1, buffer.bytes());
}

TEST(PinnedBuffer, AnExceptionHalfWayUnregistersWhatWasRegistered) {
  LimitedDevice device;
  device.broken = true;
  EXPECT_THROW(PinnedBuffer(device, 3 * kPage, {kPage, 2 * kPage, 3 * kPage}), Error);
  EXPECT_EQ(device.unregistered, 1u);
  EXPECT_TRUE(device.registered.empty());
}

TEST(PinnedBuffer, MemoryThatCannotBeMappedIsAnErrorThatSaysHowMuch) {
  LimitedDevice device;
  try {
    const PinnedBuffer buffer(device, uint64_t{1} << 60);
    FAIL() << "an exbibyte was mapped";
  } catch (const OutOfMemory& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("MiB of host memory"), std::string::npos) << text;
    EXPECT_NE(text.find("errno 12"), std::string::npos) << text;
    EXPECT_NE(text.find("host_memory"), std::string::npos) << text;
  }
  EXPECT_THROW(PinnedBuffer(device, UINT64_MAX), InvalidArgument);
}

TEST(PinnedBuffer, HostDeviceHasNothingToRefuse) {
  const auto device = make_host_device();
  const PinnedBuffer buffer(*device, kMiB);
  EXPECT_EQ(buffer.pinned_bytes(), kMiB);
  EXPECT_TRUE(buffer.warnings().empty());
}

TEST(PinnedBuffer, TruncatedKeepsWhatLiesBefore) {
  LimitedDevice device;
  const uint64_t segment = 64 * kPage;
  PinnedBuffer buffer(device, 3 * segment, {segment, 2 * segment, 3 * segment});
  std::memset(buffer.data(), 7, buffer.bytes());
  const uint64_t cut = segment + 5 * kPage;
  std::byte* const begin = buffer.data();
  buffer.truncate(cut);
  EXPECT_EQ(buffer.data(), begin);
  EXPECT_EQ(buffer.bytes(), cut);
  EXPECT_EQ(buffer.mapped_bytes(), cut);
  EXPECT_EQ(buffer.pinned_bytes(), cut);
  uint64_t registered = 0;
  for (const auto& [piece, bytes] : device.registered) registered += bytes;
  EXPECT_EQ(registered, cut);
  for (uint64_t i = 0; i < cut; ++i) ASSERT_EQ(buffer.data()[i], std::byte{7});
  unsigned char in_core = 0;
  EXPECT_NE(mincore(begin + cut, kPage, &in_core), 0) << "the rest is unmapped";
}

TEST(PinnedBuffer, TruncatedBeforeItIsPrepared) {
  LimitedDevice device;
  const uint64_t segment = 64 * kPage;
  const auto buffer =
      PinnedBuffer::unprepared(device, 3 * segment, {segment, 2 * segment, 3 * segment});
  EXPECT_TRUE(buffer->prepare_next());
  buffer->truncate(2 * segment);
  EXPECT_EQ(buffer->prepared_bytes(), segment);
  EXPECT_TRUE(buffer->prepare_next());
  EXPECT_FALSE(buffer->prepare_next());
  EXPECT_EQ(buffer->pinned_bytes(), 2 * segment);
  buffer->truncate(0);
  EXPECT_EQ(buffer->mapped_bytes(), 0u);
  EXPECT_TRUE(device.registered.empty());
}

}  // namespace
}  // namespace wsm
