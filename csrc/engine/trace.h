// A trace: what was read, copied, used and waited for, and when; for a picture of it.
//
//   Trace trace;                    off: every call from a hot path is one branch
//   trace.start(device, ...);       makes room for so many records; sets the clock
//     trace.read(...), trace.begin_copies(...), trace.end_copies(...), ...      any thread
//   Timeline all = trace.stop(...); waits until the device has come to the last of its events
//
// Lifecycle: lies on the board. What `start` made keeps the device. It goes by `stop`, `drop` or
// `detach`. Thread-safe; its mutex is the innermost one, and under it lie only calls that make an
// event, record one or ask for one. It orders nothing: events are recorded beside the
// copies and forwards, and nobody waits for them but `stop`.
// Failure: what finds no more room, or no event, is counted, not kept. An error of the device is
// thrown on. When `start` or `stop` throws, the trace is off.
//
// Times are of the host's steady clock, in ns since the start. What happens on a stream is timed by
// a pair of events, which `stop` reads. What ties the device's clock to the
// host's is one event: `start` records it on the caller's stream, and looks until it is done. It
// happened between the last look that did not find it done and the first that did: the middle is
// taken, and `clock_error_ns` is half of that time (some us; of a few tries the closest). From
// there on the two clocks part by as much as they differ: tens of us a second, at the worst.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "device/device.h"
#include "engine/counters.h"
#include "engine/readers.h"
#include "plan/plan.h"
#include "util/mutex.h"

namespace wsm {

enum class TraceKind : uint8_t {
  kRead,        // of a chunk, from issue to completion
  kCopy,        // what was enqueued at once of a unit's copies; device time
  kForward,     // from a unit's acquire to its release; device time
  kHostWait,    // an acquire waited on the host
  kDeviceWait,  // a stream waited for a unit's `ready`; device time
  kPass,        // device time
};

struct TraceRecord {
  TraceKind kind = TraceKind::kRead;
  uint32_t unit = kNone;  // none: of a pass
  int64_t begin_ns = 0;
  int64_t end_ns = 0;
  uint64_t bytes = 0;  // payload that was read, or copied
  // Of a read.
  uint32_t shard = 0;
  uint64_t offset = 0;
  uint64_t read_bytes = 0;  // alignment and gaps included
  ReadRoute route = ReadRoute::kDirect;
  bool cached = false;  // into the host cache, not a slot
  bool failed = false;
  // Of a wait on the host.
  Stall cause = Stall::kDisk;
};

struct Timeline {
  std::vector<TraceRecord> records{};  // by their begin; those that had not ended are left out
  uint64_t dropped = 0;                // found no room
  int64_t full_ns = 0;                 // when the first of these came
  int64_t length_ns = 0;
  int64_t clock_error_ns = 0;
};

class Trace {
 public:
  using Clock = std::chrono::steady_clock;
  using Interrupt = std::function<void()>;  // called now and then while the device is waited for
  struct Recording;

  // Waits for `stream`, which sets the clock. Units are those below `units`. Throws Error where a
  // trace is being taken already.
  void start(std::shared_ptr<Device> device, StreamHandle stream, uint32_t units,
             uint32_t most_records, const Interrupt& interrupt);
  // Throws Error where none is.
  Timeline stop(const Interrupt& interrupt);
  // Ends it, unread.
  void drop() { end(); }
  // The same without locks: for a forked child, where others may hold them for good.
  std::shared_ptr<Recording> detach() noexcept NO_THREAD_SAFETY_ANALYSIS;

  bool on() const { return on_.load(std::memory_order_relaxed); }

  // A read that ends now: all of `record` but its times. To be asked for only while it is on.
  void read(const TraceRecord& record, Clock::time_point issued);
  // Around what is enqueued of a unit's copies in one step of the conductor.
  void begin_copies(uint32_t unit) {
    if (on()) open_copies(unit);
  }
  void end_copies(uint64_t bytes) {
    if (on()) close_copies(bytes);
  }
  // Around the wait of `stream` for `ready`; of one caller at a time.
  void begin_wait(uint32_t unit, const Event& ready, StreamHandle stream) {
    if (on()) open_wait(unit, ready, stream);
  }
  void end_wait(StreamHandle stream) {
    if (on()) close_wait(stream);
  }
  // The first acquire of a unit that nobody holds, and the last release.
  void begin_forward(uint32_t unit, StreamHandle stream) {
    if (on()) open_forward(unit, stream);
  }
  void end_forward(uint32_t unit, StreamHandle stream) {
    if (on()) close_forward(unit, stream);
  }
  void begin_pass(StreamHandle stream) {
    if (on()) open_pass(stream);
  }
  void end_pass(StreamHandle stream) {
    if (on()) close_pass(stream);
  }
  // From `now` on an acquire waits for `unit` on the host (kNone: none does), and for this cause.
  void host_waits(uint32_t unit, Stall cause, Clock::time_point now) {
    if (on()) change_host_wait(unit, cause, now);
  }

 private:
  std::shared_ptr<Recording> end();  // null: it was off
  void open_copies(uint32_t unit);
  void close_copies(uint64_t bytes);
  void open_wait(uint32_t unit, const Event& ready, StreamHandle stream);
  void close_wait(StreamHandle stream);
  void open_forward(uint32_t unit, StreamHandle stream);
  void close_forward(uint32_t unit, StreamHandle stream);
  void open_pass(StreamHandle stream);
  void close_pass(StreamHandle stream);
  void change_host_wait(uint32_t unit, Stall cause, Clock::time_point now);

  std::atomic<bool> on_{false};
  Mutex mutex_;
  std::shared_ptr<Recording> recording_ GUARDED_BY(mutex_);  // null: off
};

}  // namespace wsm
