// The board: what the callers (acquire, release) and the conductor share, under one mutex.
//
// A unit's way:
//
//   absent --place is free--> loading --last copy enqueued, `ready` recorded--> ready
//     ^                          |                                              |
//     +--- evicted: another unit wants the place, and nobody holds this one ----+
//
// and the chain of events that orders it on the device:
//
//   copy stream:     wait(released of those evicted) | copies | record ready
//   compute stream:  wait(ready) | forward | record released
//
// A demand evicts all that nobody holds, but for what an older demand waits for; a prefetch leaves
// what is expected before it, too.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "device/device.h"
#include "engine/counters.h"
#include "engine/sequence.h"
#include "engine/trace.h"
#include "plan/plan.h"
#include "util/check.h"
#include "util/mutex.h"

namespace wsm {

enum class Phase : uint8_t { kAbsent, kLoading, kReady };

// An acquire that was not released yet.
struct Hold {
  StreamHandle stream = 0;
  std::thread::id thread;
};

struct UnitState {
  Phase phase = Phase::kAbsent;
  std::vector<Hold> holds;
  bool used = false;       // acquired since it was loaded
  bool discarded = false;  // nobody uses these bytes again: see Engine::discard
  // One event for each stream that released the unit since it was loaded.
  std::vector<std::pair<StreamHandle, std::unique_ptr<Event>>> released;
  size_t released_count = 0;  // of these, recorded since the load
};

// What went wrong on the conductor's thread, to be thrown on a caller's: the words and their type,
// not the exception itself, which two threads would then own.
struct KeptError {
  std::string message;
  void (*raise)(const std::string& message) = nullptr;

  template <typename E>
  static KeptError of(std::string message) {
    return {std::move(message), [](const std::string& text) { throw E(text); }};
  }
};

// A unit that acquires wait for.
struct Demand {
  uint32_t unit = kNone;
  std::chrono::steady_clock::time_point posted{};
  std::vector<std::thread::id> waiters{};
  std::optional<KeptError> error{};  // for those who wait for it: the time limit is over
};

struct UnitBoard {
  UnitBoard(std::vector<uint64_t> unit_bytes, uint64_t reach_bytes, uint32_t reach_units)
      : sequence(std::move(unit_bytes), reach_bytes, reach_units) {}

  Mutex mutex;
  CondVar changed;  // a unit is ready, or an error was kept

  // The plan's units, then the resident load. Their number is fixed at the start.
  std::vector<UnitState> units GUARDED_BY(mutex);
  // Units that have holds, in order of their first acquire.
  std::vector<uint32_t> held GUARDED_BY(mutex);
  // Units to be dropped as soon as nobody holds them.
  std::vector<uint32_t> discarded GUARDED_BY(mutex);
  Sequence sequence GUARDED_BY(mutex);
  // Moves with every change that the conductor should look at.
  uint64_t version GUARDED_BY(mutex) = 0;
  std::vector<Demand> demands GUARDED_BY(mutex);     // the oldest first
  std::optional<KeptError> error GUARDED_BY(mutex);  // kept for the next acquire
  bool stop GUARDED_BY(mutex) = false;
  uint64_t passes_over GUARDED_BY(mutex) = 0;

  // By unit. Made at the start; recorded by the conductor before it says that the unit is ready.
  std::vector<std::unique_ptr<Event>> ready;
  Counters counters;
  Trace trace;

  // For the conductor, which needs no lock for what it alone changes.
  Phase phase_of(uint32_t unit) const NO_THREAD_SAFETY_ANALYSIS { return units[unit].phase; }

  // How many demands come before this unit's; all, where nobody demands it.
  size_t rank_of(uint32_t unit) const REQUIRES(mutex) {
    const auto found = std::ranges::find(demands, unit, &Demand::unit);
    return static_cast<size_t>(found - demands.begin());
  }

  // Whether anything that is expected is not there yet: what lies farthest ahead is looked at
  // first, as it is the likeliest.
  bool wants_more() const REQUIRES(mutex) {
    const auto& upcoming = sequence.upcoming();
    return !discarded.empty() || !demands.empty() ||
           std::any_of(upcoming.rbegin(), upcoming.rend(), [&](uint32_t u) {
             mutex.assert_held();
             return units[u].phase != Phase::kReady;
           });
  }
};

}  // namespace wsm
