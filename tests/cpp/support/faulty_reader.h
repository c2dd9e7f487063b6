// A reader over real reads whose storage is faulty in ways that a seed decides: the same seed and
// the same calls give the same faults.
//
// All but the faults is the real thing: requests are cut, advanced and completed by RequestQueue
// and BlockRead. Each `poll` does one step: it may finish some blocks, and hold others back, for so
// many polls or for real time.
//
// Lifecycle: as any Reader; used from one thread. Reads are done inside `poll`, so nothing is under
// way when it is destroyed. No threads. `ready_fd` stays readable while a poll would get on, and
// becomes readable when a stall ends. With nothing but lost requests left it is not readable any
// more. Where the log says calm, no more faults are put in: a poll then ends all that was
// submitted, and lost reads come back after all.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <random>
#include <span>
#include <vector>

#include "storage/reader.h"
#include "storage/request_queue.h"
#include "support/fault_log.h"
#include "support/ready_fd.h"

namespace wsm::testing {

inline constexpr uint64_t kNever = UINT64_MAX;

struct FaultyOptions {
  ReaderOptions reader{};
  double short_chance = 0;      // a read gives fewer bytes than asked, at least one
  double interrupt_chance = 0;  // a read gives EINTR or EAGAIN
  double flip_chance = 0;       // a bit of what a read brought is flipped
  double eio_chance = 0;        // a read gives EIO
  double lost_chance = 0;       // a read does not complete
  double stall_chance = 0;      // a block is read `stall_us` of real time later
  uint32_t stall_us = 0;
  uint64_t eio_from_read = kNever;  // reads from this one on (counted from 0) give EIO
  uint64_t eio_reads = 1;           // so many of them; kNever: for ever
  uint64_t lost_read = kNever;      // this read never completes
  uint32_t max_delay_polls = 0;     // a block is read up to so many polls later
  bool shuffled = false;            // blocks finish in any order, else in that of their requests
  std::shared_ptr<FaultLog> log{};  // shared with whoever checks; null: one of its own

  bool may_lose() const { return lost_chance > 0 || lost_read != kNever; }
};

class FaultyReader final : public Reader {
 public:
  explicit FaultyReader(uint64_t seed, const FaultyOptions& options = {});

  bool submit(const ReadRequest& request) override;
  size_t poll(std::span<ReadCompletion> completions) override;
  int ready_fd() const override { return ready_.fd(); }
  uint32_t capacity() const override { return queue_.capacity(); }
  bool full() override { return queue_.full(); }
  const char* name() const override { return "faulty"; }

  uint64_t seed() const { return seed_; }
  uint64_t reads() const { return reads_; }  // done so far, faulty ones included
  const FaultLog& log() const { return *options_.log; }

 private:
  using Clock = std::chrono::steady_clock;

  struct Flying {
    BlockRead block;
    uint32_t polls_left = 0;
    Clock::time_point not_before{};  // of a block that stalls
  };
  enum class Fate : uint8_t { kHeld, kFinished, kLost };

  bool chance(double probability) { return std::bernoulli_distribution(probability)(random_); }
  uint64_t below(uint64_t bound) { return random_() % bound; }
  bool calm() const { return options_.log->calm; }
  void take_off();
  void step();
  Fate move(Flying& flying);
  // One read of the block, with its faults. False when it is lost.
  bool read(BlockRead& block, int64_t* result);
  int64_t spoil(BlockRead& block, int64_t got);
  void signal();

  const uint64_t seed_;
  FaultyOptions options_;
  std::mt19937_64 random_;
  RequestQueue queue_;
  ReadyFd ready_;
  std::vector<Flying> flying_;
  std::vector<Flying> lost_;
  uint64_t reads_ = 0;
};

// A seed for FaultyReader: $WSM_TEST_SEED when set, else a fresh one. Prints it, so that a failure
// can be run again.
uint64_t test_seed();

}  // namespace wsm::testing
