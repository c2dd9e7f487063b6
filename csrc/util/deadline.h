// Time limits that a user gave in seconds, as the clock can count them.
#pragma once

#include <algorithm>
#include <chrono>

namespace wsm {

// However large the limit is: the clock's ns would overflow at 292 years.
inline std::chrono::steady_clock::time_point deadline_after(double seconds) {
  using Clock = std::chrono::steady_clock;
  constexpr double kLongest_s = 1e9;
  const std::chrono::duration<double> limit(std::min(seconds, kLongest_s));
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(limit);
}

}  // namespace wsm
