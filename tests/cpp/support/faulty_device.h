// The host device with a device's faults: copies that fail from the n-th on, copies that run late,
// memory that cannot be page-locked.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "device/device.h"
#include "util/check.h"

namespace wsm::testing {

struct FaultyDeviceOptions {
  uint64_t good_copies = UINT64_MAX;            // the copies after these fail, for ever
  uint64_t late_bytes = 0;                      // so many others are filled before each copy runs
  uint64_t most_registered_bytes = UINT64_MAX;  // larger pieces are refused
};

class FaultyDevice final : public Device {
 public:
  explicit FaultyDevice(const FaultyDeviceOptions& options)
      : options_(options), ballast_(options.late_bytes) {}

  const char* kind() const override { return host_->kind(); }
  int index() const override { return host_->index(); }
  bool register_host(void* data, size_t bytes, std::string* why) override {
    *why = "the limit of the test";
    return bytes <= options_.most_registered_bytes && host_->register_host(data, bytes, why);
  }
  void unregister_host(void* data) noexcept override { host_->unregister_host(data); }
  void copy_to_device(void* target, const void* source, size_t bytes) override {
    check<Error>(copies_++ < options_.good_copies, "the device is broken");
    if (!ballast_.empty()) host_->fill(ballast_.data(), 0, ballast_.size());
    host_->copy_to_device(target, source, bytes);
  }
  void fill(void* target, uint8_t value, size_t bytes) override {
    host_->fill(target, value, bytes);
  }
  StreamHandle copy_stream() const override { return host_->copy_stream(); }
  std::unique_ptr<Event> make_event(bool timed) override { return host_->make_event(timed); }
  void record(Event& event, StreamHandle stream) override { host_->record(event, stream); }
  void wait(StreamHandle stream, const Event& event) override { host_->wait(stream, event); }
  bool done(const Event& event) override { return host_->done(event); }
  double elapsed_seconds(const Event& begin, const Event& end) override {
    return host_->elapsed_seconds(begin, end);
  }
  void drain() override { host_->drain(); }

 private:
  FaultyDeviceOptions options_;
  std::vector<std::byte> ballast_;
  uint64_t copies_ = 0;
  std::unique_ptr<Device> host_ = make_host_device();  // last: its thread fills the ballast
};

}  // namespace wsm::testing
