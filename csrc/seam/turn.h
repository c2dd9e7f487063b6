// Whose turn it is to use the units of a streamed model: a thread's, or a backward's.
//
//   turn.acquire(task, interrupt);   waits while it is somebody else's
//   turn.adopt(task);                the backward `task` shares the turn from now on
//   ...                              acquires of the owner are counted
//   turn.disown(task);
//   turn.release();                  the last one frees it
//
// A turn belongs to the thread that acquired it first, and to the backwards (autograd's graph
// tasks) that it adopted: the nodes of a backward may run on several threads, and its end may come
// on another one than its begin. So any thread may call `release`.
// Failure: `acquire` throws TimeoutError after the time limit, or what `interrupt` throws, and
// nothing has changed. A forked child begins anew: the thread whose turn it was is not there.
// Thread-safe.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <set>
#include <thread>

#include "util/mutex.h"

namespace wsm {

constexpr int64_t kNoTask = -1;  // outside of all backwards

class Turn {
 public:
  using Interrupt = std::function<void()>;  // called now and then by a waiter, without locks

  explicit Turn(double limit_s);

  // `task`: the backward that this thread works for, or kNoTask.
  void acquire(int64_t task, const Interrupt& interrupt);
  void release();
  void adopt(int64_t task);
  void disown(int64_t task);
  bool mine(int64_t task) const;
  bool free() const;

 private:
  bool is_mine(int64_t task) const REQUIRES(mutex_);
  // The mutex may be held by a thread that is not in the child: it is made anew.
  void begin_anew_after_fork() NO_THREAD_SAFETY_ANALYSIS;

  const double limit_s_;
  mutable Mutex mutex_;
  CondVar freed_;
  pid_t process_;
  uint64_t count_ GUARDED_BY(mutex_) = 0;  // acquires that were not released; 0: the turn is free
  std::thread::id owner_ GUARDED_BY(mutex_);  // while count_ > 0
  std::set<int64_t> tasks_ GUARDED_BY(mutex_);
};

}  // namespace wsm
