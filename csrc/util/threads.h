// Starts threads that tell who they are (top -H, a debugger), with words for the day when the
// system refuses one.
#pragma once

#include <pthread.h>

#include <system_error>
#include <thread>
#include <utility>

#include "util/check.h"

namespace wsm {

// `name`: at most 15 characters. Throws Error naming `purpose` where there may be no more threads,
// or no memory for their stacks.
template <typename F>
std::thread start_thread(const char* name, const char* purpose, F&& run) {
  try {
    return std::thread([name, run = std::forward<F>(run)] {
      (void)::pthread_setname_np(::pthread_self(), name);
      run();
    });
  } catch (const std::system_error& error) {
    throw Error(concat("cannot start a thread for ", purpose, ": ",
                       errno_text(error.code().value()),
                       "; raise the limit on threads (ulimit -u, or pids.max of the control "
                       "group) or on memory (ulimit -v)"));
  }
}

}  // namespace wsm
