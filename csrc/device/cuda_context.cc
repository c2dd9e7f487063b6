#ifdef WSM_WITH_CUDA

#include "device/cuda_context.h"

#include <dlfcn.h>

#include "util/check.h"

namespace wsm {
namespace {

// The driver's library comes with the driver, not with the toolkit, so it is looked up at run time;
// the runtime has loaded it already. cuda.h maps each name to its current version
// (cuCtxPushCurrent_v2), and the macro looks up that one.
#define WSM_TEXT_OF(expanded) #expanded
#define WSM_DRIVER_FUNCTION(name) \
  decltype(&::name) const name##_fn = reinterpret_cast<decltype(&::name)>(find(WSM_TEXT_OF(name)))

struct Driver {
  static void* find(const char* name) {
    static void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    check<Error>(library != nullptr,
                 "the CUDA driver cannot be loaded: ", library ? "" : dlerror());
    void* const function = dlsym(library, name);
    check<Error>(function != nullptr, "the CUDA driver has no ", name, ": update it");
    return function;
  }

  WSM_DRIVER_FUNCTION(cuInit);
  WSM_DRIVER_FUNCTION(cuGetErrorName);
  WSM_DRIVER_FUNCTION(cuDeviceGet);
  WSM_DRIVER_FUNCTION(cuDevicePrimaryCtxRetain);
  WSM_DRIVER_FUNCTION(cuDevicePrimaryCtxRelease);
  WSM_DRIVER_FUNCTION(cuCtxPushCurrent);
  WSM_DRIVER_FUNCTION(cuCtxPopCurrent);

  void check_result(CUresult result, const char* what) const {
    if (result == CUDA_SUCCESS) return;
    const char* name = nullptr;
    cuGetErrorName_fn(result, &name);
    throw Error(
        concat("the CUDA driver could not ", what, ": ", name ? name : "error", " (", result, ")"));
  }
};

#undef WSM_DRIVER_FUNCTION
#undef WSM_TEXT_OF

const Driver& driver() {
  static const Driver functions;
  return functions;
}

}  // namespace

CudaContext::CudaContext(int device) {
  const Driver& api = driver();
  api.check_result(api.cuInit_fn(0), "start");
  api.check_result(api.cuDeviceGet_fn(&device_, device), "find the device");
  api.check_result(api.cuDevicePrimaryCtxRetain_fn(&context_, device_),
                   "open the device's context");
}

CudaContext::~CudaContext() { driver().cuDevicePrimaryCtxRelease_fn(device_); }

CudaScope::CudaScope(const CudaContext& context) {
  driver().check_result(driver().cuCtxPushCurrent_fn(context.context_), "make the device current");
}

CudaScope::~CudaScope() {
  CUcontext ignored = nullptr;
  driver().cuCtxPopCurrent_fn(&ignored);
}

}  // namespace wsm

#endif  // WSM_WITH_CUDA
