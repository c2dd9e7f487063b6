// Lets a call fail that the library makes to the system: the nth of its kind, in whichever thread.
//
// The linker wraps these calls (`--wrap`, see CMakeLists.txt), so what is tested is the code as it
// is. Not wrapped is what other libraries call by themselves.
#pragma once

#include <cstdint>

namespace wsm::testing {

enum class Call : uint8_t { kNew, kMap, kAdvise, kEventFd, kOpen, kThread, kRing, kEnd };

const char* text(Call call);

class FailingCalls {
 public:
  // The nth call from now on fails, counted from 1; with `for_ever` all after it too.
  FailingCalls(Call call, uint64_t nth, bool for_ever = false);
  ~FailingCalls();
  FailingCalls(const FailingCalls&) = delete;
  FailingCalls& operator=(const FailingCalls&) = delete;

  uint64_t calls() const;  // since the constructor
  bool struck() const { return calls() >= nth_; }

 private:
  const Call call_;
  const uint64_t nth_;
};

// What this process holds. It should be the same before and after.
struct Held {
  uint64_t threads = 0;
  uint64_t descriptors = 0;
  uint64_t mapped_bytes = 0;  // by the library's own mmap
};
Held held_now();
// Whether no more is held than was before. A thread that was joined, or a ring's own, may be seen a
// little longer: waits for that, up to some seconds. (Less may be held, where `before` saw one.)
bool held_no_more_than(const Held& before);

}  // namespace wsm::testing
