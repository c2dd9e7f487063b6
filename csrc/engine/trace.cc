#include "engine/trace.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <thread>
#include <utility>

#include "util/check.h"

namespace wsm {

namespace {

using Clock = Trace::Clock;

constexpr int kClockTries = 10;
constexpr int64_t kCloseEnoughNs = 20'000;
constexpr auto kShortWait = std::chrono::microseconds(100);
constexpr double kNearSeconds = 1;

int64_t ns_between(Clock::time_point begin, Clock::time_point end) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(end - begin).count();
}

void wait_for(Device& device, const Event& event, const Trace::Interrupt& interrupt) {
  while (!device.done(event)) {
    std::this_thread::sleep_for(kShortWait);
    if (interrupt) interrupt();
  }
}

}  // namespace

// `start` and `stop` have one to themselves. All else reaches it by `recording_`, under the mutex.
struct Trace::Recording {
  struct Entry {
    TraceRecord record;
    uint32_t begin_event = kNone;  // none: timed by the host
    uint32_t end_event = kNone;
    bool ended = false;
  };

  Recording(std::shared_ptr<Device> on, uint32_t units, uint32_t most_records)
      : owned(std::move(on)), device(*owned), forwards(units, kNone) {
    entries.reserve(most_records);
    events.reserve(2 * static_cast<size_t>(most_records) + 1);
    new_event();
  }

  // A microsecond or so each. A million at once would take a second, and half a GiB of RAM.
  uint32_t new_event() {
    events.push_back(device.make_event(true));
    return static_cast<uint32_t>(events.size() - 1);
  }
  uint32_t drop() {
    if (dropped++ == 0) full_ns = since_origin(Clock::now());
    return kNone;
  }

  void set_clock(StreamHandle stream, const Interrupt& interrupt);
  uint32_t add(const TraceRecord& record);
  uint32_t open(TraceKind kind, uint32_t unit, StreamHandle stream);
  void close(uint32_t& index, StreamHandle stream, uint64_t bytes = 0);
  void wait_on_host(uint32_t unit, Stall cause, int64_t now_ns);
  int64_t time_of(uint32_t event);
  int64_t since_origin(Clock::time_point time) const {
    return std::max<int64_t>(0, ns_between(origin, time));
  }
  Timeline timeline(const Interrupt& interrupt);

  const std::shared_ptr<Device> owned;  // before the events: another engine may have it by now
  Device& device;
  std::vector<Entry> entries;                  // never grows beyond what was reserved
  std::vector<std::unique_ptr<Event>> events;  // the first sets the clock
  Clock::time_point origin;
  int64_t clock_error_ns = 0;
  int64_t length_ns = 0;
  uint64_t dropped = 0;
  int64_t full_ns = 0;

  // Entries that have begun: kNone where there is none, or it found no room.
  std::vector<uint32_t> forwards;  // by unit
  uint32_t copies = kNone;
  uint32_t wait = kNone;
  uint32_t pass = kNone;
  uint32_t host_wait = kNone;

  // What the host waits for, with an entry or without.
  uint32_t waited_unit = kNone;
  Stall waited_cause = Stall::kDisk;

  // An event whose time is known, near those that are read next.
  uint32_t anchor = 0;
  int64_t anchor_ns = 0;
};

// A stream that is still at work is waited for by the first try; then it is idle, and looks are
// close. The closest try is kept, and the event of that very try.
void Trace::Recording::set_clock(StreamHandle stream, const Interrupt& interrupt) {
  std::unique_ptr<Event> event = device.make_event(true);
  int64_t least_ns = std::numeric_limits<int64_t>::max();
  for (int i = 0; i < kClockTries && least_ns > kCloseEnoughNs; ++i) {
    const Clock::time_point begin = Clock::now();
    Clock::time_point before = begin;
    device.record(*event, stream);
    for (Clock::time_point look = Clock::now(); !device.done(*event); look = Clock::now()) {
      before = look;
      if (before - begin > kShortWait) wait_for(device, *event, interrupt);
    }
    const int64_t window_ns = ns_between(before, Clock::now());
    if (window_ns >= least_ns) continue;
    least_ns = window_ns;
    origin = before + std::chrono::nanoseconds(window_ns / 2);
    clock_error_ns = window_ns / 2;
    std::swap(events[0], event);
  }
}

uint32_t Trace::Recording::add(const TraceRecord& record) {
  if (entries.size() == entries.capacity()) return drop();
  entries.push_back({.record = record});
  return static_cast<uint32_t>(entries.size() - 1);
}

uint32_t Trace::Recording::open(TraceKind kind, uint32_t unit, StreamHandle stream) {
  const uint32_t index = add({.kind = kind, .unit = unit});
  if (index == kNone) return kNone;
  try {
    entries[index].begin_event = new_event();
    entries[index].end_event = new_event();
  } catch (const Error&) {  // no memory for one: what is traced goes on
    entries.pop_back();
    return drop();
  }
  device.record(*events[entries[index].begin_event], stream);
  return index;
}

void Trace::Recording::close(uint32_t& index, StreamHandle stream, uint64_t bytes) {
  if (index == kNone) return;  // begun before the trace was, or when it was full
  Entry& entry = entries[std::exchange(index, kNone)];
  device.record(*events[entry.end_event], stream);
  entry.record.bytes = bytes;
  entry.ended = true;
}

void Trace::Recording::wait_on_host(uint32_t unit, Stall cause, int64_t now_ns) {
  if (unit == waited_unit && (unit == kNone || cause == waited_cause)) return;
  waited_unit = unit;
  waited_cause = cause;
  if (host_wait != kNone) {
    Entry& entry = entries[std::exchange(host_wait, kNone)];
    entry.record.end_ns = now_ns;
    entry.ended = true;
  }
  if (unit == kNone) return;
  host_wait = add({.kind = TraceKind::kHostWait, .unit = unit, .begin_ns = now_ns, .cause = cause});
}

