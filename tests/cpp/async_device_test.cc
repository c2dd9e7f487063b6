#include "support/async_device.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <string>
#include <vector>

#include "util/check.h"

namespace wsm::testing {
namespace {

constexpr StreamHandle kCompute = 2, kOther = 3;

// What kernels did, in the order in which they ran, by their names.
struct Course {
  std::string ran;
  AsyncGpu::Kernel kernel(char name) {
    return [this, name] { ran += name; };
  }
  size_t at(char name) const { return ran.find(name); }
};

class AsyncDeviceTest : public ::testing::TestWithParam<uint64_t> {
 protected:
  const std::shared_ptr<AsyncGpu> gpu_ = std::make_shared<AsyncGpu>(GetParam());
  const std::unique_ptr<Device> owned_ = std::make_unique<AsyncDevice>(gpu_);
  Device& device_ = *owned_;
  Course course_;
};

TEST_P(AsyncDeviceTest, AStreamKeepsItsOrder) {
  for (const char name : {'a', 'b', 'c', 'd'}) gpu_->launch(kCompute, course_.kernel(name));
  gpu_->synchronize();
  EXPECT_EQ(course_.ran, "abcd");
  EXPECT_EQ(gpu_->pending(kCompute), 0u);
}

TEST_P(AsyncDeviceTest, AWaitComesAfterWhatWasRecorded) {
  const auto event = device_.make_event();
  for (int i = 0; i < 20; ++i) gpu_->launch(kCompute, course_.kernel('a'));
  device_.record(*event, kCompute);
  device_.wait(kOther, *event);
  gpu_->launch(kOther, course_.kernel('b'));
  gpu_->synchronize();
  EXPECT_EQ(course_.at('b'), 20u);
}

TEST_P(AsyncDeviceTest, AnEventThatWasNeverRecordedOrdersNothing) {
  const auto event = device_.make_event();
  EXPECT_TRUE(device_.done(*event));
  device_.wait(kOther, *event);
  gpu_->launch(kOther, course_.kernel('b'));
  gpu_->synchronize(kOther);
  EXPECT_EQ(course_.ran, "b");
}

TEST_P(AsyncDeviceTest, AWaitMeansTheLatestRecordAtTheCall) {
  const auto event = device_.make_event();
  device_.record(*event, kCompute);
  device_.wait(kOther, *event);
  gpu_->launch(kOther, course_.kernel('b'));
  gpu_->launch(kCompute, course_.kernel('a'));
  device_.record(*event, kCompute);
  // The wait is for the first record: this one need not have run.
  gpu_->synchronize(kOther);
  EXPECT_NE(course_.at('b'), std::string::npos);
  while (!device_.done(*event)) continue;
  EXPECT_NE(course_.at('a'), std::string::npos);
}

TEST_P(AsyncDeviceTest, CopiesAndFillsArriveInOrder) {
  std::vector<uint8_t> source(10'000), target(10'000, 0xee);
  for (size_t i = 0; i < source.size(); ++i) source[i] = static_cast<uint8_t>(i * 131);
  device_.fill(target.data(), 1, target.size());
  device_.copy_to_device(target.data(), source.data(), source.size() - 1);
  device_.copy_to_device(nullptr, nullptr, 0);
  device_.drain();
  EXPECT_TRUE(std::equal(source.begin(), source.end() - 1, target.begin()));
  EXPECT_EQ(target.back(), 1);
}

TEST_P(AsyncDeviceTest, TellsTheTimeBetweenTimedEvents) {
  const auto begin = device_.make_event(true), end = device_.make_event(true);
  const auto plain = device_.make_event();
  EXPECT_THROW(device_.elapsed_seconds(*begin, *end), InvalidArgument);  // never recorded
  device_.record(*begin, kCompute);
  device_.record(*end, kCompute);
  device_.record(*plain, kCompute);
  gpu_->synchronize();
  EXPECT_GE(device_.elapsed_seconds(*begin, *end), 0);
  EXPECT_THROW(device_.elapsed_seconds(*begin, *plain), InvalidArgument);
}

TEST_P(AsyncDeviceTest, AnEventMayGoBeforeItsRecordHasRun) {
  auto event = device_.make_event();
  device_.record(*event, kCompute);
  device_.wait(kOther, *event);
  event.reset();
  gpu_->launch(kOther, course_.kernel('b'));
  gpu_->synchronize();
  EXPECT_EQ(course_.ran, "b");
}

TEST_P(AsyncDeviceTest, KnowsItsStreams) {
  EXPECT_THROW(gpu_->launch(AsyncGpu::kStreams, {}), InvalidArgument);
}

INSTANTIATE_TEST_SUITE_P(Seeds, AsyncDeviceTest, ::testing::Range(uint64_t{0}, uint64_t{5}));

// Streams that nothing orders run in many orders, and either may be the first to end.
TEST(AsyncGpu, StreamsRunOutOfStep) {
  std::set<std::string> courses;
  int first_ended[2] = {0, 0};
  for (uint64_t seed = 0; seed < 200; ++seed) {
    AsyncGpu gpu(seed);
    Course course;
    for (int i = 0; i < 8; ++i) {
      gpu.launch(kCompute, course.kernel('a'));
      gpu.launch(kOther, course.kernel('b'));
    }
    gpu.synchronize();
    courses.insert(course.ran);
    ++first_ended[course.ran.back() == 'a'];
  }
  EXPECT_GT(courses.size(), 50u);
  EXPECT_GT(first_ended[0], 20);
  EXPECT_GT(first_ended[1], 20);
}

TEST(AsyncGpu, TheSameSeedRunsTheSameCourse) {
  const auto course_of = [](uint64_t seed) {
    AsyncGpu gpu(seed);
    Course course;
    for (const char name : {'a', 'b', 'c', 'd', 'e', 'f'}) {
      gpu.launch(kCompute, course.kernel(name));
      gpu.launch(kOther, course.kernel(static_cast<char>(name - 32)));
    }
    gpu.synchronize();
    return course.ran;
  };
  for (uint64_t seed = 0; seed < 20; ++seed) EXPECT_EQ(course_of(seed), course_of(seed));
}

// What is to be found by it: a source that is overwritten too soon, a target that is overwritten
// while a kernel still has to read it.
TEST(AsyncGpu, CopiesRunLate) {
  int late_copies = 0, late_kernels = 0;
  for (uint64_t seed = 0; seed < 100; ++seed) {
    auto gpu = std::make_shared<AsyncGpu>(seed);
    AsyncDevice device(gpu);
    std::vector<uint8_t> source(1000, 1), target(1000, 0);
    device.copy_to_device(target.data(), source.data(), source.size());
    std::ranges::fill(source, 2);
    device.drain();
    late_copies += target.back() == 2;
    int seen = 0;
    gpu->launch(kCompute, [&] { seen = target.front(); });
    device.fill(target.data(), 3, target.size());
    gpu->synchronize();
    late_kernels += seen == 3;
  }
  EXPECT_GT(late_copies, 10);
  EXPECT_GT(late_kernels, 10);
}

}  // namespace
}  // namespace wsm::testing
