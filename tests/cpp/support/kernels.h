// Kernels that read what a unit has on the device, and check every byte when they run.
//
// Lifecycle: the model outlives them, and its memory too: `wrong` before that changes.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "support/async_device.h"
#include "support/streamed_model.h"

namespace wsm::testing {

class Kernels {
 public:
  Kernels(std::shared_ptr<AsyncGpu> gpu, const StreamedModel& model)
      : gpu_(std::move(gpu)), model_(model) {}

  // Enqueues a kernel for each of the unit's tensors.
  void read(uint32_t unit, StreamHandle stream) {
    model_.visit_images(unit, [&](const TensorSpec& tensor, const std::byte* image) {
      gpu_->launch(stream, [this, &tensor, image] {
        wrong_ += model_.compare(tensor, image);
        ++ran_;
      });
    });
  }
  // A forward: acquires, reads, releases.
  void use(uint32_t unit, StreamHandle stream) {
    const bool streams = model_.engine().plan().units[unit].place_bytes > 0;
    if (streams) model_.engine().acquire(unit, stream, {});
    read(unit, stream);
    if (streams) model_.engine().release(unit, stream);
  }
  void pass(const std::vector<uint32_t>& order, StreamHandle stream) {
    model_.engine().begin_pass(stream);
    for (const uint32_t unit : order) use(unit, stream);
    model_.engine().end_pass(stream);
  }

  // Waits until all have run. The names of the tensors whose bytes were wrong.
  std::string wrong() {
    gpu_->synchronize();
    return wrong_;
  }
  uint64_t ran() const { return ran_; }  // once all have run

 private:
  const std::shared_ptr<AsyncGpu> gpu_;
  const StreamedModel& model_;
  std::string wrong_;  // the kernels', one at a time
  uint64_t ran_ = 0;
};

}  // namespace wsm::testing
