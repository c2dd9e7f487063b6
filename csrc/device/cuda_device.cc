// The CUDA device: the runtime API and one non-blocking copy stream.
#ifdef WSM_WITH_CUDA

#include "device/cuda_check.h"
#include "device/cuda_context.h"
#include "device/device.h"
#include "device/registrations.h"

namespace wsm {
namespace {

cudaStream_t native(StreamHandle stream) { return reinterpret_cast<cudaStream_t>(stream); }

// For destructors. Where the driver is gone there is nothing left to free.
template <typename F>
void quietly(const CudaContext& context, const F& release) noexcept {
  try {
    CudaScope scope(context);
    release();
  } catch (const Error&) {
  }
}

class CudaEvent final : public Event {
 public:
  CudaEvent(const CudaContext& context, bool is_timed) : timed(is_timed), context_(context) {
    CudaScope scope(context_);
    WSM_CUDA_CHECK(
        cudaEventCreateWithFlags(&event_, timed ? cudaEventDefault : cudaEventDisableTiming));
  }
  ~CudaEvent() override {
    quietly(context_, [this] { WSM_CUDA_IGNORE(cudaEventDestroy(event_)); });
  }

  cudaEvent_t get() const { return event_; }
  const bool timed;

 private:
  const CudaContext& context_;
  cudaEvent_t event_ = nullptr;
};

const CudaEvent& cuda(const Event& event) { return static_cast<const CudaEvent&>(event); }

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(int index) : index_(index), context_(index) {
    CudaScope scope(context_);
    WSM_CUDA_CHECK(cudaStreamCreateWithFlags(&copy_stream_, cudaStreamNonBlocking));
  }

  ~CudaDevice() override {
    quietly(context_, [this] {
      WSM_CUDA_IGNORE(cudaStreamSynchronize(copy_stream_));
      WSM_CUDA_IGNORE(cudaStreamDestroy(copy_stream_));
    });
  }

  const char* kind() const override { return "cuda"; }
  int index() const override { return index_; }

  bool register_host(void* data, size_t bytes, std::string* why) override {
    CudaScope scope(context_);
    const cudaError_t error = cudaHostRegister(data, bytes, cudaHostRegisterPortable);
    if (error == cudaSuccess) {
      registrations_.add(data, bytes);
      return true;
    }
    cudaGetLastError();
    if (why) *why = concat("cudaHostRegister: ", cuda_text(error));
    return false;
  }

  void unregister_host(void* data) noexcept override {
    registrations_.remove(data);
    quietly(context_, [data] { WSM_CUDA_IGNORE(cudaHostUnregister(data)); });
  }

  void copy_to_device(void* target, const void* source, size_t bytes) override {
    CudaScope scope(context_);
    auto* to = static_cast<std::byte*>(target);
    auto* from = static_cast<const std::byte*>(source);
    while (bytes > 0) {
      const size_t part = registrations_.uniform_bytes(from, bytes);
      WSM_CUDA_CHECK(cudaMemcpyAsync(to, from, part, cudaMemcpyHostToDevice, copy_stream_));
      to += part;
      from += part;
      bytes -= part;
    }
  }

  void fill(void* target, uint8_t value, size_t bytes) override {
    CudaScope scope(context_);
    WSM_CUDA_CHECK(cudaMemsetAsync(target, value, bytes, copy_stream_));
  }

  StreamHandle copy_stream() const override { return reinterpret_cast<StreamHandle>(copy_stream_); }

  std::unique_ptr<Event> make_event(bool timed) override {
    return std::make_unique<CudaEvent>(context_, timed);
  }

  void record(Event& event, StreamHandle stream) override {
    CudaScope scope(context_);
    WSM_CUDA_CHECK(cudaEventRecord(cuda(event).get(), native(stream)));
  }

  void wait(StreamHandle stream, const Event& event) override {
    CudaScope scope(context_);
    WSM_CUDA_CHECK(cudaStreamWaitEvent(native(stream), cuda(event).get(), 0));
  }

  bool done(const Event& event) override {
    CudaScope scope(context_);
    const cudaError_t answer = cudaEventQuery(cuda(event).get());
    if (answer == cudaErrorNotReady) {
      cudaGetLastError();
      return false;
    }
    WSM_CUDA_CHECK(answer);
    return true;
  }

  double elapsed_seconds(const Event& begin, const Event& end) override {
    check(cuda(begin).timed && cuda(end).timed,
          "elapsed_seconds needs events that were made with timed=true");
    CudaScope scope(context_);
    float milliseconds = 0;
    WSM_CUDA_CHECK(cudaEventElapsedTime(&milliseconds, cuda(begin).get(), cuda(end).get()));
    return milliseconds * 1e-3;
  }

  void drain() override {
    CudaScope scope(context_);
    WSM_CUDA_CHECK(cudaStreamSynchronize(copy_stream_));
  }

 private:
  const int index_;
  CudaContext context_;
  cudaStream_t copy_stream_ = nullptr;
  Registrations registrations_;
};

// 13020 -> "13.2"
std::string version_text(int version) { return concat(version / 1000, ".", version % 1000 / 10); }

// The oldest driver of a major version of CUDA, as NVIDIA numbers its packages.
const char* least_driver() {
  if (CUDART_VERSION >= 13000) return "580";
  return CUDART_VERSION >= 12000 ? "525" : "450";
}

[[noreturn]] void throw_no_device(cudaError_t error) {
  int found = 0;
  if (cudaDriverGetVersion(&found) != cudaSuccess) found = 0;
  cudaGetLastError();
  const std::string driver =
      found == 0 ? "no NVIDIA driver was found"
                 : concat("the NVIDIA driver that was found supports CUDA ", version_text(found));
  const std::string advice =
      error == cudaErrorInsufficientDriver
          ? concat("install or update to driver ", least_driver(), " or newer")
          : std::string("check nvidia-smi and CUDA_VISIBLE_DEVICES");
  throw Error(concat("no CUDA device can be used (", cuda_text(error), "): ", driver,
                     "; this was built with CUDA ", version_text(CUDART_VERSION),
                     ", which needs driver ", least_driver(), " or newer: ", advice,
                     ", or use device=\"cpu\""));
}

}  // namespace

std::unique_ptr<Device> make_cuda_device(int index) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    cudaGetLastError();
    throw_no_device(error != cudaSuccess ? error : cudaErrorNoDevice);
  }
  check(index >= 0 && index < count, "cuda:", index, " does not exist: ", count,
        count == 1 ? " CUDA device is" : " CUDA devices are",
        " visible, counted from cuda:0 (CUDA_VISIBLE_DEVICES chooses which)");
  return std::make_unique<CudaDevice>(index);
}

bool built_with_cuda() { return true; }

}  // namespace wsm

#endif  // WSM_WITH_CUDA
