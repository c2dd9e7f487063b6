// A device whose streams are truly asynchronous, as a GPU's are: each is a queue of its own, and
// what is enqueued runs late, out of step, in any order that the events allow.
//
//   auto gpu = std::make_shared<AsyncGpu>(seed);
//   model.open(plan, options, std::make_unique<AsyncDevice>(gpu));
//   gpu->launch(stream, kernel);     runs when `stream` comes to it
//   gpu->synchronize();              all that was enqueued has run
//
// No thread of its own: each call runs a few operations, of streams that the seed chooses, and for
// a while it favours some of them. A stream may so lie far behind the others. Copies run in pieces.
// A source that is overwritten, or freed, before its copy has run is seen, and so is a target that
// a kernel still reads.
// Events are CUDA's: a record captures the stream's tail, a wait means the latest record at the
// call, an event that was never recorded orders nothing, and no wait blocks the host.
//
// Lifecycle: the GPU outlives its device: kernels may run after the engine is closed, and what they
// read must live until `synchronize`. The device's destructor runs the copy stream to its end, the
// GPU's destructor all streams. Thread-safe; kernels run one at a time, on the thread of any call,
// and call nothing of the GPU.
#pragma once

#include <array>
#include <chrono>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>

#include "device/device.h"

namespace wsm::testing {

class AsyncGpu {
 public:
  static constexpr StreamHandle kStreams = 5;  // handles are below it
  static constexpr StreamHandle kCopyStream = 1;
  using Kernel = std::function<void()>;
  using Clock = std::chrono::steady_clock;

  // What an event stands for: its latest record, which waits share with the event. Null: never
  // recorded. The GPU's mutex guards what the pointer points to, and the pointer.
  struct Mark {
    bool reached = false;
    Clock::time_point time;
  };
  using MarkPtr = std::shared_ptr<Mark>;

  explicit AsyncGpu(uint64_t seed);
  ~AsyncGpu() { synchronize(); }
  AsyncGpu(const AsyncGpu&) = delete;
  AsyncGpu& operator=(const AsyncGpu&) = delete;

  void launch(StreamHandle stream, Kernel kernel);
  void copy(StreamHandle stream, void* target, const void* source, size_t bytes);
  void fill(StreamHandle stream, void* target, uint8_t value, size_t bytes);
  void record(StreamHandle stream, MarkPtr& mark);
  void wait(StreamHandle stream, const MarkPtr& mark);
  bool reached(const MarkPtr& mark);
  Clock::time_point time_of(const MarkPtr& mark);
  void synchronize();
  void synchronize(StreamHandle stream);
  // Operations that have not run yet.
  size_t pending(StreamHandle stream);

 private:
  enum class Kind : uint8_t { kKernel, kCopy, kFill, kRecord, kWait };
  struct Operation {
    Kind kind;
    Kernel kernel{};
    std::byte* target = nullptr;
    const std::byte* source = nullptr;
    size_t bytes = 0;
    uint8_t value = 0;
    MarkPtr mark{};
  };
  using Stream = std::deque<Operation>;

  void enqueue(StreamHandle stream, Operation operation);
  void enqueue_locked(StreamHandle stream, Operation operation);
  void run_some();
  bool run_one();
  bool runnable(const Stream& stream) const;
  void run_front(Stream& stream);
  bool run_piece(Operation& operation);
  Stream& at(StreamHandle stream);
  uint64_t below(uint64_t bound) { return random_() % bound; }

  std::mutex mutex_;  // guards all that follows
  std::mt19937_64 random_;
  std::array<Stream, kStreams> streams_;
  std::array<uint64_t, kStreams> favour_{};  // how often a stream is chosen; 0: when no other can
  uint64_t until_change_ = 0;                // of what is favoured
};

// The engine's side: the copy stream, and events.
class AsyncDevice final : public Device {
 public:
  explicit AsyncDevice(std::shared_ptr<AsyncGpu> gpu) : gpu_(std::move(gpu)) {}
  ~AsyncDevice() override { gpu_->synchronize(copy_stream()); }

  const char* kind() const override { return "async"; }
  int index() const override { return 0; }
  bool register_host(void*, size_t, std::string*) override { return true; }
  void unregister_host(void*) noexcept override {}
  void copy_to_device(void* target, const void* source, size_t bytes) override {
    gpu_->copy(copy_stream(), target, source, bytes);
  }
  void fill(void* target, uint8_t value, size_t bytes) override {
    gpu_->fill(copy_stream(), target, value, bytes);
  }
  StreamHandle copy_stream() const override { return AsyncGpu::kCopyStream; }
  std::unique_ptr<Event> make_event(bool timed) override;
  void record(Event& event, StreamHandle stream) override;
  void wait(StreamHandle stream, const Event& event) override;
  bool done(const Event& event) override;
  double elapsed_seconds(const Event& begin, const Event& end) override;
  void drain() override { gpu_->synchronize(copy_stream()); }

 private:
  std::shared_ptr<AsyncGpu> gpu_;
};

}  // namespace wsm::testing
