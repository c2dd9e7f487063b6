#include "support/failing_calls.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdarg>
#include <cstddef>
#include <filesystem>
#include <iostream>
#include <new>
#include <system_error>
#include <thread>

#include "support/wait_until.h"

#if WSM_HAVE_LIBURING
#include <liburing.h>
#endif

namespace wsm::testing {
namespace {

struct Fault {
  std::atomic<uint64_t> calls{0};
  std::atomic<uint64_t> first{0};  // the first call that fails; 0: none
  std::atomic<uint64_t> last{0};
};

std::array<Fault, static_cast<size_t>(Call::kEnd)> faults;
std::atomic<uint64_t> mapped_bytes{0};

Fault& fault_of(Call call) { return faults[static_cast<size_t>(call)]; }

bool fails(Call call) {
  Fault& fault = fault_of(call);
  const uint64_t first = fault.first.load();
  if (first == 0) return false;
  const uint64_t number = ++fault.calls;
  return number >= first && number <= fault.last.load();
}

uint64_t entries(const char* folder) {
  uint64_t count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(folder)) ++count;
  return count;
}

}  // namespace

const char* text(Call call) {
  constexpr std::array<const char*, static_cast<size_t>(Call::kEnd)> names = {
      "operator new", "mmap", "madvise", "eventfd", "open", "thread", "io_uring"};
  return names[static_cast<size_t>(call)];
}

FailingCalls::FailingCalls(Call call, uint64_t nth, bool for_ever) : call_(call), nth_(nth) {
  Fault& fault = fault_of(call);
  fault.calls = 0;
  fault.last = for_ever ? UINT64_MAX : nth;
  fault.first = nth;
}

FailingCalls::~FailingCalls() { fault_of(call_).first = 0; }

uint64_t FailingCalls::calls() const { return fault_of(call_).calls; }

Held held_now() {
  return {entries("/proc/self/task"), entries("/proc/self/fd"), mapped_bytes.load()};
}

bool held_no_more_than(const Held& before) {
  const auto limit = std::chrono::steady_clock::now() + kHangLimit;
  while (true) {
    const Held held = held_now();
    if (held.threads <= before.threads && held.descriptors <= before.descriptors &&
        held.mapped_bytes <= before.mapped_bytes) {
      return true;
    }
    if (std::chrono::steady_clock::now() > limit) {
      std::cerr << "held: " << held.threads << " threads, " << held.descriptors << " descriptors, "
                << held.mapped_bytes << " bytes mapped; before: " << before.threads << ", "
                << before.descriptors << ", " << before.mapped_bytes << "\n";
      return false;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

}  // namespace wsm::testing

// -- what the linker puts in place of the calls ---------------------------------------------------

using wsm::testing::Call;
using wsm::testing::fails;
using wsm::testing::mapped_bytes;

extern "C" {

void* __real__Znwm(size_t bytes);
void* __wrap__Znwm(size_t bytes) {
  if (fails(Call::kNew)) throw std::bad_alloc();
  return __real__Znwm(bytes);
}

void* __real_mmap(void* at, size_t bytes, int protection, int flags, int fd, off_t offset);
void* __wrap_mmap(void* at, size_t bytes, int protection, int flags, int fd, off_t offset) {
  if (fails(Call::kMap)) {
    errno = ENOMEM;
    return MAP_FAILED;
  }
  void* const mapped = __real_mmap(at, bytes, protection, flags, fd, offset);
  if (mapped != MAP_FAILED) mapped_bytes += bytes;
  return mapped;
}

int __real_munmap(void* at, size_t bytes);
int __wrap_munmap(void* at, size_t bytes) {
  const int result = __real_munmap(at, bytes);
  if (result == 0) mapped_bytes -= bytes;
  return result;
}

int __real_madvise(void* at, size_t bytes, int advice);
int __wrap_madvise(void* at, size_t bytes, int advice) {
  if (!fails(Call::kAdvise)) return __real_madvise(at, bytes, advice);
  errno = EINVAL;
  return -1;
}

int __real_eventfd(unsigned value, int flags);
int __wrap_eventfd(unsigned value, int flags) {
  if (!fails(Call::kEventFd)) return __real_eventfd(value, flags);
  errno = EMFILE;
  return -1;
}

int __real_open(const char* path, int flags, ...);
int __wrap_open(const char* path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  const unsigned mode = (flags & O_CREAT) != 0 ? va_arg(rest, unsigned) : 0;
  va_end(rest);
  if (!fails(Call::kOpen)) return __real_open(path, flags, mode);
  errno = EMFILE;
  return -1;
}

// std::thread's start in libstdc++. The state is a std::unique_ptr, handed over by address.
void __real__ZNSt6thread15_M_start_threadESt10unique_ptrINS_6_StateESt14default_deleteIS1_EEPFvvE(
    void* self, void* state, void (*depends)());
void __wrap__ZNSt6thread15_M_start_threadESt10unique_ptrINS_6_StateESt14default_deleteIS1_EEPFvvE(
    void* self, void* state, void (*depends)()) {
  if (fails(Call::kThread)) {
    throw std::system_error(EAGAIN, std::generic_category());
  }
  __real__ZNSt6thread15_M_start_threadESt10unique_ptrINS_6_StateESt14default_deleteIS1_EEPFvvE(
      self, state, depends);
}

#if WSM_HAVE_LIBURING
int __real_io_uring_queue_init_params(unsigned entries, io_uring* ring, io_uring_params* params);
int __wrap_io_uring_queue_init_params(unsigned entries, io_uring* ring, io_uring_params* params) {
  if (fails(Call::kRing)) return -ENOMEM;
  return __real_io_uring_queue_init_params(entries, ring, params);
}

int __real_io_uring_register_eventfd(io_uring* ring, int fd);
int __wrap_io_uring_register_eventfd(io_uring* ring, int fd) {
  if (fails(Call::kRing)) return -ENOMEM;
  return __real_io_uring_register_eventfd(ring, fd);
}

int __real_io_uring_submit(io_uring* ring);
int __wrap_io_uring_submit(io_uring* ring) {
  if (fails(Call::kRing)) return -ENOMEM;
  return __real_io_uring_submit(ring);
}
#endif

}  // extern "C"
