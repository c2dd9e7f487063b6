// Measures how long a compute stream waits for copies: a pair of timed events around each wait,
// read back when both are done. A fixed number of pairs in turn; when the device lags so far behind
// that the next pair is still in use, that wait goes unmeasured. Used by one caller at a time (the
// engine's pass).
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "device/device.h"
#include "engine/counters.h"

namespace wsm {

class StallProbes {
 public:
  StallProbes(Device& device, Counters& counters, size_t pairs);

  // Makes `stream` wait for `ready`, which was recorded, measured on behalf of `pass`.
  void wait(StreamHandle stream, const Event& ready, uint64_t pass);
  // Adds what is done to the counters.
  void collect();
  // What was collected for one of the last kPassesKept passes.
  uint64_t stall_ns(uint64_t pass) const { return by_pass_[pass % kPassesKept]; }
  // Call before the first wait of a pass.
  void begin_pass(uint64_t pass) { by_pass_[pass % kPassesKept] = 0; }

 private:
  static constexpr size_t kPassesKept = 64;
  struct Pair {
    std::unique_ptr<Event> begin;
    std::unique_ptr<Event> end;
    uint64_t pass = 0;
    bool pending = false;
  };
  bool collect(Pair& pair);

  Device& device_;
  Counters& counters_;
  std::vector<Pair> pairs_;
  size_t next_ = 0;
  std::array<uint64_t, kPassesKept> by_pass_{};
};

}  // namespace wsm
