// Skipped where no GPU answers; with WSM_REQUIRE_GPU=1 that is a failure.
#ifdef WSM_WITH_CUDA

#include <cuda.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#include "device/device.h"
#include "memory/pinned_buffer.h"
#include "util/align.h"
#include "util/check.h"

namespace wsm {
namespace {

#define EXPECT_CUDA(call) EXPECT_EQ((call), cudaSuccess)
#define ASSERT_CUDA(call) ASSERT_EQ((call), cudaSuccess)

int gpu_count() {
  int count = 0;
  const bool answered = cudaGetDeviceCount(&count) == cudaSuccess;
  cudaGetLastError();
  return answered ? count : 0;
}

bool gpu_required() {
  const char* value = std::getenv("WSM_REQUIRE_GPU");
  return value && std::strcmp(value, "1") == 0;
}

cudaStream_t native(StreamHandle stream) { return reinterpret_cast<cudaStream_t>(stream); }

std::vector<uint8_t> pattern(size_t bytes, unsigned seed = 1) {
  std::vector<uint8_t> data(bytes);
  for (size_t i = 0; i < bytes; ++i) data[i] = static_cast<uint8_t>(i * 131 + i / 257 + seed);
  return data;
}

CUcontext current_context() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW);
  auto* get = reinterpret_cast<decltype(&::cuCtxGetCurrent)>(dlsym(library, "cuCtxGetCurrent"));
  CUcontext context = nullptr;
  EXPECT_EQ(get(&context), CUDA_SUCCESS);
  return context;
}

bool has_context(int index) {
  void* library = dlopen("libcuda.so.1", RTLD_NOW);
  auto* get = reinterpret_cast<decltype(&::cuDevicePrimaryCtxGetState)>(
      dlsym(library, "cuDevicePrimaryCtxGetState"));
  unsigned flags = 0;
  int active = 0;
  EXPECT_EQ(get(index, &flags, &active), CUDA_SUCCESS);
  return active != 0;
}

// Device memory, filled with 0xcc.
class Target {
 public:
  explicit Target(size_t bytes) : bytes_(bytes) {
    EXPECT_CUDA(cudaMalloc(&data_, bytes));
    EXPECT_CUDA(cudaMemset(data_, 0xcc, bytes));
    EXPECT_CUDA(cudaDeviceSynchronize());
  }
  ~Target() { EXPECT_CUDA(cudaFree(data_)); }
  Target(const Target&) = delete;
  Target& operator=(const Target&) = delete;

  uint8_t* data() const { return static_cast<uint8_t*>(data_); }
  std::vector<uint8_t> read() const {
    std::vector<uint8_t> bytes(bytes_);
    EXPECT_CUDA(cudaMemcpy(bytes.data(), data_, bytes_, cudaMemcpyDeviceToHost));
    return bytes;
  }

 private:
  size_t bytes_;
  void* data_ = nullptr;
};

// A stream of the caller's, as torch makes them.
class UserStream {
 public:
  UserStream() { EXPECT_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~UserStream() { EXPECT_CUDA(cudaStreamDestroy(stream_)); }
  UserStream(const UserStream&) = delete;
  UserStream& operator=(const UserStream&) = delete;
  cudaStream_t get() const { return stream_; }
  StreamHandle handle() const { return reinterpret_cast<StreamHandle>(stream_); }

 private:
  cudaStream_t stream_ = nullptr;
};

// Holds up a stream until it is opened: what is enqueued behind it has not run, for certain.
class Gate {
 public:
  ~Gate() { open(); }
  void close(cudaStream_t stream) { EXPECT_CUDA(cudaLaunchHostFunc(stream, &Gate::pass, this)); }
  void open() {
    {
      std::lock_guard lock(mutex_);
      open_ = true;
    }
    opened_.notify_all();
  }

 private:
  static void pass(void* gate) {
    auto* self = static_cast<Gate*>(gate);
    std::unique_lock lock(self->mutex_);
    self->opened_.wait(lock, [self] { return self->open_; });
  }
  std::mutex mutex_;
  std::condition_variable opened_;
  bool open_ = false;
};

class CudaDeviceTest : public testing::Test {
 protected:
  void SetUp() override {
    if (gpu_count() == 0) {
      if (gpu_required()) FAIL() << "WSM_REQUIRE_GPU=1, and no GPU answers";
      GTEST_SKIP() << "no GPU answers";
    }
    device_ = make_cuda_device(0);
  }
  void TearDown() override {
    if (!device_) return;
    EXPECT_EQ(cudaPeekAtLastError(), cudaSuccess) << "an error is left";
  }

