// A device over another one, with a device's faults: copies that fail from the n-th on, copies that
// run late, memory that cannot be page-locked.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
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
  explicit FaultyDevice(const FaultyDeviceOptions& options,
                        std::unique_ptr<Device> inner = make_host_device())
      : options_(options), ballast_(options.late_bytes), inner_(std::move(inner)) {}

  const char* kind() const override { return inner_->kind(); }
  int index() const override { return inner_->index(); }
  bool register_host(void* data, size_t bytes, std::string* why) override {
    *why = "the limit of the test";
    return bytes <= options_.most_registered_bytes && inner_->register_host(data, bytes, why);
  }
  void unregister_host(void* data) noexcept override { inner_->unregister_host(data); }
  void copy_to_device(void* target, const void* source, size_t bytes) override {
    check<Error>(copies_++ < options_.good_copies, "the device is broken");
    if (!ballast_.empty()) inner_->fill(ballast_.data(), 0, ballast_.size());
    inner_->copy_to_device(target, source, bytes);
  }
  void fill(void* target, uint8_t value, size_t bytes) override {
    inner_->fill(target, value, bytes);
  }
  StreamHandle copy_stream() const override { return inner_->copy_stream(); }
  std::unique_ptr<Event> make_event(bool timed) override { return inner_->make_event(timed); }
  void record(Event& event, StreamHandle stream) override { inner_->record(event, stream); }
  void wait(StreamHandle stream, const Event& event) override { inner_->wait(stream, event); }
  bool done(const Event& event) override { return inner_->done(event); }
  double elapsed_seconds(const Event& begin, const Event& end) override {
    return inner_->elapsed_seconds(begin, end);
  }
  void drain() override { inner_->drain(); }

 private:
  FaultyDeviceOptions options_;
  std::vector<std::byte> ballast_;
  uint64_t copies_ = 0;
  std::unique_ptr<Device> inner_;  // last: it fills the ballast
};

}  // namespace wsm::testing
