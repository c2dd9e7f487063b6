// The host device: plain memory, and one copy thread that works through a FIFO.
//
// Every item of the FIFO has a ticket, counted up from 1; `completed_` is the ticket of the last
// item that was executed. An event holds the ticket of its latest record, so it is done when
// `completed_` has reached that. Ticket 0 is always done: never recorded, or recorded on the
// calling thread.
#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#include "device/device.h"
#include "util/check.h"
#include "util/copy_past_caches.h"
#include "util/mutex.h"
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
  const std::shared_ptr<Mark> mark = std::make_shared<Mark>();  // see HostDevice::mark_of
};

void check_stream(StreamHandle stream) {
  check(stream == kCallingThread || stream == kCopyStream, "the host device has no stream ", stream,
        ": use 0 (the calling thread) or copy_stream()");
}

class HostDevice final : public Device {
 public:
  HostDevice() : thread_(start_thread("wsm-copies", "copies", [this] { run(); })) {}

  ~HostDevice() override {
    {
      const MutexLock lock(mutex_);
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
    const MutexLock lock(mutex_);
    const std::shared_ptr<Mark>& mark = mark_of(event);
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
    const MutexLock lock(mutex_);
    wait_for(mark_of(event)->ticket);
  }

  bool done(const Event& event) override {
    const MutexLock lock(mutex_);
    return mark_of(event)->ticket <= completed_;
  }

  double elapsed_seconds(const Event& begin, const Event& end) override {
    const MutexLock lock(mutex_);
    return std::chrono::duration<double>(time_of(end) - time_of(begin)).count();
  }

  void drain() override {
    const MutexLock lock(mutex_);
    wait_for(enqueued_);
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
    const MutexLock lock(mutex_);
    enqueue_locked(std::move(item));
  }

  uint64_t enqueue_locked(Item item) REQUIRES(mutex_) {
    pending_.push_back(std::move(item));
    work_.notify_one();
    return ++enqueued_;
  }

  // The copy thread writes into it: it is read and written under the mutex.
  const std::shared_ptr<Mark>& mark_of(const Event& event) const REQUIRES(mutex_) {
    return static_cast<const HostEvent&>(event).mark;
  }

  // By value: while this waits, the event may be recorded again.
  void wait_for(uint64_t ticket) REQUIRES(mutex_) {
    while (completed_ < ticket) progress_.wait(mutex_);
  }

  Clock::time_point time_of(const Event& event) const REQUIRES(mutex_) {
    check(static_cast<const HostEvent&>(event).timed,
          "elapsed_seconds needs events that were made with timed=true");
    const Mark& mark = *mark_of(event);
    check(mark.recorded && mark.ticket <= completed_,
          "elapsed_seconds needs events that were recorded and are done");
    return mark.time;
  }

  void run() {
    // The vectors change places and keep their capacity: once grown, nothing is allocated.
    std::vector<Item> batch;
    const MutexLock lock(mutex_);
    while (true) {
      while (!stop_ && pending_.empty()) work_.wait(mutex_);
      if (pending_.empty()) return;
      batch.swap(pending_);
      for (Item& item : batch) execute(item);
      batch.clear();
    }
  }

  // Moves the bytes without the lock.
  void execute(Item& item) REQUIRES(mutex_) {
    if (item.bytes > 0) {
      const MutexUnlock unlocked(mutex_);
      if (item.kind == Kind::kCopy) {
        copy_past_caches(item.target, item.source, item.bytes);
      } else {
        std::memset(item.target, item.value, item.bytes);
      }
    }
    ++completed_;
    Mark* const mark = item.mark.get();
    if (mark && mark->ticket == completed_) mark->time = Clock::now();
    progress_.notify_all();
  }

  Mutex mutex_;
  CondVar work_;      // there are items, or `stop_`
  CondVar progress_;  // `completed_` has moved
  std::vector<Item> pending_ GUARDED_BY(mutex_);
  uint64_t enqueued_ GUARDED_BY(mutex_) = 0;   // ticket of the newest item
  uint64_t completed_ GUARDED_BY(mutex_) = 0;  // of the last item executed; at most `enqueued_`
  bool stop_ GUARDED_BY(mutex_) = false;
  std::thread thread_;  // last: it uses all of the above
};

}  // namespace

std::unique_ptr<Device> make_host_device() { return std::make_unique<HostDevice>(); }

}  // namespace wsm