  std::unique_ptr<Device> device_;
};

// Proves most in a process of its own, as ctest runs it, where device 0 has no context yet.
TEST(CudaDevices, UsingOneMakesNoContextOnAnother) {
  if (gpu_count() < 2) GTEST_SKIP() << "needs two GPUs";
  const bool had_context = has_context(0);
  const auto device = make_cuda_device(1);
  const PinnedBuffer buffer(*device, kMiB);
  const auto event = device->make_event();
  device->record(*event, device->copy_stream());
  device->drain();
  EXPECT_TRUE(device->done(*event));
  EXPECT_TRUE(has_context(1));
  EXPECT_EQ(has_context(0), had_context);
}

TEST(CudaDevices, CopiesReachTheDeviceMeantAndTheCurrentOneStays) {
  if (gpu_count() < 2) GTEST_SKIP() << "needs two GPUs";
  ASSERT_CUDA(cudaSetDevice(1));
  Target target(kMiB);
  ASSERT_CUDA(cudaSetDevice(0));
  const auto device = make_cuda_device(1);
  const std::vector<uint8_t> source = pattern(kMiB);
  device->copy_to_device(target.data(), source.data(), source.size());
  device->drain();
  int current = -1;
  ASSERT_CUDA(cudaGetDevice(&current));
  EXPECT_EQ(current, 0);
  EXPECT_EQ(target.read(), source);
}

TEST(CudaDevices, MissingDriverIsSaid) {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) GTEST_SKIP() << "a driver answers";
  cudaGetLastError();
  try {
    make_cuda_device(0);
    FAIL() << "a CUDA device without a driver";
  } catch (const Error& error) {
    const std::string text = error.what();
    for (const char* part : {"driver", "built with CUDA", "or newer", "device=\"cpu\""}) {
      EXPECT_NE(text.find(part), std::string::npos) << part << " in " << text;
    }
  }
}

TEST_F(CudaDeviceTest, IndexOutOfRangeSaysHowManyThereAre) {
  for (int index : {-1, gpu_count()}) {
    try {
      make_cuda_device(index);
      FAIL() << index;
    } catch (const InvalidArgument& error) {
      const std::string text = error.what();
      EXPECT_NE(text.find(concat(gpu_count(), " CUDA device")), std::string::npos) << text;
    }
  }
}

TEST_F(CudaDeviceTest, CopiesEverySize) {
  const PinnedBuffer buffer(*device_, 33 * kMiB);
  auto* source = reinterpret_cast<uint8_t*>(buffer.data());
  const std::vector<uint8_t> bytes = pattern(buffer.bytes());
  std::memcpy(source, bytes.data(), bytes.size());
  for (size_t size : {size_t{0}, size_t{1}, size_t{255}, size_t{4097}, 16 * kMiB, 32 * kMiB + 3}) {
    Target target(size + 1);
    device_->copy_to_device(target.data(), source + 5, size);
    device_->drain();
    const std::vector<uint8_t> found = target.read();
    EXPECT_EQ(std::memcmp(found.data(), source + 5, size), 0) << size;
    EXPECT_EQ(found.back(), 0xcc) << size;
  }
}

TEST_F(CudaDeviceTest, FillsInTheOrderOfTheCalls) {
  const std::vector<uint8_t> source = pattern(4096);
  Target target(4096);
  device_->copy_to_device(target.data(), source.data(), source.size());
  device_->fill(target.data() + 10, 0x5a, 20);
  device_->drain();
  std::vector<uint8_t> expected = source;
  std::fill_n(expected.begin() + 10, 20, 0x5a);
  EXPECT_EQ(target.read(), expected);
}

TEST_F(CudaDeviceTest, CopiesAcrossRegistrationsAndPageableMemory) {
  void* memory = std::aligned_alloc(4 * kKiB, 4 * kMiB);
  auto* source = static_cast<uint8_t*>(memory);
  const std::vector<uint8_t> bytes = pattern(4 * kMiB);
  std::memcpy(source, bytes.data(), bytes.size());
  // The first MiB, the second, and the rest pageable.
  ASSERT_TRUE(device_->register_host(source, kMiB, nullptr));
  ASSERT_TRUE(device_->register_host(source + kMiB, kMiB, nullptr));
  Target target(bytes.size());
  device_->copy_to_device(target.data(), source, bytes.size());
  device_->drain();
  EXPECT_EQ(target.read(), bytes);
  device_->unregister_host(source);
  device_->unregister_host(source + kMiB);
  std::free(memory);
}

