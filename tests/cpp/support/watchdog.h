// Ends the process when a step takes too long: a hang becomes a failure that says what hung.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <iostream>
#include <mutex>
#include <string>
#include <thread>

namespace wsm::testing {

class Watchdog {
 public:
  explicit Watchdog(std::chrono::seconds limit) : limit_(limit), thread_([this] { watch(); }) {}
  ~Watchdog() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    changed_.notify_one();
    thread_.join();
  }

  // A step begins, and the one before it has ended.
  void step(std::string what) {
    const std::lock_guard lock(mutex_);
    what_ = std::move(what);
    begun_ = std::chrono::steady_clock::now();
    changed_.notify_one();
  }

 private:
  void watch() {
    std::unique_lock lock(mutex_);
    while (!stop_) {
      changed_.wait_until(lock, begun_ + limit_);
      if (stop_ || std::chrono::steady_clock::now() < begun_ + limit_) continue;
      std::cerr << "watchdog: no end after " << limit_.count() << " s: " << what_ << std::endl;
      std::abort();
    }
  }

  const std::chrono::seconds limit_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::string what_ = "start";                                                      // guarded
  std::chrono::steady_clock::time_point begun_ = std::chrono::steady_clock::now();  // guarded
  bool stop_ = false;                                                               // guarded
  std::thread thread_;
};

}  // namespace wsm::testing
