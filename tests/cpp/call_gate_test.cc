#include "engine/call_gate.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>
#include <vector>

namespace wsm {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::hours;

TEST(CallGate, LetsNobodyInOnceItIsShut) {
  CallGate gate;
  EXPECT_TRUE(CallGate::Visit(gate).inside());
  EXPECT_FALSE(gate.is_shut());
  gate.shut();
  EXPECT_TRUE(gate.is_shut());
  EXPECT_FALSE(CallGate::Visit(gate).inside());
  EXPECT_TRUE(gate.wait_until_empty(Clock::now()));
}

TEST(CallGate, IsEmptyWhenTheLastVisitHasEnded) {
  CallGate gate;
  CallGate::Visit outer(gate);
  {
    const CallGate::Visit inner(gate);
    gate.shut();
    EXPECT_FALSE(gate.wait_until_empty(Clock::now()));
  }
  EXPECT_FALSE(gate.wait_until_empty(Clock::now()));
  outer.leave();
  outer.leave();
  EXPECT_TRUE(gate.wait_until_empty(Clock::now()));
}

TEST(CallGate, WhoIsAbsentComesBackOnlyWhileItIsOpen) {
  CallGate gate;
  CallGate::Visit visit(gate);
  {
    const CallGate::Absence absence(visit);
  }
  EXPECT_TRUE(visit.inside());
  {
    const CallGate::Absence absence(visit);
    EXPECT_FALSE(visit.inside());
    gate.shut();
    EXPECT_TRUE(gate.wait_until_empty(Clock::now()));
  }
  EXPECT_FALSE(visit.inside());
}

TEST(CallGate, NobodyIsInsideOnceItWasWaitedFor) {
  for (int round = 0; round < 50; ++round) {
    CallGate gate;
    std::atomic<bool> taken_away{false};
    std::atomic<int> visits{0}, wrong{0};
    std::vector<std::thread> visitors;
    for (int i = 0; i < 3; ++i) {
      visitors.emplace_back([&] {
        while (true) {
          const CallGate::Visit visit(gate);
          if (!visit.inside()) return;
          wrong += taken_away;
          ++visits;
        }
      });
    }
    while (visits < 20) std::this_thread::yield();
    gate.shut();
    EXPECT_TRUE(gate.wait_until_empty(Clock::now() + hours(1)));
    taken_away = true;
    for (std::thread& visitor : visitors) visitor.join();
    EXPECT_EQ(wrong, 0);
  }
}

}  // namespace
}  // namespace wsm
