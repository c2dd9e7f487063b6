// Runs chaos for a time: passes over random models, orders, budgets and faults, by all readers, on
// real files. Ends with 1 at the first wrong byte, unexpected error or leak, and aborts on a hang;
// each names the seed, and `wsm_soak 0 SEED` runs that scenario again. `make soak` builds and runs
// it.
//
//   wsm_soak SECONDS [SEED]
//
// A line each ten seconds, and a closing line of JSON.
#include <array>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <string>
#include <thread>

#include "storage/page_cache.h"
#include "support/chaos.h"
#include "support/watchdog.h"
#include "util/align.h"
#include "util/check.h"

namespace wsm::testing {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::seconds kHang{120};
constexpr std::chrono::seconds kEndOfThreads{20};
constexpr double kLineEvery_s = 10;
constexpr double kGroundEvery_s = 60;  // new files now and then
constexpr uint64_t kWarmUp = 200;      // scenarios until allocators hold what they will
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr uint64_t kMayGrow = 512 * kMiB;  // the sanitizers keep what is freed for a while
#else
constexpr uint64_t kMayGrow = 64 * kMiB;
#endif

struct Holdings {
  uint64_t threads = 0;
  uint64_t files = 0;
  uint64_t resident_bytes = 0;
};

uint64_t entries_of(const std::string& folder) {
  const std::filesystem::directory_iterator begin(folder), end;
  return static_cast<uint64_t>(std::distance(begin, end));
}

Holdings holdings() {
  uint64_t pages = 0;
  std::ifstream("/proc/self/statm").ignore(64, ' ') >> pages;
  return {entries_of("/proc/self/task"), entries_of("/proc/self/fd"), pages * page_bytes()};
}

class Soak {
 public:
  Soak(double seconds, uint64_t seed) : seconds_(seconds), first_(seed), seed_(seed) {}

  int run() {
    while (wrong_.empty() && (seconds() < seconds_ || tally_.scenarios == 0)) {
      const Ground ground(shard_bytes_.at(grounds_++ % shard_bytes_.size()));
      const double ground_end = std::min(seconds_, seconds() + kGroundEvery_s);
      do {
        scenario(ground);
      } while (wrong_.empty() && seconds() < ground_end);
    }
    close();
    return wrong_.empty() ? EXIT_SUCCESS : EXIT_FAILURE;
  }

 private:
  void scenario(const Ground& ground) {
    watchdog_.step(concat("seed ", seed_));
    const Terrain terrain{.ground = ground,
                          .real_readers = true,
                          .longest_stall_us = seed_ % 64 ? 1000u : 1'200'000u};
    const Outcome outcome = run_chaos(random_bytes(seed_, 600), terrain);
    tally_.add(outcome.tally);
    wrong_ = outcome.wrong.empty() ? leak(ground) : outcome.wrong;
    if (!wrong_.empty()) wrong_ = concat("seed ", seed_, ": ", wrong_);
    ++seed_;
    if (seconds() < next_line_) return;
    next_line_ += kLineEvery_s;
    line();
  }

  // Nothing may be left of a scenario. The first ones fill caches of the allocators; a ring's
  // threads are ended by the kernel, a little later.
  std::string leak(const Ground& ground) {
    Holdings now = holdings();
    if (tally_.scenarios == 1) before_ = now;
    const auto deadline = Clock::now() + kEndOfThreads;
    while (now.threads + now.files > before_.threads + before_.files && Clock::now() < deadline) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      now = holdings();
    }
    most_resident_ = std::max(most_resident_, now.resident_bytes);
    if (now.threads > before_.threads || now.files > before_.files) {
      return concat(now.threads, " threads and ", now.files, " open files, and there were ",
                    before_.threads, " and ", before_.files);
    }
    if (tally_.scenarios <= kWarmUp) {
      settled_ = std::max(settled_, now.resident_bytes);
      return {};
    }
    uint64_t ground_bytes = 0;
    for (const Ground::Land& land : ground.lands()) ground_bytes += land.bytes.size();
    if (now.resident_bytes < settled_ + ground_bytes + kMayGrow) return {};
    return concat(now.resident_bytes, " bytes are resident, and there were ", settled_);
  }

  double seconds() const { return std::chrono::duration<double>(Clock::now() - begin_).count(); }

  void line() const {
    std::cout << std::fixed << std::setprecision(0) << seconds() << " s: " << tally_.scenarios
              << " scenarios, " << tally_.passes << " passes, " << tally_.uses << " units checked, "
              << tally_.io_errors + tally_.timeouts + tally_.device_errors << " errors, "
              << most_resident_ / kMiB << " MiB at most" << std::endl;
  }

  void close() const {
    line();
    if (!wrong_.empty()) std::cerr << wrong_ << std::endl;
    std::cout << "{\"outcome\": \"" << (wrong_.empty() ? "ok" : "failed")
              << "\", \"seconds\": " << std::setprecision(1) << seconds()
              << ", \"first_seed\": " << first_ << ", \"most_resident_bytes\": " << most_resident_
              << ", \"tally\": ";
    tally_.write_json(std::cout);
    std::cout << "}" << std::endl;
  }

  const Clock::time_point begin_ = Clock::now();
  const double seconds_;
  const uint64_t first_;
  const std::array<uint64_t, 3> shard_bytes_{400 * kKiB + 1, 3 * kMiB, 50'001};
  Watchdog watchdog_{kHang};
  uint64_t seed_;
  uint64_t grounds_ = 0;
  double next_line_ = kLineEvery_s;
  Tally tally_;
  Holdings before_;
  uint64_t settled_ = 0;
  uint64_t most_resident_ = 0;
  std::string wrong_;
};

}  // namespace
}  // namespace wsm::testing

int main(int count, char** arguments) {
  if (count < 2 || count > 3) {
    std::cerr << "usage: wsm_soak SECONDS [SEED]" << std::endl;
    return 2;
  }
  const double seconds = std::stod(arguments[1]);
  const uint64_t seed = count > 2 ? std::stoull(arguments[2]) : std::random_device{}();
  return wsm::testing::Soak(seconds, seed).run();
}
