// Chaos: a scenario is drawn from bytes and run against the engine. It streams a drawn model by
// drawn budgets over storage and a device that fail, in a drawn order of calls: skips, repeats,
// nesting, aborted passes, interrupted waits, other budgets, close in the middle.
//
// Whatever is drawn, this must hold, else the outcome says what did not:
//   - every byte of an acquired unit is the file's, but for bits that the storage flipped itself;
//   - what is thrown is the error of a fault that was put in, once for each, and says where;
//   - once the storage has recovered, the next pass works;
//   - budgets are held.
// A hang is for the caller to find: see Watchdog.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "support/scenario.h"
#include "support/tally.h"

namespace wsm::testing {

struct Outcome {
  Tally tally;
  std::string wrong;  // empty: all held
};

Outcome run_chaos(std::span<const uint8_t> bytes, const Terrain& terrain);

}  // namespace wsm::testing
