#include "seam/turn.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>

#include "util/check.h"

namespace wsm {

namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kInterruptInterval = std::chrono::milliseconds(50);
constexpr double kLongestLimitS = 1e9;  // a clock's durations end somewhere

}  // namespace

Turn::Turn(double limit_s) : limit_s_(std::min(limit_s, kLongestLimitS)), process_(::getpid()) {}

void Turn::acquire(int64_t task, const Interrupt& interrupt) {
  begin_anew_after_fork();
  const MutexLock lock(mutex_);
  const auto limit = Clock::now() + std::chrono::duration<double>(limit_s_);
  while (count_ > 0 && !is_mine(task)) {
    freed_.wait_for(mutex_, kInterruptInterval);
    if (count_ == 0) break;
    check<TimeoutError>(Clock::now() < limit, "another thread has been in a forward of this ",
                        "streamed model for ", limit_s_,
                        " s. If that forward waits for this thread, it cannot go on: call the "
                        "units of one model from one thread");
    const MutexUnlock unlocked(mutex_);
    interrupt();
  }
  if (count_++ == 0) owner_ = std::this_thread::get_id();
}

void Turn::release() {
  const MutexLock lock(mutex_);
  if (count_ == 0) return;
  --count_;
  if (count_ > 0) return;
  owner_ = {};
  freed_.notify_one();
}

void Turn::adopt(int64_t task) {
  const MutexLock lock(mutex_);
  tasks_.insert(task);
}

void Turn::disown(int64_t task) {
  const MutexLock lock(mutex_);
  tasks_.erase(task);
}

bool Turn::mine(int64_t task) const {
  const MutexLock lock(mutex_);
  return count_ > 0 && is_mine(task);
}

bool Turn::free() const {
  const MutexLock lock(mutex_);
  return count_ == 0;
}

bool Turn::is_mine(int64_t task) const {
  return owner_ == std::this_thread::get_id() || tasks_.contains(task);
}

void Turn::begin_anew_after_fork() {
  if (::getpid() == process_) return;
  new (&mutex_) Mutex;
  new (&freed_) CondVar;
  process_ = ::getpid();
  count_ = 0;
  tasks_.clear();
}

}  // namespace wsm