TEST_F(CudaDeviceTest, PinnedBufferIsPageLocked) {
  const PinnedBuffer buffer(*device_, 5 * kMiB + 1);
  EXPECT_EQ(buffer.pinned_bytes(), buffer.mapped_bytes());
  EXPECT_TRUE(buffer.warnings().empty());
  for (uint64_t at : {uint64_t{0}, 5 * kMiB}) {
    cudaPointerAttributes attributes{};
    ASSERT_CUDA(cudaPointerGetAttributes(&attributes, buffer.data() + at));
    EXPECT_EQ(attributes.type, cudaMemoryTypeHost);
  }
}

TEST_F(CudaDeviceTest, CopyWaitsForTheUsersStream) {
  const PinnedBuffer buffer(*device_, 2 * kMiB);
  auto* seen = reinterpret_cast<uint8_t*>(buffer.data()) + kMiB;
  std::memset(buffer.data(), 0x11, kMiB);
  Target target(kMiB);
  UserStream user;
  const auto released = device_->make_event();
  const auto copied = device_->make_event();
  {
    Gate gate;
    gate.close(user.get());
    // Stands for the forward that still reads the place.
    EXPECT_CUDA(cudaMemcpyAsync(seen, target.data(), kMiB, cudaMemcpyDeviceToHost, user.get()));
    device_->record(*released, user.handle());
    device_->wait(device_->copy_stream(), *released);
    device_->copy_to_device(target.data(), buffer.data(), kMiB);
    device_->record(*copied, device_->copy_stream());
    EXPECT_FALSE(device_->done(*released));
    EXPECT_FALSE(device_->done(*copied));
    gate.open();
    device_->drain();
  }
  EXPECT_TRUE(device_->done(*released));
  EXPECT_TRUE(device_->done(*copied));
  EXPECT_EQ(std::vector<uint8_t>(seen, seen + kMiB), std::vector<uint8_t>(kMiB, 0xcc));
  EXPECT_EQ(target.read(), std::vector<uint8_t>(kMiB, 0x11));
}

TEST_F(CudaDeviceTest, UsersStreamWaitsForTheCopy) {
  const PinnedBuffer buffer(*device_, 2 * kMiB);
  std::memset(buffer.data(), 0x22, kMiB);
  auto* seen = reinterpret_cast<uint8_t*>(buffer.data()) + kMiB;
  Target target(kMiB);
  UserStream user;
  const auto ready = device_->make_event();
  const auto used = device_->make_event();
  Gate gate;
  gate.close(native(device_->copy_stream()));
  device_->copy_to_device(target.data(), buffer.data(), kMiB);
  device_->record(*ready, device_->copy_stream());
  device_->wait(user.handle(), *ready);
  EXPECT_CUDA(cudaMemcpyAsync(seen, target.data(), kMiB, cudaMemcpyDeviceToHost, user.get()));
  device_->record(*used, user.handle());
  EXPECT_FALSE(device_->done(*used));
  gate.open();
  EXPECT_CUDA(cudaStreamSynchronize(user.get()));
  EXPECT_EQ(std::vector<uint8_t>(seen, seen + kMiB), std::vector<uint8_t>(kMiB, 0x22));
}

TEST_F(CudaDeviceTest, WaitMeansTheLatestRecordAtTheCall) {
  UserStream first, second;
  const auto event = device_->make_event();
  Gate gate;
  device_->record(*event, first.handle());
  device_->wait(second.handle(), *event);
  gate.close(first.get());
  device_->record(*event, first.handle());  // moves no wait that came before
  EXPECT_CUDA(cudaStreamSynchronize(second.get()));
  EXPECT_FALSE(device_->done(*event));
  gate.open();
  EXPECT_CUDA(cudaStreamSynchronize(first.get()));
}

TEST_F(CudaDeviceTest, LegacyDefaultStreamIsStreamZero) {
  Target target(kMiB);
  const auto event = device_->make_event();
  Gate gate;
  gate.close(nullptr);
  device_->record(*event, 0);
  EXPECT_FALSE(device_->done(*event));
  const auto copied = device_->make_event();
  device_->fill(target.data(), 1, kMiB);
  device_->record(*copied, device_->copy_stream());
  device_->drain();  // the copy stream does not wait for the default stream by itself
  EXPECT_TRUE(device_->done(*copied));
  EXPECT_FALSE(device_->done(*event));
  gate.open();
  EXPECT_CUDA(cudaStreamSynchronize(nullptr));
  EXPECT_TRUE(device_->done(*event));
}

