// Wakes the conductor out of poll(2). Cheap when it is awake: one atomic exchange, no system call.
#pragma once

#include <atomic>

#include "util/event_fd.h"

namespace wsm {

class Waker {
 public:
  // Any thread, after the change that the sleeper must see.
  void wake() {
    if (asleep_.exchange(false)) event_.raise();
  }

  // The sleeper: announce, look again for work, then sleep on `fd` (or `cancel`).
  void announce() { asleep_ = true; }
  void cancel() { asleep_ = false; }
  int fd() const { return event_.fd(); }
  void clear() {
    asleep_ = false;
    event_.clear();
  }

 private:
  EventFd event_;
  std::atomic<bool> asleep_{false};
};

}  // namespace wsm
