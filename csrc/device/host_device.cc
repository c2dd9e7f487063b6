// The host device: plain memory, and one copy thread that works through a FIFO.
//
// Every item of the FIFO has a ticket, counted up from 1; `completed_` is the ticket of the last
// item that was executed. An event holds the ticket of its latest record, so it is done when
// `completed_` has reached that. Ticket 0 is always done: never recorded, or recorded on the
// calling thread.
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#include "device/device.h"
#include "util/check.h"
#include "util/copy_past_caches.h"
#include "util/threads.h"

namespace wsm {
namespace {

using Clock = std::chrono::steady_clock;

constexpr StreamHandle kCallingThread = 0;
constexpr StreamHandle kCopyStream = 1;

struct Mark {
  uint64_t ticket = 0;
  bool recorded = false;
  Clock::time_point time;  // when the record of `ticket` was executed
};

// The mark is shared with the FIFO: an event may be freed while a record of it is still to come.
struct HostEvent final : Event {
  explicit HostEvent(bool is_timed) : timed(is_timed) {}
  const bool timed;
  const std::shared_ptr<Mark> mark = std::make_shared<Mark>();  // guarded by the device's mutex
};

const HostEvent& host(const Event& event) { return static_cast<const HostEvent&>(event); }

void check_stream(StreamHandle stream) {
  check(stream == kCallingThread || stream == kCopyStream, "the host device has no stream ", stream,
        ": use 0 (the calling thread) or copy_stream()");
}

class HostDevice final : public Device {
 public:
  HostDevice() : thread_(start_thread("wsm-copies", "copies", [this] { run(); })) {}

  ~HostDevice() override {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
    }
    work_.notify_one();
    thread_.join();
  }

  const char* kind() const override { return "host"; }
  int index() const override { return 0; }

  // Copies are as fast from pageable memory: there is nothing to lock.
  bool register_host(void*, size_t, std::string*) override { return true; }
  void unregister_host(void*) noexcept override {}

  void copy_to_device(void* target, const void* source, size_t bytes) override {
    enqueue({.kind = Kind::kCopy, .target = target, .source = source, .bytes = bytes});
  }

  void fill(void* target, uint8_t value, size_t bytes) override {
    enqueue({.kind = Kind::kFill, .target = target, .bytes = bytes, .value = value});
  }

  StreamHandle copy_stream() const override { return kCopyStream; }

  std::unique_ptr<Event> make_event(bool timed) override {
    return std::make_unique<HostEvent>(timed);
  }

  void record(Event& event, StreamHandle stream) override {
    check_stream(stream);
    const std::shared_ptr<Mark>& mark = host(event).mark;
    std::lock_guard lock(mutex_);
    mark->recorded = true;
    if (stream == kCallingThread) {
      mark->ticket = 0;
      mark->time = Clock::now();
    } else {
      mark->ticket = enqueue_locked({.kind = Kind::kRecord, .mark = mark});
    }
  }

  void wait(StreamHandle stream, const Event& event) override {
    check_stream(stream);
    // The copy stream need not wait: an event that is not done yet lies before it in the same FIFO.
    if (stream == kCopyStream) return;
    std::unique_lock lock(mutex_);
    wait_for(lock, host(event).mark->ticket);
  }

  bool done(const Event& event) override {
    std::lock_guard lock(mutex_);
    return host(event).mark->ticket <= completed_;
  }

  double elapsed_seconds(const Event& begin, const Event& end) override {
    std::lock_guard lock(mutex_);
    return std::chrono::duration<double>(time_of(host(end)) - time_of(host(begin))).count();
  }

  void drain() override {
    std::unique_lock lock(mutex_);
    wait_for(lock, enqueued_);
  }

 private:
  enum class Kind : uint8_t { kCopy, kFill, kRecord };

  struct Item {
    Kind kind;
    void* target = nullptr;
    const void* source = nullptr;
    size_t bytes = 0;
    uint8_t value = 0;
    std::shared_ptr<Mark> mark = nullptr;
  };

  void enqueue(Item item) {
    std::lock_guard lock(mutex_);
    enqueue_locked(std::move(item));
  }

  uint64_t enqueue_locked(Item item) {
    pending_.push_back(std::move(item));
    work_.notify_one();
    return ++enqueued_;
  }

  void wait_for(std::unique_lock<std::mutex>& lock, uint64_t ticket) {
    progress_.wait(lock, [&] { return completed_ >= ticket; });
  }

  Clock::time_point time_of(const HostEvent& event) const {
    check(event.timed, "elapsed_seconds needs events that were made with timed=true");
    check(event.mark->recorded && event.mark->ticket <= completed_,
          "elapsed_seconds needs events that were recorded and are done");
    return event.mark->time;
  }

  void run() {
    // The vectors change places and keep their capacity: once grown, nothing is allocated.
    std::vector<Item> batch;
    std::unique_lock lock(mutex_);
    while (true) {
      work_.wait(lock, [this] { return stop_ || !pending_.empty(); });
      if (pending_.empty()) return;
      batch.swap(pending_);
      for (Item& item : batch) execute(item, lock);
      batch.clear();
    }
  }

  // Moves the bytes without the lock.
  void execute(Item& item, std::unique_lock<std::mutex>& lock) {
    if (item.bytes > 0) {
      lock.unlock();
      if (item.kind == Kind::kCopy) {
        copy_past_caches(item.target, item.source, item.bytes);
      } else {
        std::memset(item.target, item.value, item.bytes);
      }
      lock.lock();
    }
    ++completed_;
    Mark* const mark = item.mark.get();
    if (mark && mark->ticket == completed_) mark->time = Clock::now();
    progress_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable work_;      // there are items, or `stop_`
  std::condition_variable progress_;  // `completed_` has moved
  std::vector<Item> pending_;
  uint64_t enqueued_ = 0;   // ticket of the newest item
  uint64_t completed_ = 0;  // ticket of the last item executed; at most `enqueued_`
  bool stop_ = false;
  std::thread thread_;  // last: it uses all of the above
};

}  // namespace

std::unique_ptr<Device> make_host_device() { return std::make_unique<HostDevice>(); }

}  // namespace wsm
