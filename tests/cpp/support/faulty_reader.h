// A reader over real reads whose storage is faulty in ways that a seed decides: the same seed and
// the same calls give the same faults.
//
// All but the faults is the real thing: requests are cut, advanced and completed by RequestQueue
// and BlockRead. Each `poll` does one step: it may finish some blocks, and hold others back.
//
// Lifecycle: as any Reader; used from one thread. Reads are done inside `poll`, so nothing is under
// way when it is destroyed. No clocks, no threads: a delay is counted in polls, and `ready_fd`
// stays readable while a poll would get on. With nothing but lost requests left it is not readable
// any more.
#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <span>
#include <vector>

#include "storage/reader.h"
#include "storage/request_queue.h"
#include "util/event_fd.h"

namespace wsm::testing {

inline constexpr uint64_t kNever = UINT64_MAX;

struct FaultyOptions {
  ReaderOptions reader{};
  double short_chance = 0;          // a read gives fewer bytes than asked, at least one
  double interrupt_chance = 0;      // a read gives EINTR or EAGAIN
  double flip_chance = 0;           // a bit of what a read brought is flipped
  uint64_t eio_from_read = kNever;  // reads from this one on (counted from 0) give EIO
  uint64_t eio_reads = 1;           // so many of them; kNever: for ever
  uint64_t lost_read = kNever;      // this read never completes
  uint32_t max_delay_polls = 0;     // a block is read up to so many polls later
  bool shuffled = false;            // blocks finish in any order, else in that of their requests
};

class FaultyReader final : public Reader {
 public:
  explicit FaultyReader(uint64_t seed, const FaultyOptions& options = {});

  bool submit(const ReadRequest& request) override;
  size_t poll(std::span<ReadCompletion> completions) override;
  int ready_fd() const override { return ready_.fd(); }
  uint32_t capacity() const override { return queue_.capacity(); }
  const char* name() const override { return "faulty"; }

  uint64_t seed() const { return seed_; }
  uint64_t reads() const { return reads_; }    // done so far, faulty ones included
  uint64_t faults() const { return faults_; }  // put in so far, delays and order not counted

 private:
  struct Flying {
    BlockRead block;
    uint32_t polls_left = 0;
  };

  bool chance(double probability) { return std::bernoulli_distribution(probability)(random_); }
  uint64_t below(uint64_t bound) { return random_() % bound; }
  void take_off();
  // One read of the block, with its faults. False when it is lost.
  bool read(BlockRead& block, int64_t* result);
  int64_t spoil(BlockRead& block, int64_t got);

  const uint64_t seed_;
  const FaultyOptions options_;
  std::mt19937_64 random_;
  RequestQueue queue_;
  EventFd ready_;
  std::vector<Flying> flying_;
  uint64_t reads_ = 0;
  uint64_t faults_ = 0;
};

// A seed for FaultyReader: $WSM_TEST_SEED when set, else a fresh one. Prints it, so that a failure
// can be run again.
uint64_t test_seed();

}  // namespace wsm::testing
