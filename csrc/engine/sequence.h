// The order of use, learned: which units come next.
//
// Every use teaches two successors: of the unit before it, and of the pair before it. A prediction
// walks the pairs, falls back to the single successor, then to registration order. So a cycle is
// known after one pass, a unit used twice in it too (the pair tells the two uses apart), and a
// changed order costs one miss, never a wrong result. Not thread-safe: the engine guards it.
#pragma once

#include <cstdint>
#include <deque>
#include <unordered_map>
#include <vector>

#include "plan/plan.h"

namespace wsm {

class Sequence {
 public:
  // `bytes[u]`: what a load of unit u brings; units of 0 bytes never stream and are never
  // predicted. The window reaches `reach_bytes` ahead, and at least `reach_units` units.
  Sequence(std::vector<uint64_t> bytes, uint64_t reach_bytes, uint32_t reach_units);

  // Learns that `unit` is used now, and moves the window. True when it was expected first.
  bool use(uint32_t unit);
  // A pass has ended. Where nothing is known of what follows its last unit, its first one is
  // expected.
  void end_pass();

  // What is expected after the unit used last, nearest first. A unit may occur more than once.
  const std::deque<uint32_t>& upcoming() const { return window_; }

 private:
  uint32_t successor(uint32_t before, uint32_t unit) const;
  void learn(uint32_t before, uint32_t unit, uint32_t next);
  void rebuild();
  void extend();

  static uint64_t pair(uint32_t before, uint32_t unit) {
    return (static_cast<uint64_t>(before) << 32) | unit;
  }

  std::vector<uint64_t> bytes_;
  uint64_t reach_bytes_;
  uint32_t reach_units_;
  uint32_t streaming_units_ = 0;
  uint32_t registered_first_ = kNone;  // the first unit that streams, in registration order
  std::vector<uint32_t>
      registered_next_;           // the next unit that streams, in registration order, cyclic
  std::vector<uint32_t> single_;  // kNone: not learned
  std::unordered_map<uint64_t, uint32_t> pairs_;
  uint32_t before_ = kNone;  // the use before the last
  uint32_t last_ = kNone;    // the last use
  uint32_t first_of_pass_ = kNone;
  std::deque<uint32_t> window_;
  uint64_t window_bytes_ = 0;
};

}  // namespace wsm
