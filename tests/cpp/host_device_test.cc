#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "device/device.h"
#include "device/registrations.h"
#include "util/check.h"

namespace wsm {
namespace {

constexpr StreamHandle kCallingThread = 0;

std::vector<uint8_t> pattern(size_t bytes, unsigned seed = 1) {
  std::vector<uint8_t> data(bytes);
  for (size_t i = 0; i < bytes; ++i) data[i] = static_cast<uint8_t>(i * 131 + i / 257 + seed);
  return data;
}

class HostDeviceTest : public testing::Test {
 protected:
  // Work that keeps the copy stream busy for some milliseconds: what is enqueued behind it is, in
  // practice, still to come when the next line of the test runs.
  void keep_busy() {
    for (int i = 0; i < 8; ++i) {
      device_->copy_to_device(busy_to_.data(), busy_from_.data(), busy_from_.size());
    }
  }

  const std::vector<uint8_t> busy_from_ = std::vector<uint8_t>(8 << 20, 7);
  std::vector<uint8_t> busy_to_ = std::vector<uint8_t>(8 << 20);
  const std::unique_ptr<Device> device_ = make_host_device();
};

TEST_F(HostDeviceTest, NamesItself) {
  EXPECT_STREQ(device_->kind(), "host");
  EXPECT_EQ(device_->index(), 0);
  EXPECT_NE(device_->copy_stream(), kCallingThread);
}

TEST_F(HostDeviceTest, CopiesEverySize) {
  for (size_t bytes : {size_t{0}, size_t{1}, size_t{4095}, size_t{4096}, size_t{3000001}}) {
    const std::vector<uint8_t> source = pattern(bytes);
    std::vector<uint8_t> target(bytes + 1, 0xee);
    device_->copy_to_device(target.data(), source.data(), bytes);
    device_->drain();
    EXPECT_TRUE(std::equal(source.begin(), source.end(), target.begin())) << bytes;
    EXPECT_EQ(target.back(), 0xee) << bytes;
  }
}

TEST_F(HostDeviceTest, CopyOfNothingTakesNullPointers) {
  device_->copy_to_device(nullptr, nullptr, 0);
  device_->fill(nullptr, 1, 0);
  device_->drain();
}

TEST_F(HostDeviceTest, WorksInTheOrderOfTheCalls) {
  const std::vector<uint8_t> source = pattern(100000);
  std::vector<uint8_t> target(source.size());
  keep_busy();
  device_->copy_to_device(target.data(), source.data(), source.size());
  device_->fill(target.data(), 0x5a, 1000);
  device_->copy_to_device(target.data() + 500, source.data() + 500, 10);
  device_->drain();
  EXPECT_EQ(target[0], 0x5a);
  EXPECT_EQ(target[505], source[505]);
  EXPECT_EQ(target[999], 0x5a);
  EXPECT_EQ(target[1000], source[1000]);
}

TEST_F(HostDeviceTest, CopyIsVisibleOnceItsEventWasWaitedFor) {
  const auto ready = device_->make_event();
  for (unsigned round = 0; round < 50; ++round) {
    const std::vector<uint8_t> source = pattern(70000, round);
    std::vector<uint8_t> target(source.size());
    device_->copy_to_device(target.data(), source.data(), source.size());
    device_->record(*ready, device_->copy_stream());
    device_->wait(kCallingThread, *ready);
    EXPECT_TRUE(device_->done(*ready));
    ASSERT_EQ(target, source) << round;
  }
}

TEST_F(HostDeviceTest, CopyIsVisibleOnceItsEventIsDone) {
  const auto ready = device_->make_event();
  const std::vector<uint8_t> source = pattern(70000);
  std::vector<uint8_t> target(source.size());
  keep_busy();
  device_->copy_to_device(target.data(), source.data(), source.size());
  device_->record(*ready, device_->copy_stream());
  while (!device_->done(*ready)) std::this_thread::yield();
  EXPECT_EQ(target, source);
}

TEST_F(HostDeviceTest, EventThatWasNeverRecordedIsDone) {
  const auto event = device_->make_event();
  keep_busy();
  EXPECT_TRUE(device_->done(*event));
  device_->wait(kCallingThread, *event);
  device_->wait(device_->copy_stream(), *event);
}

TEST_F(HostDeviceTest, RecordOnTheCallingThreadIsDoneAtOnce) {
  const auto event = device_->make_event();
  keep_busy();
  device_->record(*event, device_->copy_stream());
  device_->record(*event, kCallingThread);
  EXPECT_TRUE(device_->done(*event));
  device_->wait(kCallingThread, *event);
}

TEST_F(HostDeviceTest, WaitMeansTheLatestRecordAtTheCall) {
  const auto event = device_->make_event();
  std::vector<uint8_t> target(1);
  device_->record(*event, device_->copy_stream());
  device_->wait(kCallingThread, *event);
  keep_busy();
  device_->fill(target.data(), 9, 1);
  device_->record(*event, device_->copy_stream());
  device_->wait(kCallingThread, *event);
  EXPECT_EQ(target[0], 9);
}

TEST_F(HostDeviceTest, CopyStreamMayWaitForItsOwnEventAndForTheCallers) {
  const auto own = device_->make_event();
  const auto callers = device_->make_event();
  std::vector<uint8_t> target(1);
  keep_busy();
  device_->record(*own, device_->copy_stream());
  device_->record(*callers, kCallingThread);
  device_->wait(device_->copy_stream(), *own);
  device_->wait(device_->copy_stream(), *callers);
  device_->fill(target.data(), 3, 1);
  device_->drain();
  EXPECT_EQ(target[0], 3);
}

TEST_F(HostDeviceTest, EventMayBeFreedBeforeItsRecordIsReached) {
  keep_busy();
  auto event = device_->make_event(true);
  device_->record(*event, device_->copy_stream());
  event.reset();
  device_->drain();
}

TEST_F(HostDeviceTest, ElapsedTimeCoversTheWorkBetweenTheEvents) {
  const auto begin = device_->make_event(true);
  const auto middle = device_->make_event(true);
  const auto end = device_->make_event(true);
  device_->record(*begin, kCallingThread);
  keep_busy();
  device_->record(*middle, device_->copy_stream());
  keep_busy();
  device_->record(*end, device_->copy_stream());
  device_->wait(kCallingThread, *end);
  const double first = device_->elapsed_seconds(*begin, *middle);
  const double second = device_->elapsed_seconds(*middle, *end);
  EXPECT_GT(first, 0);
  EXPECT_GT(second, 0);
  EXPECT_NEAR(device_->elapsed_seconds(*begin, *end), first + second, 1e-6);
}

TEST_F(HostDeviceTest, RecordingAgainOnTheCallingThreadKeepsTheLaterTime) {
  const auto event = device_->make_event(true);
  const auto after = device_->make_event(true);
  keep_busy();
  device_->record(*event, device_->copy_stream());
  device_->record(*event, kCallingThread);
  device_->record(*after, kCallingThread);
  device_->drain();
  EXPECT_GE(device_->elapsed_seconds(*event, *after), 0);
}

TEST_F(HostDeviceTest, ElapsedTimeNeedsTimedAndRecordedEvents) {
  const auto timed = device_->make_event(true);
  const auto never = device_->make_event(true);
  const auto plain = device_->make_event();
  device_->record(*timed, kCallingThread);
  device_->record(*plain, kCallingThread);
  EXPECT_THROW(device_->elapsed_seconds(*timed, *plain), InvalidArgument);
  EXPECT_THROW(device_->elapsed_seconds(*timed, *never), InvalidArgument);
  EXPECT_EQ(device_->elapsed_seconds(*timed, *timed), 0);
}

TEST_F(HostDeviceTest, UnknownStreamIsRefused) {
  const auto event = device_->make_event();
  EXPECT_THROW(device_->record(*event, 2), InvalidArgument);
  EXPECT_THROW(device_->wait(2, *event), InvalidArgument);
}

TEST_F(HostDeviceTest, ThreadsMayShareIt) {
  std::vector<std::thread> threads;
  std::atomic<int> wrong = 0;
  for (unsigned seed = 0; seed < 4; ++seed) {
    threads.emplace_back([&, seed] {
      const auto ready = device_->make_event(true);
      const std::vector<uint8_t> source = pattern(20000, seed);
      for (int round = 0; round < 50; ++round) {
        std::vector<uint8_t> target(source.size());
        device_->copy_to_device(target.data(), source.data(), source.size());
        device_->record(*ready, device_->copy_stream());
        device_->wait(kCallingThread, *ready);
        if (target != source) ++wrong;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

TEST(HostDevice, DestructorFinishesWhatWasEnqueued) {
  const std::vector<uint8_t> source = pattern(5 << 20);
  std::vector<uint8_t> target(source.size());
  {
    const auto device = make_host_device();
    device->copy_to_device(target.data(), source.data(), source.size());
  }
  EXPECT_EQ(target, source);
}

TEST(NoCuda, SaysThatTheBuildHasNone) {
  if (built_with_cuda()) GTEST_SKIP() << "this build has CUDA: see cuda_device_test";
  try {
    make_cuda_device(1);
    FAIL() << "a CUDA device without CUDA";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("built without CUDA"), std::string::npos);
    EXPECT_NE(std::string(error.what()).find("WSM_CUDA=ON"), std::string::npos);
  }
}

TEST(Registrations, CutsWhereARegistrationBeginsOrEnds) {
  const auto* base = reinterpret_cast<const char*>(uintptr_t{0x10000});
  Registrations registrations;
  EXPECT_EQ(registrations.uniform_bytes(base, 500), 500u);
  registrations.add(base + 100, 50);  // 100 .. 150, then at once 150 .. 200
  registrations.add(base + 150, 50);
  EXPECT_EQ(registrations.uniform_bytes(base, 500), 100u);
  EXPECT_EQ(registrations.uniform_bytes(base, 100), 100u);
  EXPECT_EQ(registrations.uniform_bytes(base, 99), 99u);
  EXPECT_EQ(registrations.uniform_bytes(base + 100, 500), 50u);
  EXPECT_EQ(registrations.uniform_bytes(base + 149, 500), 1u);
  EXPECT_EQ(registrations.uniform_bytes(base + 150, 50), 50u);
  EXPECT_EQ(registrations.uniform_bytes(base + 200, 500), 500u);
  registrations.remove(base + 100);
  EXPECT_EQ(registrations.uniform_bytes(base + 100, 500), 50u);
  EXPECT_EQ(registrations.uniform_bytes(base, 500), 150u);
}

}  // namespace
}  // namespace wsm
