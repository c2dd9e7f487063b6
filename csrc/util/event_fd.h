// A flag that another thread, or the kernel, raises and that poll(2) can wait for.
//
// Raised until `clear`, however often it was raised. Thread-safe.
// Failure: the constructor throws where the process is out of file descriptors; raising and
// clearing cannot fail.
#pragma once

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>

#include "util/check.h"
#include "util/unique_fd.h"

namespace wsm {

class EventFd {
 public:
  EventFd() : fd_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    check<IoError>(fd_.valid(), "cannot make an eventfd: ", errno_text(errno),
                   "; raise the limit on open files (ulimit -n)");
  }

  int fd() const { return fd_.get(); }
  // EAGAIN is fine for both: the counter is full, so raised already; or zero, so clear already.
  void raise() {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = ::write(fd_.get(), &one, sizeof(one));
  }
  void clear() {
    uint64_t count = 0;
    [[maybe_unused]] const ssize_t got = ::read(fd_.get(), &count, sizeof(count));
  }

 private:
  UniqueFd fd_;
};

}  // namespace wsm
