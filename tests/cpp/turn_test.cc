#include "seam/turn.h"

#include <gtest/gtest.h>

#include <atomic>
#include <string>
#include <thread>

#include "util/check.h"

namespace wsm {
namespace {

const Turn::Interrupt kNobody = [] {};

TEST(Turn, IsCountedForItsThread) {
  Turn turn(60);
  EXPECT_TRUE(turn.free());
  turn.acquire(kNoTask, kNobody);
  turn.acquire(kNoTask, kNobody);
  EXPECT_TRUE(turn.mine(kNoTask));
  turn.release();
  EXPECT_FALSE(turn.free());
  turn.release();
  EXPECT_TRUE(turn.free());
  EXPECT_FALSE(turn.mine(kNoTask));
}

TEST(Turn, AnotherThreadWaits) {
  Turn turn(60);
  turn.acquire(kNoTask, kNobody);
  std::atomic<bool> asked = false, got = false;
  std::thread other([&] {
    turn.acquire(kNoTask, [&] { asked = true; });
    got = true;
    turn.release();
  });
  while (!asked) std::this_thread::yield();
  EXPECT_FALSE(got);
  turn.release();
  other.join();
  EXPECT_TRUE(got);
  EXPECT_TRUE(turn.free());
}

TEST(Turn, ABackwardIsInItOnAnyThread) {
  Turn turn(60);
  turn.acquire(7, kNobody);
  turn.adopt(7);
  std::thread([&] {
    EXPECT_TRUE(turn.mine(7));
    EXPECT_FALSE(turn.mine(8));
    turn.acquire(7, kNobody);  // counted
    turn.release();
    turn.disown(7);
    EXPECT_FALSE(turn.mine(7));
    turn.release();  // the end of a backward may come on another thread
  }).join();
  EXPECT_TRUE(turn.free());
}

TEST(Turn, AWaitEndsByItsLimitAndByAnInterrupt) {
  Turn turn(0.2);
  turn.acquire(kNoTask, kNobody);
  std::thread([&] {
    try {
      turn.acquire(kNoTask, kNobody);
      ADD_FAILURE() << "two threads have the turn";
    } catch (const TimeoutError& error) {
      EXPECT_NE(std::string(error.what()).find("another thread has been in a forward"),
                std::string::npos);
    }
    EXPECT_THROW(turn.acquire(kNoTask, [] { throw Error("stop"); }), Error);
    EXPECT_FALSE(turn.mine(kNoTask));
  }).join();
  EXPECT_TRUE(turn.mine(kNoTask));
  turn.release();
  EXPECT_TRUE(turn.free());
}

TEST(Turn, LimitsBeyondAllClocksAreLong) {
  Turn turn(1e300);
  turn.acquire(kNoTask, kNobody);
  std::thread other([&] {
    int asked = 0;
    EXPECT_THROW(turn.acquire(kNoTask, [&] { check<Error>(++asked < 2, "enough"); }), Error);
  });
  other.join();
  turn.release();
}

}  // namespace
}  // namespace wsm
