// The whole engine over faulty storage: the input decides model, budgets, faults and calls
// (support/chaos.h says what must hold).
//
// Short scenarios on a file system in memory, where there is one: many inputs a second. Direct
// reads and long runs are the soak's (tests/soak).
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <span>

#include "support/chaos.h"
#include "util/align.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace wsm;
  ::setenv("TMPDIR", "/dev/shm", 0);
  static const testing::Ground ground(100 * kKiB + 1);
  static const testing::Terrain terrain{.ground = ground,
                                        .bystanders = false,
                                        .most_passes = 4,
                                        .most_late_bytes = 32 * kKiB,
                                        .longest_stall_us = 100,
                                        .lost_limit_s = 0.003};
  const testing::Outcome outcome = testing::run_chaos(std::span(data, size), terrain);
  if (outcome.wrong.empty()) return 0;
  std::cerr << outcome.wrong << std::endl;
  std::abort();
}
