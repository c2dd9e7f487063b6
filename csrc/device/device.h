// A device: what bytes are copied to, with streams and events that order the copies.
//
// Lifecycle: made at start, outlives every event; `drain` before anything that it copies from or
// to is freed. Thread-safe. Every call leaves the caller's current device as it was.
// Failure: calls throw Error with the runtime's words and clear the pending error; destructors
// never throw.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace wsm {

// A stream as an integer. cuda: a cudaStream_t, 0 being the legacy default stream. host: 0 is the
// calling thread, whose work is done when it returns; 1 is the copy stream; there are no others.
using StreamHandle = uintptr_t;

// Recorded on a stream, waited for by another. Made by Device::make_event, owned by the caller,
// freed before the device.
class Event {
 public:
  virtual ~Event() = default;
};

class Device {
 public:
  virtual ~Device() = default;

  virtual const char* kind() const = 0;  // "cuda" or "host"
  virtual int index() const = 0;

  // Page-locks [data, +bytes). False where it is refused: the memory stays usable, pageable, and
  // `why` says what the runtime answered.
  virtual bool register_host(void* data, size_t bytes, std::string* why) = 0;
  virtual void unregister_host(void* data) noexcept = 0;

  // Enqueues on the device's own copy stream; returns at once.
  virtual void copy_to_device(void* target, const void* source, size_t bytes) = 0;
  // On the copy stream too (tests poison places with it).
  virtual void fill(void* target, uint8_t value, size_t bytes) = 0;
  virtual StreamHandle copy_stream() const = 0;

  // An event that was never recorded is done. `timed` events answer `elapsed_seconds`. `wait` and
  // `done` mean the latest record at the call: recording again moves no wait that came before.
  virtual std::unique_ptr<Event> make_event(bool timed = false) = 0;
  virtual void record(Event& event, StreamHandle stream) = 0;
  virtual void wait(StreamHandle stream, const Event& event) = 0;  // host, stream 0: blocks
  virtual bool done(const Event& event) = 0;
  // Between two recorded, done, timed events.
  virtual double elapsed_seconds(const Event& begin, const Event& end) = 0;

  virtual void drain() = 0;  // blocks until the copy stream is empty
};

std::unique_ptr<Device> make_host_device();
// Throws Error where the build has no CUDA, no driver answers, or the driver is too old (and says
// which); InvalidArgument where there is no device of that index.
std::unique_ptr<Device> make_cuda_device(int index);
bool built_with_cuda();

}  // namespace wsm
