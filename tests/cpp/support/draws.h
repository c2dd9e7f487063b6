// Decisions drawn from bytes, which a seed or a fuzzer gives. Where the bytes are used up, every
// draw is 0: so 0 must be the plain choice everywhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <random>
#include <span>
#include <vector>

namespace wsm::testing {

class Draws {
 public:
  explicit Draws(std::span<const uint8_t> bytes) : bytes_(bytes) {}

  bool empty() const { return at_ == bytes_.size(); }
  uint64_t below(uint64_t bound) {
    uint64_t value = 0;
    for (uint64_t reach = bound; reach > 1; reach = reach / 256 + (reach % 256 > 0)) {
      value = value << 8 | next();
    }
    return bound > 1 ? value % bound : 0;
  }
  uint64_t between(uint64_t least, uint64_t most) { return least + below(most - least + 1); }
  bool one_in(uint64_t count) { return below(count) == count - 1; }
  template <typename T>
  T one_of(std::initializer_list<T> choices) {
    return std::data(choices)[below(choices.size())];
  }

 private:
  uint8_t next() { return empty() ? uint8_t{0} : bytes_[at_++]; }

  std::span<const uint8_t> bytes_;
  size_t at_ = 0;
};

inline std::vector<uint8_t> random_bytes(uint64_t seed, size_t count) {
  std::mt19937_64 random(seed);
  std::vector<uint8_t> bytes(count);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
  return bytes;
}

}  // namespace wsm::testing
