// What a CUDA call answered, turned into an exception, or dropped where nothing may be thrown.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

#include "util/check.h"

namespace wsm {

inline std::string cuda_text(cudaError_t error) {
  return concat(cudaGetErrorName(error), ": ", cudaGetErrorString(error));
}

inline void cuda_check(cudaError_t error, const char* call, const char* file, int line) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // else the next call that looks would find this error again
  const char* slash = std::strrchr(file, '/');
  const std::string text = concat(call, " failed with ", cuda_text(error), " (",
                                  slash ? slash + 1 : file, ":", line, ")");
  if (error == cudaErrorMemoryAllocation) throw OutOfMemory(text);
  throw Error(text);
}

}  // namespace wsm

// Throws Error with the call, the runtime's words, file and line, and clears the pending error.
#define WSM_CUDA_CHECK(call) ::wsm::cuda_check((call), #call, __FILE__, __LINE__)

// For destructors: the process may be ending and the driver be gone already.
#define WSM_CUDA_IGNORE(call)                            \
  do {                                                   \
    if ((call) != cudaSuccess) (void)cudaGetLastError(); \
  } while (false)