// A device tells milliseconds as a float of 24 bits. Measured from an event that is near, what lies
// near to each other keeps its order however long the trace is.
int64_t Trace::Recording::time_of(uint32_t event) {
  const double seconds = device.elapsed_seconds(*events[anchor], *events[event]);
  const int64_t ns = anchor_ns + std::llround(seconds * 1e9);
  if (std::abs(seconds) > kNearSeconds) {
    anchor = event;
    anchor_ns = ns;
  }
  return ns;
}

Timeline Trace::Recording::timeline(const Interrupt& interrupt) {
  Timeline all{.dropped = dropped,
               .full_ns = full_ns,
               .length_ns = length_ns,
               .clock_error_ns = clock_error_ns};
  std::erase_if(entries, [](const Entry& entry) { return !entry.ended; });
  all.records.reserve(entries.size());
  for (Entry& entry : entries) {
    TraceRecord& record = entry.record;
    if (entry.begin_event != kNone) {
      // Both: a unit may be acquired on one stream, and released on another.
      wait_for(device, *events[entry.begin_event], interrupt);
      wait_for(device, *events[entry.end_event], interrupt);
      record.begin_ns = std::max<int64_t>(0, time_of(entry.begin_event));
      record.end_ns = std::max(record.begin_ns, time_of(entry.end_event));
    }
    // What the device did later than it was told to is part of the trace.
    all.length_ns = std::max(all.length_ns, record.end_ns);
    all.records.push_back(record);
  }
  std::ranges::stable_sort(all.records, {}, &TraceRecord::begin_ns);
  return all;
}

void Trace::start(std::shared_ptr<Device> device, StreamHandle stream, uint32_t units,
                  uint32_t most_records, const Interrupt& interrupt) {
  const auto check_off = [this] {
    mutex_.assert_held();
    check<Error>(recording_ == nullptr, "a trace is being taken already: stop it first");
  };
  {
    const MutexLock lock(mutex_);
    check_off();
  }
  auto recording = std::make_shared<Recording>(std::move(device), units, most_records);
  recording->set_clock(stream, interrupt);
  const MutexLock lock(mutex_);
  check_off();
  recording_ = std::move(recording);
  on_ = true;
}

Timeline Trace::stop(const Interrupt& interrupt) {
  const std::shared_ptr<Recording> recording = end();
  check<Error>(recording != nullptr, "no trace is being taken");
  recording->length_ns = recording->since_origin(Clock::now());
  recording->wait_on_host(kNone, {}, recording->length_ns);
  return recording->timeline(interrupt);
}

std::shared_ptr<Trace::Recording> Trace::end() {
  const MutexLock lock(mutex_);
  on_ = false;
  return std::move(recording_);
}

std::shared_ptr<Trace::Recording> Trace::detach() noexcept {
  on_ = false;
  return std::move(recording_);
}

void Trace::read(const TraceRecord& record, Clock::time_point issued) {
  const Clock::time_point now = Clock::now();
  const MutexLock lock(mutex_);
  if (!recording_) return;
  const uint32_t index = recording_->add(record);
  if (index == kNone) return;
  Recording::Entry& entry = recording_->entries[index];
  entry.record.kind = TraceKind::kRead;
  entry.record.begin_ns = recording_->since_origin(issued);
  entry.record.end_ns = recording_->since_origin(now);
  entry.ended = true;
}

void Trace::open_copies(uint32_t unit) {
  const MutexLock lock(mutex_);
  if (!recording_) return;
  recording_->copies = recording_->open(TraceKind::kCopy, unit, recording_->device.copy_stream());
}

void Trace::close_copies(uint64_t bytes) {
  const MutexLock lock(mutex_);
  if (!recording_) return;
  recording_->close(recording_->copies, recording_->device.copy_stream(), bytes);
}

// What is there already is not waited for.
void Trace::open_wait(uint32_t unit, const Event& ready, StreamHandle stream) {
  const MutexLock lock(mutex_);
  if (!recording_) return;
  recording_->wait = kNone;
  if (recording_->device.done(ready)) return;
  recording_->wait = recording_->open(TraceKind::kDeviceWait, unit, stream);
}

void Trace::close_wait(StreamHandle stream) {
  const MutexLock lock(mutex_);
  if (recording_) recording_->close(recording_->wait, stream);
}

// A forward that never ended, of a pass that was aborted, is forgotten here.
void Trace::open_forward(uint32_t unit, StreamHandle stream) {
  const MutexLock lock(mutex_);
  if (!recording_) return;
  recording_->forwards[unit] = recording_->open(TraceKind::kForward, unit, stream);
}

void Trace::close_forward(uint32_t unit, StreamHandle stream) {
  const MutexLock lock(mutex_);
  if (recording_) recording_->close(recording_->forwards[unit], stream);
}

void Trace::open_pass(StreamHandle stream) {
  const MutexLock lock(mutex_);
  if (recording_) recording_->pass = recording_->open(TraceKind::kPass, kNone, stream);
}

void Trace::close_pass(StreamHandle stream) {
  const MutexLock lock(mutex_);
  if (recording_) recording_->close(recording_->pass, stream);
}

void Trace::change_host_wait(uint32_t unit, Stall cause, Clock::time_point now) {
  const MutexLock lock(mutex_);
  if (recording_) recording_->wait_on_host(unit, cause, recording_->since_origin(now));
}

}  // namespace wsm
