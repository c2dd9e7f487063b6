// What was moved and waited for. Counted by the conductor and the callers alike.
#pragma once

#include <atomic>
#include <cstdint>

namespace wsm {

enum class Stall : uint8_t { kDisk, kH2d, kArena };
inline constexpr int kStallCauses = 3;

// A plain copy of the counters at one moment, or the difference of two.
struct Counts {
  uint64_t disk_bytes = 0;       // payload read from files
  uint64_t disk_read_bytes = 0;  // read from files, alignment included
  uint64_t h2d_bytes = 0;        // copied to the device
  uint64_t loads = 0;            // units loaded
  uint64_t demand_loads = 0;     // of these, begun by an acquire before any prefetch had
  uint64_t misses = 0;           // acquires of another unit than the one expected next
  uint64_t stall_ns[kStallCauses] = {};

  Counts since(const Counts& start) const {
    Counts d = *this;
    d.disk_bytes -= start.disk_bytes;
    d.disk_read_bytes -= start.disk_read_bytes;
    d.h2d_bytes -= start.h2d_bytes;
    d.loads -= start.loads;
    d.demand_loads -= start.demand_loads;
    d.misses -= start.misses;
    for (int i = 0; i < kStallCauses; ++i) d.stall_ns[i] -= start.stall_ns[i];
    return d;
  }

  void add(const Counts& more) {
    disk_bytes += more.disk_bytes;
    disk_read_bytes += more.disk_read_bytes;
    h2d_bytes += more.h2d_bytes;
    loads += more.loads;
    demand_loads += more.demand_loads;
    misses += more.misses;
    for (int i = 0; i < kStallCauses; ++i) stall_ns[i] += more.stall_ns[i];
  }
};

struct Counters {
  std::atomic<uint64_t> disk_bytes{0};
  std::atomic<uint64_t> disk_read_bytes{0};
  std::atomic<uint64_t> h2d_bytes{0};
  std::atomic<uint64_t> loads{0};
  std::atomic<uint64_t> demand_loads{0};
  std::atomic<uint64_t> misses{0};
  std::atomic<uint64_t> stall_ns[kStallCauses] = {};

  Counts read() const {
    Counts c;
    c.disk_bytes = disk_bytes;
    c.disk_read_bytes = disk_read_bytes;
    c.h2d_bytes = h2d_bytes;
    c.loads = loads;
    c.demand_loads = demand_loads;
    c.misses = misses;
    for (int i = 0; i < kStallCauses; ++i) c.stall_ns[i] = stall_ns[i];
    return c;
  }
};

}  // namespace wsm
