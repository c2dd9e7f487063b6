// Lets calls in until it is shut, and tells when the last one has left: so that what they use can
// be taken away.
//
//   CallGate::Visit visit(gate);
//   if (!visit.inside()) return;      it is shut
//   ...                               what the gate guards is there until the end of the scope
//
//   gate.shut();
//   gate.wait_until_empty(deadline);  nobody is inside, nor will be
//
// Lifecycle: outlives its visits. Thread-safe; one thread may be inside more than once. To wait for
// it from inside would be to wait for oneself.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

#include "util/mutex.h"

namespace wsm {

class CallGate {
 public:
  class Visit {
   public:
    explicit Visit(CallGate& gate) : gate_(gate), inside_(gate.enter()) {}
    ~Visit() { leave(); }
    Visit(const Visit&) = delete;
    Visit& operator=(const Visit&) = delete;

    bool inside() const { return inside_; }
    void leave() {
      if (inside_) gate_.leave();
      inside_ = false;
    }
    void enter() {
      if (!inside_) inside_ = gate_.enter();
    }

   private:
    CallGate& gate_;
    bool inside_;
  };
  // Out of it for a scope, and in again after it, if the gate is still open.
  class Absence {
   public:
    explicit Absence(Visit& visit) : visit_(visit) { visit_.leave(); }
    ~Absence() { visit_.enter(); }
    Absence(const Absence&) = delete;
    Absence& operator=(const Absence&) = delete;

   private:
    Visit& visit_;
  };

  bool is_shut() const { return (state_ & kShut) != 0; }
  void shut() { state_ |= kShut; }
  // After `shut`. False where some call is still inside when the time is over.
  bool wait_until_empty(std::chrono::steady_clock::time_point deadline) {
    const MutexLock lock(mutex_);
    while (state_ != kShut) {
      if (!left_.wait_until(mutex_, deadline)) return state_ == kShut;
    }
    return true;
  }

 private:
  static constexpr uint64_t kShut = 1ull << 63;  // below it: how many are inside

  bool enter() {
    if ((state_.fetch_add(1) & kShut) == 0) return true;
    leave();
    return false;
  }
  void leave() {
    if (state_.fetch_sub(1) != (kShut | 1)) return;
    const MutexLock lock(mutex_);
    left_.notify_all();
  }

  std::atomic<uint64_t> state_{0};
  Mutex mutex_;
  CondVar left_;
};

}  // namespace wsm
