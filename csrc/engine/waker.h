// Wakes the conductor out of poll(2). Cheap when it is awake: one atomic exchange, no system call.
#pragma once

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>

#include "util/check.h"
#include "util/unique_fd.h"

namespace wsm {

class Waker {
 public:
  Waker() : fd_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    check<IoError>(fd_.valid(), "cannot make an eventfd: ", errno_text(errno),
                   "; raise the limit of open files (ulimit -n)");
  }

  // Any thread, after the change that the sleeper must see.
  void wake() {
    if (!asleep_.exchange(false)) return;
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = ::write(fd_.get(), &one, sizeof one);
  }

  // The sleeper: announce, look again for work, then sleep on `fd` (or `cancel`).
  void announce() { asleep_ = true; }
  void cancel() { asleep_ = false; }
  int fd() const { return fd_.get(); }
  void clear() {
    asleep_ = false;
    uint64_t count = 0;
    [[maybe_unused]] const ssize_t got = ::read(fd_.get(), &count, sizeof count);
  }

 private:
  UniqueFd fd_;
  std::atomic<bool> asleep_{false};
};

}  // namespace wsm
