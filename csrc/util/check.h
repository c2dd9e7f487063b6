// Errors, and the words they carry. Every message says what was wrong, where, and what to do.
#pragma once

#include <cerrno>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <system_error>

namespace wsm {

// Base of everything this library throws. Python sees it as wsm_ext.EngineError (a RuntimeError).
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The caller handed over something that cannot be used. Python: ValueError.
class InvalidArgument : public Error {
 public:
  using Error::Error;
};

// The storage failed, or changed under us. Python: OSError.
class IoError : public Error {
 public:
  using Error::Error;
};

// A wait reached its time limit. Python: TimeoutError.
class TimeoutError : public Error {
 public:
  using Error::Error;
};

// Device or host memory was refused. Python: MemoryError.
class OutOfMemory : public Error {
 public:
  using Error::Error;
};

template <typename... Args>
std::string concat(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

// "EINVAL"-style text for an errno value: "Invalid argument (errno 22)".
inline std::string errno_text(int error) {
  return concat(std::generic_category().message(error), " (errno ", error, ")");
}

// Throws E with the concatenated message unless `condition` holds.
template <typename E = InvalidArgument, typename... Args>
void check(bool condition, const Args&... args) {
  if (!condition) throw E(concat(args...));
}

}  // namespace wsm
