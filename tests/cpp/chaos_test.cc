// The engine under chaos: seeded scenarios, each of several passes.
#include "support/chaos.h"

#include <gtest/gtest.h>

#include "support/wait_until.h"
#include "support/watchdog.h"
#include "util/align.h"
#include "util/check.h"

namespace wsm::testing {
namespace {

constexpr int kScenarios = 40;

TEST(Chaos, BitsAreRightOrTheErrorIsThatOfAFault) {
  const uint64_t first = test_seed();
  const Ground ground(400 * kKiB + 1);
  const Terrain terrain{.ground = ground, .real_readers = true};
  Watchdog watchdog(kHangLimit);
  Tally tally;
  for (uint64_t seed = first; seed < first + kScenarios; ++seed) {
    watchdog.step(concat("WSM_TEST_SEED=", seed));
    const Outcome outcome = run_chaos(random_bytes(seed, 600), terrain);
    ASSERT_EQ(outcome.wrong, "") << "WSM_TEST_SEED=" << seed;
    tally.add(outcome.tally);
  }
  tally.write_json(std::cout);
  std::cout << "\n";
}

}  // namespace
}  // namespace wsm::testing
