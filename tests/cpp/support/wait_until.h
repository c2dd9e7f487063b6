// Waiting for what must happen: a condition, never a guessed time. The limit only ends what hangs.
#pragma once

#include <chrono>
#include <thread>

#include "util/check.h"

namespace wsm::testing {

constexpr std::chrono::seconds kHangLimit{500};  // below CTest's own, which does not say what hung

template <typename Condition>
void wait_until(Condition condition, const char* what) {
  const auto deadline = std::chrono::steady_clock::now() + kHangLimit;
  while (!condition()) {
    check<Error>(std::chrono::steady_clock::now() < deadline, what, " did not happen in ",
                 kHangLimit.count(), " s");
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

}  // namespace wsm::testing
