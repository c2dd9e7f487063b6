// Stands in for cuda_device.cc in a build without a CUDA toolkit.
#ifndef WSM_WITH_CUDA

#include "device/device.h"
#include "util/check.h"

namespace wsm {

std::unique_ptr<Device> make_cuda_device(int index) {
  throw Error(
      concat("cuda:", index,
             " cannot be used: this was built without CUDA. Install a CUDA toolkit and install "
             "again with WSM_CUDA=ON, or use device=\"cpu\""));
}

bool built_with_cuda() { return false; }

}  // namespace wsm

#endif  // WSM_WITH_CUDA
