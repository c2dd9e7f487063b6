#include "memory/time_copies.h"

#include <algorithm>
#include <memory>

#include "memory/pinned_buffer.h"
#include "util/check.h"

namespace wsm {
namespace {

constexpr uint64_t kMostCopies = 64;
constexpr uint64_t kWarmUps = 2;

}  // namespace

std::vector<double> time_copies(Device& device, std::byte* target, uint64_t target_bytes,
                                uint64_t source_bytes, const std::vector<uint64_t>& sizes) {
  for (const uint64_t size : sizes) {
    check(size > 0 && size <= std::min(target_bytes, source_bytes), "a copy of ", size,
          " bytes cannot be timed with ", source_bytes, " bytes of source and ", target_bytes,
          " of target");
  }
  const PinnedBuffer source(device, source_bytes);
  const std::unique_ptr<Event> begin = device.make_event(true);
  const std::unique_ptr<Event> end = device.make_event(true);
  std::vector<double> seconds;
  for (const uint64_t size : sizes) {
    // Each from another place to another, so that no cache has the bytes.
    const auto copy = [&](uint64_t i) {
      device.copy_to_device(target + i % (target_bytes / size) * size,
                            source.data() + i % (source_bytes / size) * size, size);
    };
    const uint64_t count = std::clamp(source_bytes / size, uint64_t{4}, kMostCopies);
    for (uint64_t i = 0; i < kWarmUps; ++i) copy(i);
    device.record(*begin, device.copy_stream());
    for (uint64_t i = 0; i < count; ++i) copy(kWarmUps + i);
    device.record(*end, device.copy_stream());
    device.drain();
    seconds.push_back(device.elapsed_seconds(*begin, *end) / static_cast<double>(count));
  }
  return seconds;
}

}  // namespace wsm
