// Starts threads, with words for the day when the system refuses one.
#pragma once

#include <system_error>
#include <thread>
#include <utility>

#include "util/check.h"

namespace wsm {

// Throws Error naming `purpose` where there may be no more threads, or no memory for their stacks.
template <typename F>
std::thread start_thread(const char* purpose, F&& run) {
  try {
    return std::thread(std::forward<F>(run));
  } catch (const std::system_error& error) {
    throw Error(concat("cannot start a thread for ", purpose, ": ",
                       errno_text(error.code().value()),
                       "; raise the limit on threads (ulimit -u, or pids.max of the control "
                       "group) or on memory (ulimit -v)"));
  }
}

}  // namespace wsm
