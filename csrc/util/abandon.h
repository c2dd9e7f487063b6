// What must outlive everything: something outside our control may still write into it.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "util/mutex.h"

namespace wsm {

template <typename T>
struct Abandoned {
  Mutex mutex;
  std::vector<std::unique_ptr<T>> all GUARDED_BY(mutex);
};

// Keeps it for the life of the process, and reachable: no leak checker need mind.
template <typename T>
void abandon(std::unique_ptr<T>& owned) {
  static auto* const abandoned = new Abandoned<T>;
  const MutexLock lock(abandoned->mutex);
  abandoned->all.push_back(std::move(owned));
}

}  // namespace wsm
