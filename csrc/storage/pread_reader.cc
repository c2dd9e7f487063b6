// A fixed pool of threads that pread, or memcpy from memory shards. Serves every kind of request;
// the way of choice for what is in memory already, where one thread's copying is the limit.
#include <thread>
#include <vector>

#include "storage/block_read.h"
#include "storage/reader.h"
#include "storage/request_queue.h"
#include "util/event_fd.h"
#include "util/mutex.h"
#include "util/threads.h"

namespace wsm {
namespace {

class PreadReader final : public Reader {
 public:
  explicit PreadReader(const ReaderOptions& options)
      : block_bytes_(options.block_bytes), queue_(options) {
    threads_.reserve(options.depth);
    try {
      for (uint32_t i = 0; i < options.depth; ++i) {
        threads_.push_back(start_thread("wsm-pread", "reads", [this] { work(); }));
      }
    } catch (...) {
      stop();
      throw;
    }
  }

  ~PreadReader() override { stop(); }

  bool submit(const ReadRequest& request) override {
    {
      const MutexLock lock(mutex_);
      if (!queue_.add(request)) return false;
      if (queue_.any_done()) done_.raise();  // refused, or of no bytes: done at once
    }
    if (request.bytes > block_bytes_) {
      block_waits_.notify_all();
    } else {
      block_waits_.notify_one();
    }
    return true;
  }

  size_t poll(std::span<ReadCompletion> completions) override {
    done_.clear();
    const MutexLock lock(mutex_);
    const size_t count = queue_.pop_done(completions);
    if (queue_.any_done()) done_.raise();
    return count;
  }

  int ready_fd() const override { return done_.fd(); }
  uint32_t capacity() const override {
    const MutexLock lock(mutex_);
    return queue_.capacity();
  }
  bool full() override {
    const MutexLock lock(mutex_);
    return queue_.full();
  }
  const char* name() const override { return "pread"; }

 private:
  void work() {
    BlockRead block;
    const MutexLock lock(mutex_);
    for (;;) {
      while (!stopping_ && !queue_.any_waiting()) block_waits_.wait(mutex_);
      if (stopping_) return;
      queue_.next(&block);
      {
        const MutexUnlock unlocked(mutex_);
        block.start();
        while (!block.advance(read_now(block))) {
        }
      }
      if (!queue_.finish(block)) continue;
      const MutexUnlock unlocked(mutex_);  // who is woken wants the mutex at once
      done_.raise();
    }
  }

  void stop() {
    {
      const MutexLock lock(mutex_);
      stopping_ = true;
    }
    block_waits_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  const uint32_t block_bytes_;
  EventFd done_;
  mutable Mutex mutex_;
  CondVar block_waits_;
  RequestQueue queue_ GUARDED_BY(mutex_);
  bool stopping_ GUARDED_BY(mutex_) = false;
  std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<Reader> make_pread_reader(const ReaderOptions& options) {
  return std::make_unique<PreadReader>(options);
}

}  // namespace wsm
