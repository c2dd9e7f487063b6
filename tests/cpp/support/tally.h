// What scenarios did and met, counted.
#pragma once

#include <cstdint>
#include <ostream>

namespace wsm::testing {

struct Tally {
  uint64_t scenarios = 0;
  uint64_t refused = 0;  // budgets too small, said so
  uint64_t passes = 0;
  uint64_t uses = 0;  // units acquired and checked
  uint64_t fetches = 0;
  uint64_t resizes = 0;
  uint64_t read_ahead = 0;  // engines that found some of their shards read
  uint64_t aborted_passes = 0;
  uint64_t refused_nestings = 0;
  uint64_t interrupted_waits = 0;
  uint64_t io_errors = 0;  // thrown
  uint64_t timeouts = 0;
  uint64_t device_errors = 0;
  uint64_t short_reads = 0;  // put in
  uint64_t interrupted_reads = 0;
  uint64_t stalled_reads = 0;
  uint64_t failed_reads = 0;
  uint64_t lost_reads = 0;
  uint64_t flipped_bits = 0;
  uint64_t flipped_bytes_seen = 0;  // wrong bytes found by the check, each one where it was flipped

  void add(const Tally& more);
  // {"scenarios": 12, ...}
  void write_json(std::ostream& out) const;
};

}  // namespace wsm::testing
