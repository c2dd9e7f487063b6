// A device over another one, which fails as a test wants, and keeps count of what was not given
// back.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "device/device.h"
#include "util/check.h"

namespace wsm::testing {

// Outlives the device. Every call that can fail is counted, registrations too.
struct DeviceLedger {
  uint64_t fail_at = UINT64_MAX;                    // this call, counted from 1, throws
  bool for_ever = false;                            // and all after it
  uint64_t most_registered_bytes = UINT64_MAX;      // more are refused
  std::atomic<uint64_t> fail_at_copy = UINT64_MAX;  // this copy does
  std::atomic<uint64_t> fail_at_made = UINT64_MAX;  // the event after so many does
  std::atomic<uint64_t> calls{0};
  std::atomic<uint64_t> copies{0};
  std::atomic<uint64_t> made{0};  // events
  std::atomic<int64_t> events{0};
  std::atomic<uint64_t> registered_bytes{0};

  bool struck() const { return calls >= fail_at; }
};

class FailingDevice : public Device {
 public:
  FailingDevice(std::unique_ptr<Device> inner, DeviceLedger& ledger)
      : inner_(std::move(inner)), ledger_(ledger) {}

  const char* kind() const override { return inner_->kind(); }
  int index() const override { return inner_->index(); }
  bool register_host(void* data, size_t bytes, std::string* why) override {
    call("register_host");
    if (ledger_.registered_bytes + bytes > ledger_.most_registered_bytes) {
      if (why) *why = "refused by the test";
      return false;
    }
    if (!inner_->register_host(data, bytes, why)) return false;
    const std::lock_guard lock(mutex_);
    registered_[data] = bytes;
    ledger_.registered_bytes += bytes;
    return true;
  }
  void unregister_host(void* data) noexcept override {
    inner_->unregister_host(data);
    const std::lock_guard lock(mutex_);
    ledger_.registered_bytes -= registered_[data];
    registered_.erase(data);
  }
  void copy_to_device(void* target, const void* source, size_t bytes) override {
    call("copy_to_device");
    check<Error>(++ledger_.copies != ledger_.fail_at_copy, "the device is broken: copy_to_device");
    inner_->copy_to_device(target, source, bytes);
  }
  void fill(void* target, uint8_t value, size_t bytes) override {
    call("fill");
    inner_->fill(target, value, bytes);
  }
  StreamHandle copy_stream() const override { return inner_->copy_stream(); }
  std::unique_ptr<Event> make_event(bool timed) override {
    call("make_event");
    check<Error>(ledger_.made++ != ledger_.fail_at_made, "the device is broken: make_event");
    return std::make_unique<CountedEvent>(inner_->make_event(timed), ledger_);
  }
  void record(Event& event, StreamHandle stream) override {
    call("record");
    inner_->record(inner(event), stream);
  }
  void wait(StreamHandle stream, const Event& event) override {
    call("wait");
    inner_->wait(stream, inner(event));
  }
  bool done(const Event& event) override {
    call("done");
    return inner_->done(inner(event));
  }
  double elapsed_seconds(const Event& begin, const Event& end) override {
    call("elapsed_seconds");
    return inner_->elapsed_seconds(inner(begin), inner(end));
  }
  void drain() override {
    inner_->drain();  // as CUDA does, which tells of an error once nothing runs any more
    call("drain");
  }

 private:
  struct CountedEvent final : Event {
    CountedEvent(std::unique_ptr<Event> event, DeviceLedger& of)
        : inner(std::move(event)), ledger(of) {
      ++ledger.events;
    }
    ~CountedEvent() override { --ledger.events; }
    const std::unique_ptr<Event> inner;
    DeviceLedger& ledger;
  };

  static Event& inner(const Event& event) { return *static_cast<const CountedEvent&>(event).inner; }

  void call(const char* name) {
    const uint64_t number = ++ledger_.calls;
    const bool fails = ledger_.for_ever ? number >= ledger_.fail_at : number == ledger_.fail_at;
    check<Error>(!fails, "the device is broken: ", name);
  }

  const std::unique_ptr<Device> inner_;
  DeviceLedger& ledger_;
  std::mutex mutex_;
  std::map<const void*, uint64_t> registered_;  // guarded by mutex_
};

}  // namespace wsm::testing
