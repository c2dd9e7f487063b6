// What faulty storage did, for whoever checks the outcome: how many faults of each kind, and where
// each flipped bit lies. Thread-safe; shared by the readers of one model and its checker.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace wsm::testing {

struct FaultLog {
  std::atomic<uint64_t> shorts{0};
  std::atomic<uint64_t> interrupts{0};
  std::atomic<uint64_t> stalls{0};
  std::atomic<uint64_t> errors{0};  // EIO
  std::atomic<uint64_t> lost{0};
  std::atomic<uint64_t> flips{0};
  // From now on nothing fails, and lost reads come back.
  std::atomic<bool> calm{false};

  uint64_t total() const { return shorts + interrupts + stalls + errors + lost + flips; }

  struct Flip {
    std::string path;
    uint64_t offset = 0;
    std::byte mask{};
    bool operator==(const Flip&) const = default;
  };

  void add_flip(Flip flip) {
    const std::lock_guard lock(mutex_);
    ++flips;
    flipped_.push_back(std::move(flip));
  }

  std::vector<Flip> all_flips() const {
    const std::lock_guard lock(mutex_);
    return flipped_;
  }

  // Whether a byte that differs from the file's by `mask` is one that was flipped so. A byte comes
  // by one read, and a read flips one bit.
  bool flipped(const std::string& path, uint64_t offset, std::byte mask) const {
    const std::lock_guard lock(mutex_);
    return std::ranges::count(flipped_, Flip{path, offset, mask}) > 0;
  }

 private:
  mutable std::mutex mutex_;
  std::vector<Flip> flipped_;
};

}  // namespace wsm::testing
