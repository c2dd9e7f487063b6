#include "engine/sequence.h"

#include <utility>

namespace wsm {

Sequence::Sequence(std::vector<uint64_t> bytes, uint64_t reach_bytes, uint32_t reach_units)
    : bytes_(std::move(bytes)),
      reach_bytes_(reach_bytes),
      reach_units_(reach_units),
      registered_next_(bytes_.size(), kNone),
      single_(bytes_.size(), kNone) {
  uint32_t next = kNone;
  // Twice around from the back: the second time, the last units know the first.
  for (int round = 0; round < 2; ++round) {
    for (size_t u = bytes_.size(); u-- > 0;) {
      registered_next_[u] = next;
      if (bytes_[u] == 0) continue;
      next = static_cast<uint32_t>(u);
      if (round == 0) ++streaming_units_;
    }
  }
  registered_first_ = next;
  rebuild();
}

bool Sequence::use(uint32_t unit) {
  if (last_ != kNone) learn(before_, last_, unit);
  if (first_of_pass_ == kNone) first_of_pass_ = unit;
  before_ = last_;
  last_ = unit;
  const bool expected = !window_.empty() && window_.front() == unit;
  if (expected) {
    window_bytes_ -= bytes_[unit];
    window_.pop_front();
    extend();
  } else {
    rebuild();
  }
  return expected;
}

void Sequence::end_pass() {
  if (last_ != kNone && first_of_pass_ != kNone && single_[last_] == kNone) {
    learn(before_, last_, first_of_pass_);
    rebuild();
  }
  first_of_pass_ = kNone;
}

uint32_t Sequence::successor(uint32_t before, uint32_t unit) const {
  if (unit == kNone) return registered_first_;
  if (const auto known = pairs_.find(pair(before, unit)); known != pairs_.end())
    return known->second;
  return single_[unit] != kNone ? single_[unit] : registered_next_[unit];
}

void Sequence::learn(uint32_t before, uint32_t unit, uint32_t next) {
  single_[unit] = next;
  if (before != kNone) pairs_[pair(before, unit)] = next;
}

void Sequence::rebuild() {
  window_.clear();
  window_bytes_ = 0;
  extend();
}

void Sequence::extend() {
  while (window_.size() < streaming_units_ &&
         (window_.size() < reach_units_ || window_bytes_ < reach_bytes_)) {
    const size_t n = window_.size();
    const uint32_t unit = n > 0 ? window_[n - 1] : last_;
    const uint32_t before = n > 1 ? window_[n - 2] : (n == 1 ? last_ : before_);
    const uint32_t next = successor(before, unit);
    if (next == kNone) return;
    window_.push_back(next);
    window_bytes_ += bytes_[next];
  }
}

}  // namespace wsm
