// The link's ceiling, host to device, by chunk size, for pinned memory from every way we have and
// for pageable memory; and how fast memory can be pinned.
//
// Method (after nvbandwidth's): a kernel that spins on a flag holds the stream until all copies of
// a sample are enqueued, so that launching costs nothing; CUDA events around the copies; warm-up;
// the median of the samples; the bytes compared with the source afterwards. Copies from pageable
// memory block the host, so they cannot be held back: they are timed by events without the spin
// kernel. Pinning is timed on memory that the machine already has: it was touched and given back
// before.
#include <cuda_runtime.h>
#include <sys/mman.h>

#include <cstring>
#include <functional>
#include <memory>
#include <thread>

#include "device/device.h"
#include "harness.h"
#include "memory/pinned_buffer.h"
#include "util/align.h"

namespace wsm::bench {
namespace {

constexpr uint64_t kSpinLimitNs = 5'000'000'000;
constexpr uint64_t kMaxCopies =
    256;  // in one sample: a held stream takes about a thousand before launches block

void cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw Error(concat(what, ": ", cudaGetErrorString(status)));
}

__global__ void spin_until(const volatile int* flag, uint64_t limit_ns) {
  uint64_t begin = 0, now = 0;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
  do {
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (*flag == 0 && now - begin < limit_ns);
}

// Repeats after 8 * 65521 bytes, a prime number of words: no chunk size lines up with it.
constexpr uint64_t kPatternWords = 65521;
void fill_pattern(std::byte* data, uint64_t bytes) {
  std::vector<uint64_t> period(kPatternWords);
  uint64_t state = 0x9e3779b97f4a7c15;
  for (uint64_t& word : period) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    word = state;
  }
  for (uint64_t at = 0; at < bytes; at += kPatternWords * 8) {
    std::memcpy(data + at, period.data(), std::min(kPatternWords * 8, bytes - at));
  }
}

class Link {
 public:
  explicit Link(uint64_t bytes) : bytes_(bytes) {
    cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream");
    cuda(cudaEventCreate(&begin_), "event");
    cuda(cudaEventCreate(&end_), "event");
    cuda(cudaHostAlloc(&flag_, sizeof(int), cudaHostAllocMapped), "flag");
    cuda(cudaMalloc(&target_, bytes_), "device memory");
    cuda(cudaHostAlloc(&readback_, kReadbackBytes, cudaHostAllocDefault), "readback buffer");
  }
  ~Link() {
    cudaFree(target_);
    cudaFreeHost(readback_);
    cudaFreeHost(flag_);
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
    cudaStreamDestroy(stream_);
  }
  Link(const Link&) = delete;
  Link& operator=(const Link&) = delete;

  // GB/s of each sample, the warm-up left out; throws if a byte arrived wrong.
  std::vector<double> measure(const std::byte* source, uint64_t chunk, uint64_t samples,
                              bool hold) {
    cuda(cudaMemset(target_, 0xEE, bytes_), "clear");
    cuda(cudaDeviceSynchronize(), "clear");
    const uint64_t copies = std::clamp<uint64_t>(512 * kMiB / chunk, 1, kMaxCopies);
    std::vector<double> out;
    uint64_t at = 0, copied = 0;
    for (uint64_t sample = 0; sample <= samples; ++sample) {
      const double gb_per_second = one_sample(source, chunk, copies, hold, &at);
      copied += copies * chunk;
      if (sample > 0) out.push_back(gb_per_second);
    }
    verify(source, std::min(copied, bytes_ - bytes_ % chunk));
    return out;
  }

 private:
  static constexpr uint64_t kReadbackBytes = 64 * kMiB;

  double one_sample(const std::byte* source, uint64_t chunk, uint64_t copies, bool hold,
                    uint64_t* at) {
    volatile int* const flag = flag_;
    *flag = 0;
    const double enqueue_begin = now_seconds();
    if (hold) {
      spin_until<<<1, 1, 0, stream_>>>(flag_, kSpinLimitNs);
      cuda(cudaGetLastError(), "spin kernel");
    }
    cuda(cudaEventRecord(begin_, stream_), "event");
    for (uint64_t i = 0; i < copies; ++i) {
      if (*at + chunk > bytes_) *at = 0;
      cuda(cudaMemcpyAsync(target_ + *at, source + *at, chunk, cudaMemcpyHostToDevice, stream_),
           "copy");
      *at += chunk;
    }
    cuda(cudaEventRecord(end_, stream_), "event");
    check<Error>(!hold || now_seconds() - enqueue_begin < kSpinLimitNs * 0.9e-9,
                 "enqueuing took so long that the spin kernel gave up; the figure would be wrong");
    *flag = 1;
    cuda(cudaStreamSynchronize(stream_), "copies");
    float milliseconds = 0;
    cuda(cudaEventElapsedTime(&milliseconds, begin_, end_), "event");
    return static_cast<double>(copies * chunk) / (milliseconds * 1e-3) / 1e9;
  }