TEST_F(CudaDeviceTest, EventThatWasNeverRecordedIsDone) {
  const auto event = device_->make_event();
  EXPECT_TRUE(device_->done(*event));
  device_->wait(device_->copy_stream(), *event);
  device_->drain();
}

TEST_F(CudaDeviceTest, ElapsedTimeCoversTheWorkBetweenTheEvents) {
  const PinnedBuffer buffer(*device_, 64 * kMiB);
  Target target(64 * kMiB);
  const auto begin = device_->make_event(true);
  const auto end = device_->make_event(true);
  device_->record(*begin, device_->copy_stream());
  device_->copy_to_device(target.data(), buffer.data(), 64 * kMiB);
  device_->record(*end, device_->copy_stream());
  device_->drain();
  const double seconds = device_->elapsed_seconds(*begin, *end);
  EXPECT_GT(seconds, 64 * kMiB / 1e12) << "no link carries 1 TB/s";
  EXPECT_LT(seconds, 10);
  const auto plain = device_->make_event();
  device_->record(*plain, device_->copy_stream());
  EXPECT_THROW(device_->elapsed_seconds(*begin, *plain), InvalidArgument);
}

TEST_F(CudaDeviceTest, RefusedRegistrationSaysWhyAndLeavesNoError) {
  const PinnedBuffer buffer(*device_, kMiB);
  std::string why;
  EXPECT_FALSE(device_->register_host(buffer.data(), kMiB, &why));
  EXPECT_NE(why.find("cudaErrorHostMemoryAlreadyRegistered"), std::string::npos) << why;
  EXPECT_EQ(cudaPeekAtLastError(), cudaSuccess);
  why.clear();
  EXPECT_FALSE(device_->register_host(reinterpret_cast<void*>(uintptr_t{4096}), kMiB, &why));
  EXPECT_NE(why.find("cudaError"), std::string::npos) << why;
  EXPECT_EQ(cudaPeekAtLastError(), cudaSuccess);
  device_->unregister_host(reinterpret_cast<void*>(uintptr_t{4096}));
  EXPECT_EQ(cudaPeekAtLastError(), cudaSuccess);
}

TEST_F(CudaDeviceTest, FailedCallThrowsWithItsPlaceAndTheNextOneWorks) {
  const std::vector<uint8_t> source = pattern(4096);
  try {
    device_->copy_to_device(nullptr, source.data(), source.size());
    FAIL() << "a copy to nowhere";
  } catch (const Error& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("cudaMemcpyAsync"), std::string::npos) << text;
    EXPECT_NE(text.find("cudaErrorInvalidValue"), std::string::npos) << text;
    EXPECT_NE(text.find("(cuda_device.cc:"), std::string::npos) << text;
  }
  EXPECT_EQ(cudaPeekAtLastError(), cudaSuccess);
  Target target(source.size());
  device_->copy_to_device(target.data(), source.data(), source.size());
  device_->drain();
  EXPECT_EQ(target.read(), source);
}

TEST_F(CudaDeviceTest, ThreadThatHadNoContextHasNoneAfterwards) {
  Target target(kMiB);
  std::thread([&] {
    ASSERT_EQ(current_context(), nullptr);
    const PinnedBuffer buffer(*device_, kMiB);
    const auto event = device_->make_event(true);
    device_->copy_to_device(target.data(), buffer.data(), kMiB);
    device_->fill(target.data(), 1, 1);
    device_->record(*event, device_->copy_stream());
    device_->wait(device_->copy_stream(), *event);
    device_->drain();
    EXPECT_TRUE(device_->done(*event));
    EXPECT_EQ(device_->elapsed_seconds(*event, *event), 0);
    EXPECT_EQ(current_context(), nullptr);
  }).join();
}

TEST_F(CudaDeviceTest, TwoDevicesOfOneIndexLiveSideBySide) {
  auto second = make_cuda_device(0);
  EXPECT_NE(second->copy_stream(), device_->copy_stream());
  second.reset();
  Target target(1);
  device_->fill(target.data(), 7, 1);
  device_->drain();
  EXPECT_EQ(target.read()[0], 7);
}

}  // namespace
}  // namespace wsm

#endif  // WSM_WITH_CUDA
