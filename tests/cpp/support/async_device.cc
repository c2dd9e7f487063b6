#include "support/async_device.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "util/check.h"

namespace wsm::testing {
namespace {

constexpr uint64_t kMostSteps = 4;      // of a call
constexpr uint64_t kMostFavoured = 60;  // operations until others are favoured
constexpr size_t kLeastPiece = 256;

struct AsyncEvent final : Event {
  explicit AsyncEvent(bool is_timed) : timed(is_timed) {}
  const bool timed;
  AsyncGpu::MarkPtr mark;  // null: never recorded
};

AsyncEvent& async(Event& event) { return static_cast<AsyncEvent&>(event); }
const AsyncEvent& async(const Event& event) { return static_cast<const AsyncEvent&>(event); }

}  // namespace

AsyncGpu::AsyncGpu(uint64_t seed) : random_(seed) {}

void AsyncGpu::launch(StreamHandle stream, Kernel kernel) {
  enqueue(stream, {.kind = Kind::kKernel, .kernel = std::move(kernel)});
}

void AsyncGpu::copy(StreamHandle stream, void* target, const void* source, size_t bytes) {
  enqueue(stream, {.kind = Kind::kCopy,
                   .target = static_cast<std::byte*>(target),
                   .source = static_cast<const std::byte*>(source),
                   .bytes = bytes});
}

void AsyncGpu::fill(StreamHandle stream, void* target, uint8_t value, size_t bytes) {
  enqueue(stream, {.kind = Kind::kFill,
                   .target = static_cast<std::byte*>(target),
                   .bytes = bytes,
                   .value = value});
}

void AsyncGpu::record(StreamHandle stream, MarkPtr& mark) {
  const std::lock_guard lock(mutex_);
  mark = std::make_shared<Mark>();
  enqueue_locked(stream, {.kind = Kind::kRecord, .mark = mark});
}

void AsyncGpu::wait(StreamHandle stream, const MarkPtr& mark) {
  const std::lock_guard lock(mutex_);
  if (mark) enqueue_locked(stream, {.kind = Kind::kWait, .mark = mark});
}

bool AsyncGpu::reached(const MarkPtr& mark) {
  const std::lock_guard lock(mutex_);
  run_some();
  return !mark || mark->reached;
}

AsyncGpu::Clock::time_point AsyncGpu::time_of(const MarkPtr& mark) {
  const std::lock_guard lock(mutex_);
  check(mark && mark->reached, "elapsed_seconds needs events that were recorded and are done");
  return mark->time;
}

void AsyncGpu::synchronize() {
  const std::lock_guard lock(mutex_);
  while (run_one()) continue;
}

void AsyncGpu::synchronize(StreamHandle stream) {
  const std::lock_guard lock(mutex_);
  while (!at(stream).empty()) {
    check<Error>(run_one(), "a stream waits for what will never be");
  }
}

size_t AsyncGpu::pending(StreamHandle stream) {
  const std::lock_guard lock(mutex_);
  return at(stream).size();
}

void AsyncGpu::enqueue(StreamHandle stream, Operation operation) {
  const std::lock_guard lock(mutex_);
  enqueue_locked(stream, std::move(operation));
}

void AsyncGpu::enqueue_locked(StreamHandle stream, Operation operation) {
  at(stream).push_back(std::move(operation));
  run_some();
}

void AsyncGpu::run_some() {
  for (uint64_t steps = below(kMostSteps); steps > 0 && run_one(); --steps) continue;
}

// False where nothing is left that can run.
bool AsyncGpu::run_one() {
  if (until_change_-- == 0) {
    until_change_ = below(kMostFavoured);
    for (uint64_t& favour : favour_) favour = below(2) * (1 + below(8));
  }
  uint64_t favours = 0, count = 0;
  for (StreamHandle s = 0; s < kStreams; ++s) {
    if (!runnable(streams_[s])) continue;
    favours += favour_[s];
    ++count;
  }
  if (count == 0) return false;
  uint64_t draw = below(favours > 0 ? favours : count);
  for (StreamHandle s = 0; s < kStreams; ++s) {
    if (!runnable(streams_[s])) continue;
    const uint64_t share = favours > 0 ? favour_[s] : 1;
    if (draw < share) {
      run_front(streams_[s]);
      return true;
    }
    draw -= share;
  }
  return false;
}

bool AsyncGpu::runnable(const Stream& stream) const {
  return !stream.empty() && (stream.front().kind != Kind::kWait || stream.front().mark->reached);
}

void AsyncGpu::run_front(Stream& stream) {
  Operation& front = stream.front();
  switch (front.kind) {
    case Kind::kCopy:
    case Kind::kFill:
      if (!run_piece(front)) return;
      break;
    case Kind::kKernel:
      front.kernel();
      break;
    case Kind::kRecord:
      front.mark->time = Clock::now();
      front.mark->reached = true;
      break;
    case Kind::kWait:
      break;
  }
  stream.pop_front();
}

// True when the operation has ended.
bool AsyncGpu::run_piece(Operation& operation) {
  const size_t piece = below(3) == 0 ? std::min(operation.bytes, kLeastPiece + operation.bytes / 2)
                                     : operation.bytes;
  if (operation.kind == Kind::kFill && piece > 0) {
    std::memset(operation.target, operation.value, piece);
  } else if (piece > 0) {
    std::memcpy(operation.target, operation.source, piece);
    operation.source += piece;
  }
  operation.target += piece;
  operation.bytes -= piece;
  return operation.bytes == 0;
}

AsyncGpu::Stream& AsyncGpu::at(StreamHandle stream) {
  check(stream < kStreams, "the test's GPU has no stream ", stream, ": it has ", kStreams);
  return streams_[stream];
}

std::unique_ptr<Event> AsyncDevice::make_event(bool timed) {
  return std::make_unique<AsyncEvent>(timed);
}

void AsyncDevice::record(Event& event, StreamHandle stream) {
  gpu_->record(stream, async(event).mark);
}

void AsyncDevice::wait(StreamHandle stream, const Event& event) {
  gpu_->wait(stream, async(event).mark);
}

bool AsyncDevice::done(const Event& event) { return gpu_->reached(async(event).mark); }

double AsyncDevice::elapsed_seconds(const Event& begin, const Event& end) {
  check(async(begin).timed && async(end).timed,
        "elapsed_seconds needs events that were made with timed=true");
  return std::chrono::duration<double>(gpu_->time_of(async(end).mark) -
                                       gpu_->time_of(async(begin).mark))
      .count();
}

}  // namespace wsm::testing
