#include "support/faulty_reader.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <iostream>
#include <string>
#include <utility>

#include "storage/block_read.h"

namespace wsm::testing {

FaultyReader::FaultyReader(uint64_t seed, const FaultyOptions& options)
    : seed_(seed), options_(options), random_(seed), queue_(options.reader) {
  if (!options_.log) options_.log = std::make_shared<FaultLog>();
}

bool FaultyReader::submit(const ReadRequest& request) {
  if (!queue_.add(request)) return false;
  ready_.raise();
  return true;
}

size_t FaultyReader::poll(std::span<ReadCompletion> completions) {
  ready_.clear();
  if (calm()) {
    std::ranges::move(lost_, std::back_inserter(flying_));
    lost_.clear();
  }
  do {
    take_off();
    step();
  } while (calm() && (!flying_.empty() || queue_.any_waiting()));
  const size_t count = queue_.pop_done(completions);
  signal();
  return count;
}

void FaultyReader::step() {
  if (options_.shuffled) std::shuffle(flying_.begin(), flying_.end(), random_);
  std::vector<Flying> held;
  for (Flying& flying : flying_) {
    const Fate fate = move(flying);
    if (fate == Fate::kHeld) held.push_back(std::move(flying));
    if (fate == Fate::kLost) lost_.push_back(std::move(flying));
  }
  flying_ = std::move(held);
}

void FaultyReader::take_off() {
  Flying flying;
  while (flying_.size() < options_.reader.depth && queue_.next(&flying.block)) {
    flying.block.start();
    flying.polls_left = static_cast<uint32_t>(below(options_.max_delay_polls + 1ull));
    flying.not_before = {};
    if (!calm() && chance(options_.stall_chance)) {
      ++options_.log->stalls;
      flying.not_before = Clock::now() + std::chrono::microseconds(options_.stall_us);
    }
    flying_.push_back(flying);
  }
}

FaultyReader::Fate FaultyReader::move(Flying& flying) {
  if (!calm()) {
    if (flying.not_before > Clock::now()) return Fate::kHeld;
    if (flying.polls_left > 0) {
      --flying.polls_left;
      return Fate::kHeld;
    }
  }
  int64_t result = 0;
  if (!read(flying.block, &result)) return Fate::kLost;
  if (!flying.block.advance(result)) return Fate::kHeld;
  queue_.finish(flying.block);
  return Fate::kFinished;
}

bool FaultyReader::read(BlockRead& block, int64_t* result) {
  const uint64_t number = reads_++;
  if (calm()) {
    *result = read_now(block);
    return true;
  }
  FaultLog& log = *options_.log;
  if (number == options_.lost_read || chance(options_.lost_chance)) {
    ++log.lost;
    return false;
  }
  if ((number >= options_.eio_from_read && number - options_.eio_from_read < options_.eio_reads) ||
      chance(options_.eio_chance)) {
    ++log.errors;
    *result = -EIO;
  } else if (chance(options_.interrupt_chance)) {
    ++log.interrupts;
    *result = chance(0.5) ? -EINTR : -EAGAIN;
  } else {
    *result = spoil(block, read_now(block));
  }
  return true;
}

// What the block's next read does not keep is read again, so only what it keeps is flipped.
int64_t FaultyReader::spoil(BlockRead& block, int64_t got) {
  if (got <= 0) return got;
  FaultLog& log = *options_.log;
  if (got > 1 && chance(options_.short_chance)) {
    ++log.shorts;
    got = 1 + static_cast<int64_t>(below(static_cast<uint64_t>(got - 1)));
  }
  if (chance(options_.flip_chance)) {
    const uint64_t at = below(static_cast<uint64_t>(got));
    const std::byte mask = std::byte{1} << below(8);
    block.target()[at] ^= mask;
    log.add_flip({block.shard().path(), block.offset() + at, mask});
  }
  return got;
}

// Readable now, or when the first stall ends.
void FaultyReader::signal() {
  const auto stalled = [](const Flying& f) { return f.not_before > Clock::now(); };
  const bool room = flying_.size() < options_.reader.depth;
  if (queue_.any_done() || (room && queue_.any_waiting()) ||
      !std::ranges::all_of(flying_, stalled)) {
    ready_.raise();
    return;
  }
  const auto next = std::ranges::min_element(flying_, {}, &Flying::not_before);
  if (next != flying_.end()) ready_.raise_after(next->not_before - Clock::now());
}

uint64_t test_seed() {
  const char* given = std::getenv("WSM_TEST_SEED");
  const uint64_t seed = given != nullptr ? std::stoull(given) : std::random_device{}();
  std::cout << "WSM_TEST_SEED=" << seed << "\n";
  return seed;
}

}  // namespace wsm::testing
