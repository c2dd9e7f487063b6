#include "util/deadline.h"

#include <gtest/gtest.h>

namespace wsm {
namespace {

using Clock = std::chrono::steady_clock;

TEST(Deadline, IsSoManySecondsFromNow) {
  const auto before = Clock::now();
  const auto deadline = deadline_after(2.5);
  EXPECT_GE(deadline, before + std::chrono::milliseconds(2500));
  EXPECT_LE(deadline, Clock::now() + std::chrono::milliseconds(2500));
}

TEST(Deadline, ALimitThatNoClockCanCountIsFarAhead) {
  for (const double seconds : {1e10, 1e300}) {
    EXPECT_GT(deadline_after(seconds), Clock::now() + std::chrono::years(1));
  }
}

}  // namespace
}  // namespace wsm
