// A descriptor that is readable now, at a later time, or not at all, as it was last told.
#pragma once

#include <sys/epoll.h>
#include <sys/timerfd.h>

#include <algorithm>
#include <chrono>

#include "util/check.h"
#include "util/event_fd.h"
#include "util/unique_fd.h"

namespace wsm::testing {

class ReadyFd {
 public:
  ReadyFd()
      : timer_(::timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK)),
        both_(::epoll_create1(EPOLL_CLOEXEC)) {
    for (const int fd : {timer_.get(), event_.fd()}) {
      epoll_event readable{.events = EPOLLIN, .data = {}};
      check<IoError>(::epoll_ctl(both_.get(), EPOLL_CTL_ADD, fd, &readable) == 0,
                     "cannot wait for a timer: ", errno_text(errno));
    }
  }

  int fd() const { return both_.get(); }
  void raise() { event_.raise(); }
  void raise_after(std::chrono::nanoseconds delay) {
    const auto ns = std::max<int64_t>(1, delay.count());
    set_timer({ns / 1'000'000'000, ns % 1'000'000'000});
  }
  void clear() {
    event_.clear();
    set_timer({});
  }

 private:
  void set_timer(timespec delay) {
    const itimerspec when{.it_interval = {}, .it_value = delay};
    check<IoError>(::timerfd_settime(timer_.get(), 0, &when, nullptr) == 0,
                   "cannot set a timer: ", errno_text(errno));
  }

  EventFd event_;
  UniqueFd timer_;
  UniqueFd both_;
};

}  // namespace wsm::testing
