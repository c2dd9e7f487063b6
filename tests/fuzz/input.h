// A fuzzer's bytes as numbers. Past the end everything is 0, so that short inputs mean something.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace wsm::fuzzing {

class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), left_(size) {}

  bool empty() const { return left_ == 0; }

  template <typename T>
  T take() {
    T value{};
    const size_t bytes = std::min(sizeof(T), left_);
    if (bytes > 0) std::memcpy(&value, data_, bytes);
    data_ += bytes;
    left_ -= bytes;
    return value;
  }

  uint8_t byte() { return take<uint8_t>(); }
  // [0, n), for n up to 2^16.
  uint32_t below(uint32_t n) { return n <= 256 ? byte() % n : take<uint16_t>() % n; }
  bool once_in(uint32_t n) { return byte() % n == n - 1; }  // not where the bytes have ended

  // A size: small ones, those around powers of two, and those that overflow what they are added to.
  uint64_t size() {
    const uint8_t kind = byte();
    switch (kind % 8) {
      case 0:
        return byte();
      case 1:
        return take<uint16_t>();
      case 2:
        return uint64_t{take<uint16_t>()} * 4096;
      case 3:
        return take<uint32_t>() % (64u << 20);
      case 4:
        return take<uint32_t>();
      case 5:
        return (uint64_t{1} << byte() % 64) + static_cast<int8_t>(byte());
      case 6:
        return UINT64_MAX - byte();
      default:
        return take<uint64_t>();
    }
  }

  // One that a small model may have.
  uint64_t small_size() {
    const uint8_t kind = byte();
    switch (kind % 4) {
      case 0:
        return byte();
      case 1:
        return take<uint16_t>();
      case 2:
        return uint64_t{byte()} * 4096;
      default:
        return take<uint32_t>() % (4u << 20);
    }
  }

 private:
  const uint8_t* data_;
  size_t left_;
};

}  // namespace wsm::fuzzing
