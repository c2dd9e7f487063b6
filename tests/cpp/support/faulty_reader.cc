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
    : seed_(seed), options_(options), random_(seed), queue_(options.reader) {}

bool FaultyReader::submit(const ReadRequest& request) {
  if (!queue_.add(request)) return false;
  ready_.raise();
  return true;
}

size_t FaultyReader::poll(std::span<ReadCompletion> completions) {
  ready_.clear();
  take_off();
  if (options_.shuffled) std::shuffle(flying_.begin(), flying_.end(), random_);
  std::vector<Flying> held;
  for (Flying& flying : flying_) {
    int64_t result = 0;
    if (flying.polls_left > 0) {
      --flying.polls_left;
      held.push_back(std::move(flying));
    } else if (!read(flying.block, &result)) {
      continue;  // lost: its request never completes
    } else if (flying.block.advance(result)) {
      queue_.finish(flying.block);
    } else {
      held.push_back(std::move(flying));
    }
  }
  flying_ = std::move(held);
  const size_t count = queue_.take(completions);
  if (!flying_.empty() || queue_.any_waiting() || queue_.any_done()) ready_.raise();
  return count;
}

void FaultyReader::take_off() {
  Flying flying;
  while (flying_.size() < options_.reader.depth && queue_.next(&flying.block)) {
    flying.block.start();
    flying.polls_left = static_cast<uint32_t>(below(options_.max_delay_polls + 1ull));
    flying_.push_back(flying);
  }
}

bool FaultyReader::read(BlockRead& block, int64_t* result) {
  const uint64_t number = reads_++;
  const bool eio =
      number >= options_.eio_from_read && number - options_.eio_from_read < options_.eio_reads;
  const bool interrupted = chance(options_.interrupt_chance);
  if (number == options_.lost_read || eio || interrupted) {
    ++faults_;
    *result = eio ? -EIO : chance(0.5) ? -EINTR : -EAGAIN;
    return number != options_.lost_read;
  }
  *result = spoil(block, read_now(block));
  return true;
}

int64_t FaultyReader::spoil(BlockRead& block, int64_t got) {
  if (got <= 0) return got;
  if (chance(options_.flip_chance)) {
    ++faults_;
    block.target()[below(static_cast<uint64_t>(got))] ^= std::byte{1} << below(8);
  }
  if (got == 1 || !chance(options_.short_chance)) return got;
  ++faults_;
  return 1 + static_cast<int64_t>(below(static_cast<uint64_t>(got - 1)));
}

uint64_t test_seed() {
  const char* given = std::getenv("WSM_TEST_SEED");
  const uint64_t seed = given != nullptr ? std::stoull(given) : std::random_device{}();
  std::cout << "WSM_TEST_SEED=" << seed << "\n";
  return seed;
}

}  // namespace wsm::testing
