// Makes a device current for the length of a scope, and leaves no trace.
//
// cudaSetDevice would not do: it creates a context on the device that it is given, so restoring
// "device 0" in a thread that never used it costs hundreds of MB there. Pushing the primary
// context, the one that the runtime and torch use, and popping it restores exactly what was
// current, be it nothing.
// Lifecycle: the primary context is retained at construction and released by the destructor;
// scopes lie within its life. Thread-safe.
// Failure: throws Error with the driver's words; the destructors never throw.
#pragma once

#include <cuda.h>

namespace wsm {

class CudaContext {
 public:
  explicit CudaContext(int device);
  ~CudaContext();
  CudaContext(const CudaContext&) = delete;
  CudaContext& operator=(const CudaContext&) = delete;

 private:
  friend class CudaScope;
  CUdevice device_ = 0;
  CUcontext context_ = nullptr;
};

class CudaScope {
 public:
  explicit CudaScope(const CudaContext& context);
  ~CudaScope();
  CudaScope(const CudaScope&) = delete;
  CudaScope& operator=(const CudaScope&) = delete;
};

}  // namespace wsm
