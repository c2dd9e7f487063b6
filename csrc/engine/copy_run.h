// Copies that touch, in host memory and on the device, become one: the fewer, the closer a link
// comes to its limit (an H100: 54.8 GB/s by 16 MiB, 55.2 by 64 MiB). Not longer than kLongest, so
// that what is urgent waits for little. Chunks of the host cache lie side by side as in their file;
// slots of the staging ring do not.
// Lifecycle: the conductor's; what was added is enqueued by `flush` at the latest, which comes
// before any event that stands for it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device/device.h"

namespace wsm {

class CopyRun {
 public:
  static constexpr uint64_t kLongest = 64ull << 20;

  explicit CopyRun(Device& device) : device_(device) {}

  void add(std::byte* target, const std::byte* source, uint64_t bytes) {
    const bool touches = bytes_ > 0 && target == target_ + bytes_ && source == source_ + bytes_;
    if (!touches || bytes_ + bytes > kLongest) {
      flush();
      target_ = target;
      source_ = source;
    }
    bytes_ += bytes;
  }

  void flush() {
    if (bytes_ > 0) device_.copy_to_device(target_, source_, bytes_);
    bytes_ = 0;
  }

 private:
  Device& device_;
  std::byte* target_ = nullptr;
  const std::byte* source_ = nullptr;
  uint64_t bytes_ = 0;  // 0: nothing waits
};

}  // namespace wsm