  void verify(const std::byte* source, uint64_t bytes) {
    for (uint64_t at = 0; at < bytes; at += kReadbackBytes) {
      const uint64_t count = std::min(kReadbackBytes, bytes - at);
      cuda(cudaMemcpy(readback_, target_ + at, count, cudaMemcpyDeviceToHost), "readback");
      check<Error>(std::memcmp(readback_, source + at, count) == 0,
                   "bytes differ after the copy, in [", at, ", +", count, ")");
    }
  }

  uint64_t bytes_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
  int* flag_ = nullptr;
  std::byte* target_ = nullptr;
  std::byte* readback_ = nullptr;
};

// A source of one kind, filled with the pattern; `release` frees it.
struct Source {
  std::string kind;
  std::byte* data = nullptr;
  bool hold = true;  // copies from it can be enqueued behind the spin kernel
  std::function<void()> release;
};

Source make_source(const std::string& kind, Device& device, uint64_t bytes,
                   std::vector<std::string>* warnings) {
  Source source{kind, nullptr, true, {}};
  if (kind == "pinned") {
    // One registration: CUDA refuses a raw copy that crosses two.
    auto buffer = std::make_shared<PinnedBuffer>(device, bytes, std::vector<uint64_t>{bytes});
    for (const std::string& text : buffer->warnings()) warnings->push_back(text);
    source.hold = buffer->pinned_bytes() >= bytes;
    source.data = buffer->data();
    source.release = [buffer]() mutable { buffer.reset(); };
  } else if (kind == "cudaHostAlloc") {
    void* data = nullptr;
    cuda(cudaHostAlloc(&data, bytes, cudaHostAllocDefault), "cudaHostAlloc");
    source.data = static_cast<std::byte*>(data);
    source.release = [data] { cudaFreeHost(data); };
  } else {
    void* const data =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check<OutOfMemory>(data != MAP_FAILED, "cannot map ", bytes, " bytes: ", errno_text(errno));
    source.data = static_cast<std::byte*>(data);
    source.hold = false;
    source.release = [data, bytes] { munmap(data, bytes); };
  }
  fill_pattern(source.data, bytes);
  return source;
}

std::vector<JsonObject> measure_link(Device& device, uint64_t bytes, uint64_t samples,
                                     std::vector<std::string>* warnings) {
  Link link(bytes);
  std::vector<JsonObject> results;
  for (const char* kind : {"pinned", "cudaHostAlloc", "pageable"}) {
    const Source source = make_source(kind, device, bytes, warnings);
    std::printf("%-14s", kind);
    for (const uint64_t chunk :
         {64 * kKiB, 256 * kKiB, kMiB, 4 * kMiB, 16 * kMiB, 64 * kMiB, 256 * kMiB, kGiB}) {
      if (chunk > bytes) continue;
      const std::vector<double> figures = link.measure(source.data, chunk, samples, source.hold);
      std::printf("  %s %.1f", format_bytes(chunk).c_str(), median(figures));
      std::fflush(stdout);
      results.push_back(JsonObject()
                            .add("kind", kind)
                            .add("chunk_bytes", chunk)
                            .add("GB_per_s", median(figures))
                            .add("min_GB_per_s", *std::min_element(figures.begin(), figures.end()))
                            .add("max_GB_per_s", *std::max_element(figures.begin(), figures.end()))
                            .add("samples", uint64_t{figures.size()})
                            .add("held", source.hold));
    }
    std::printf("  GB/s\n");
    source.release();
  }
  return results;
}

// Makes the machine give us the memory once: a virtual machine may grow its memory at first touch.
void touch_and_give_back(uint64_t bytes) {
  void* const data =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  check<OutOfMemory>(data != MAP_FAILED, "cannot map ", bytes,
                     " bytes to pin: ", errno_text(errno));
  madvise(data, bytes, MADV_HUGEPAGE);
  const uint64_t threads = std::clamp(std::thread::hardware_concurrency(), 1u, 16u);
  const uint64_t share = align_up(bytes / threads + 1, 2 * kMiB);
  std::vector<std::jthread> workers;
  for (uint64_t begin = 0; begin < bytes; begin += share) {
    workers.emplace_back(
        [=] { std::memset(static_cast<char*>(data) + begin, 1, std::min(share, bytes - begin)); });
  }
  workers.clear();
  munmap(data, bytes);
}

JsonObject measure_pinning(Device& device, uint64_t bytes, uint64_t repeats,
                           std::vector<std::string>* warnings) {
  touch_and_give_back(bytes);
  const double gib = static_cast<double>(bytes) / kGiB;
  std::vector<double> ours, theirs;
  uint64_t pinned = bytes;
  for (uint64_t repeat = 0; repeat < repeats; ++repeat) {
    double begin = now_seconds();
    {
      const PinnedBuffer buffer(device, bytes);
      ours.push_back(gib / (now_seconds() - begin));
      pinned = std::min(pinned, buffer.pinned_bytes());
      for (const std::string& text : buffer.warnings()) warnings->push_back(text);
    }
    begin = now_seconds();
    void* data = nullptr;
    cuda(cudaHostAlloc(&data, bytes, cudaHostAllocDefault), "cudaHostAlloc");
    theirs.push_back(gib / (now_seconds() - begin));
    cuda(cudaFreeHost(data), "cudaFreeHost");
  }
  const double ratio = median(ours) / median(theirs);
  std::printf("pinning %s: PinnedBuffer %.2f GiB/s, cudaHostAlloc %.2f GiB/s, ratio %.2f\n",
              format_bytes(bytes).c_str(), median(ours), median(theirs), ratio);
  return JsonObject()
      .add("bytes", bytes)
      .add("pinned_bytes", pinned)
      .add("repeats", repeats)
      .add("pinned_buffer_GiB_per_s", median(ours))
      .add("cudaHostAlloc_GiB_per_s", median(theirs))
      .add("ratio", ratio);
}

JsonObject describe_gpu(int index) {
  cudaDeviceProp properties{};
  int driver = 0, runtime = 0;
  cuda(cudaGetDeviceProperties(&properties, index), "device properties");
  cuda(cudaDriverGetVersion(&driver), "driver version");
  cuda(cudaRuntimeGetVersion(&runtime), "runtime version");
  return JsonObject()
      .add("name", properties.name)
      .add("memory_bytes", uint64_t{properties.totalGlobalMem})
      .add("driver_cuda", uint64_t(driver))
      .add("runtime_cuda", uint64_t(runtime))
      .add("cores", uint64_t{std::thread::hardware_concurrency()});
}

int run(int argc, char** argv) {
  const Arguments arguments(argc, argv,
                            {{"device", "0"},
                             {"buffer", "1GiB"},
                             {"samples", "7"},
                             {"pin", "8GiB"},
                             {"pin-repeats", "2"},
                             {"json", ""}});
  check(arguments.positional().empty(),
        "usage: bench_h2d [--device 0] [--buffer 1GiB] [--samples 7] [--pin 8GiB] "
        "[--pin-repeats 2] [--json OUT]; --pin 0 leaves the pinning out");
  const uint64_t samples = arguments.number("samples"), buffer = arguments.bytes("buffer");
  check(samples > 0 && arguments.number("pin-repeats") > 0,
        "--samples and --pin-repeats must be at least 1");
  check(buffer >= kMiB && buffer % kMiB == 0, "--buffer must be a multiple of 1 MiB");
  const int index = static_cast<int>(arguments.number("device"));
  cuda(cudaSetDevice(index), "device");
  const std::unique_ptr<Device> device = make_cuda_device(index);

  std::vector<std::string> warnings;
  JsonObject out;
  out.add("benchmark", "bench_h2d").add("gpu", describe_gpu(index)).add("buffer_bytes", buffer);
  out.add("link", measure_link(*device, buffer, samples, &warnings));
  if (arguments.bytes("pin") > 0) {
    out.add("pinning", measure_pinning(*device, arguments.bytes("pin"),
                                       arguments.number("pin-repeats"), &warnings));
  }
  out.add("warnings", warnings);
  for (const std::string& warning : warnings) std::printf("warning: %s\n", warning.c_str());
  if (!arguments.text("json").empty()) write_json(arguments.text("json"), out);
  return 0;
}

}  // namespace
}  // namespace wsm::bench

int main(int argc, char** argv) {
  return wsm::bench::run_main("bench_h2d", wsm::bench::run, argc, argv);
}
