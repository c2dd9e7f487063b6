// Knows what a scenario may bring and throw: the bytes of its model, and the faults that were put
// in. What must hold and does not is thrown as Wrong.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <string>
#include <thread>

#include "support/async_device.h"
#include "support/scenario.h"
#include "support/streamed_model.h"
#include "support/tally.h"
#include "util/check.h"

namespace wsm::testing {

struct Wrong {
  std::string what;
};

template <typename... Args>
void must(bool condition, const Args&... args) {
  if (!condition) throw Wrong{concat(args...)};
}

inline bool tells(const std::string& text, const std::string& words) {
  return text.find(words) != std::string::npos;
}

class Witness {
 public:
  Witness(const StreamedModel& model, const Ground& ground, const FaultyOptions& faults)
      : model_(model), ground_(ground), faults_(faults), log_(*faults.log) {}

  // All that the unit has on the device is the file's, but for bits that were flipped.
  void check_unit(uint32_t unit);
  // The same by kernels, which check when `stream` comes to them.
  void check_unit_on(AsyncGpu& gpu, uint32_t unit, StreamHandle stream);
  // Once all kernels have run: throws what they found wrong.
  void check_kernels() const;
  // Fetches one of the unit's tensors, `draw` says which, and checks it. False where the engine was
  // closed. Any thread.
  bool fetch(uint32_t unit, uint32_t draw);
  // The error of a fault, thrown once at most for each, that tells where it was.
  void expect_fault(const Error& error);
  // Runs what may throw the error of a fault. False where it did.
  template <typename Function>
  bool guarded(const Function& function) {
    try {
      function();
      return true;
    } catch (const Error& error) {
      expect_fault(error);
      return false;
    }
  }

  bool device_broken() const { return device_broken_; }
  void device_replaced() { device_broken_ = false; }
  const std::string& last_error() const { return last_error_; }
  // Adds what was thrown, and what the log counted.
  void count(Tally& tally) const;

 private:
  void check_tensor(uint32_t unit, const TensorSpec& tensor, const std::byte* found);

  const StreamedModel& model_;
  const Ground& ground_;
  const FaultyOptions& faults_;
  FaultLog& log_;
  uint64_t io_errors_ = 0;
  uint64_t timeouts_ = 0;
  uint64_t device_errors_ = 0;
  bool device_broken_ = false;
  std::string last_error_;
  std::atomic<uint64_t> flips_seen_{0};
  std::string kernels_wrong_;  // the kernels', one at a time
};

// A second thread that looks on: it fetches, and asks for every report.
class Bystander {
 public:
  Bystander(const StreamedModel& model, Witness& witness)
      : thread_([&](const std::stop_token& stop) { look_on(stop, model, witness); }) {}

  // Ends the thread. What was wrong, or empty.
  std::string leave();

 private:
  void look_on(const std::stop_token& stop, const StreamedModel& model, Witness& witness);

  std::string wrong_;  // the thread's, until it has ended
  std::jthread thread_;
};

}  // namespace wsm::testing
