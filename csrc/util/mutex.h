// A mutex whose guarded data the compiler knows: Clang's thread-safety analysis, which `make lint`
// runs, finds what is touched without it. Other compilers see plain std::mutex.
//
//   Mutex mutex;
//   CondVar changed;
//   uint64_t version GUARDED_BY(mutex) = 0;
//   void advance() REQUIRES(mutex);          the caller holds it
//
//   const MutexLock lock(mutex);             held to the end of the scope
//   while (version == seen) changed.wait(mutex);
//   {
//     const MutexUnlock unlocked(mutex);     not held in this scope, and held again after it
//     ...
//   }
//
// A lambda is analysed as a function that holds nothing: one that runs under the mutex begins with
// `mutex.assert_held()`. Constructors and destructors are not analysed: nobody else is there.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>

#ifdef __clang__
#define WSM_THREAD_SAFETY(x) __attribute__((x))
#else
#define WSM_THREAD_SAFETY(x)
#endif

#define CAPABILITY(name) WSM_THREAD_SAFETY(capability(name))
#define SCOPED_CAPABILITY WSM_THREAD_SAFETY(scoped_lockable)
#define GUARDED_BY(mutex) WSM_THREAD_SAFETY(guarded_by(mutex))
#define PT_GUARDED_BY(mutex) WSM_THREAD_SAFETY(pt_guarded_by(mutex))  // what a pointer points to
#define REQUIRES(...) WSM_THREAD_SAFETY(requires_capability(__VA_ARGS__))
#define EXCLUDES(...) WSM_THREAD_SAFETY(locks_excluded(__VA_ARGS__))  // the caller must not hold it
// The order in which both are taken, where both are.
#define ACQUIRED_BEFORE(...) WSM_THREAD_SAFETY(acquired_before(__VA_ARGS__))
#define ACQUIRE(...) WSM_THREAD_SAFETY(acquire_capability(__VA_ARGS__))
#define RELEASE(...) WSM_THREAD_SAFETY(release_capability(__VA_ARGS__))
#define ASSERT_CAPABILITY(x) WSM_THREAD_SAFETY(assert_capability(x))
// Beside each use stands why no lock is needed, or why none can be taken.
#define NO_THREAD_SAFETY_ANALYSIS WSM_THREAD_SAFETY(no_thread_safety_analysis)

namespace wsm {

class CAPABILITY("mutex") Mutex {
 public:
  void lock() ACQUIRE() { mutex_.lock(); }
  void unlock() RELEASE() { mutex_.unlock(); }
  // Tells the analysis that the mutex is held. Nothing is checked at run time.
  void assert_held() const ASSERT_CAPABILITY(this) {}

 private:
  friend class CondVar;
  std::mutex mutex_;
};

class SCOPED_CAPABILITY MutexLock {
 public:
  explicit MutexLock(Mutex& mutex) ACQUIRE(mutex) : mutex_(mutex) { mutex_.lock(); }
  ~MutexLock() RELEASE() { mutex_.unlock(); }
  MutexLock(const MutexLock&) = delete;
  MutexLock& operator=(const MutexLock&) = delete;

 private:
  Mutex& mutex_;
};

// Gives up, for a scope, a mutex that is held around it: by exception too, it is held again.
class SCOPED_CAPABILITY MutexUnlock {
 public:
  explicit MutexUnlock(Mutex& mutex) RELEASE(mutex) : mutex_(mutex) { mutex_.unlock(); }
  ~MutexUnlock() RELEASE() { mutex_.lock(); }
  MutexUnlock(const MutexUnlock&) = delete;
  MutexUnlock& operator=(const MutexUnlock&) = delete;

 private:
  Mutex& mutex_;
};

// Waits may end without a notification: look again in a loop.
class CondVar {
 public:
  void wait(Mutex& mutex) REQUIRES(mutex) {
    std::unique_lock lock(mutex.mutex_, std::adopt_lock);
    condition_.wait(lock);
    lock.release();
  }
  // Returns whether a notification, or nothing, ended it before the time was over.
  template <typename Rep, typename Period>
  bool wait_for(Mutex& mutex, const std::chrono::duration<Rep, Period>& time) REQUIRES(mutex) {
    std::unique_lock lock(mutex.mutex_, std::adopt_lock);
    const std::cv_status status = condition_.wait_for(lock, time);
    lock.release();
    return status == std::cv_status::no_timeout;
  }
  template <typename Clock, typename Duration>
  bool wait_until(Mutex& mutex, const std::chrono::time_point<Clock, Duration>& time)
      REQUIRES(mutex) {
    std::unique_lock lock(mutex.mutex_, std::adopt_lock);
    const std::cv_status status = condition_.wait_until(lock, time);
    lock.release();
    return status == std::cv_status::no_timeout;
  }
  void notify_one() { condition_.notify_one(); }
  void notify_all() { condition_.notify_all(); }

 private:
  std::condition_variable condition_;
};

}  // namespace wsm
