// Disk to device through the real engine, without Python: what the engine itself reaches, and what
// an acquire and a release cost the host when nothing has to be waited for.
//
// Method: the file is taken as `--units` equal units; the plan is make_plan's, with an arena of
// `--arena-units`. A pass acquires and releases every unit with no compute between. The clock runs
// over `--passes` passes back to back, until the device has ended the last. Files on a disk are
// dropped from the page cache before each run, unless --cold 0. A last pass compares the first and
// the last bytes of each unit on the device with the file's. The host's cost is measured by a
// second engine over small units that all stay in the arena: after the first pass nothing moves.
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <thread>

#include "engine/engine.h"
#include "harness.h"
#include "plan/planner.h"
#include "util/align.h"
#ifdef WSM_WITH_CUDA
#include <cuda_runtime.h>
#endif

namespace wsm::bench {
namespace {

constexpr uint64_t kCompareBytes = 4096;
constexpr uint32_t kSmallUnits = 64;
constexpr uint64_t kSmallUnitBytes = 64 * kKiB;

#ifdef WSM_WITH_CUDA
void cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw Error(concat(what, ": ", cudaGetErrorString(status)));
}
#endif

// Device memory for the arena and the compute stream, on either device.
class Target {
 public:
  Target(bool on_cuda, uint64_t bytes) : on_cuda_(on_cuda), bytes_(std::max<uint64_t>(bytes, 1)) {
#ifdef WSM_WITH_CUDA
    if (on_cuda_) {
      void* data = nullptr;
      cuda(cudaMalloc(&data, bytes_), "device memory");
      data_ = static_cast<std::byte*>(data);
      cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream");
      return;
    }
#endif
    check(!on_cuda_, "this build has no CUDA; take --device cpu");
    void* const data =
        mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check<OutOfMemory>(data != MAP_FAILED, "cannot map an arena of ", bytes_,
                       " bytes: ", errno_text(errno));
    std::memset(data, 1, bytes_);  // page faults are not the copies' time
    data_ = static_cast<std::byte*>(data);
  }
  ~Target() {
#ifdef WSM_WITH_CUDA
    if (on_cuda_) {
      cudaStreamDestroy(stream_);
      cudaFree(data_);
      return;
    }
#endif
    munmap(data_, bytes_);
  }
  Target(const Target&) = delete;
  Target& operator=(const Target&) = delete;

  std::byte* data() const { return data_; }
  StreamHandle stream() const {
#ifdef WSM_WITH_CUDA
    if (on_cuda_) return reinterpret_cast<StreamHandle>(stream_);
#endif
    return 0;
  }
  // What a kernel that is enqueued on `stream` now would see.
  void read_back(void* out, uint64_t offset, uint64_t bytes) const {
#ifdef WSM_WITH_CUDA
    if (on_cuda_) {
      cuda(cudaMemcpyAsync(out, data_ + offset, bytes, cudaMemcpyDeviceToHost, stream_),
           "readback");
      cuda(cudaStreamSynchronize(stream_), "readback");
      return;
    }
#endif
    std::memcpy(out, data_ + offset, bytes);
  }

 private:
  bool on_cuda_;
  uint64_t bytes_;
  std::byte* data_ = nullptr;
#ifdef WSM_WITH_CUDA
  cudaStream_t stream_ = nullptr;
#endif
};

struct Settings {
  std::string path;
  bool on_cuda = false;
  uint64_t unit_bytes = 0;
  uint32_t units = 0;
  uint32_t arena_units = 0;
  PlanLimits limits;
  EngineOptions options;
};

// Units back to back from the file's begin, each one tensor.
ModelSpec make_spec(const Settings& settings, uint64_t file_bytes) {
  check(settings.units > 0 && settings.unit_bytes > 0, "--units and --unit-mb must be at least 1");
  check(file_bytes >= settings.units * settings.unit_bytes, settings.path, " has ", file_bytes,
        " bytes, fewer than ", settings.units, " units of ", settings.unit_bytes,
        "; lower --units or --unit-mb");
  ModelSpec spec;
  spec.shards.push_back(
      {settings.path, file_bytes, direct_alignment(settings.path), lies_in_memory(settings.path)});
  for (uint32_t u = 0; u < settings.units; ++u) {
    const std::string name = concat("unit", u);
    spec.tensors.push_back(
        {name, settings.unit_bytes, {{0, u * settings.unit_bytes, settings.unit_bytes, 0}}});
    spec.units.push_back({name, concat("layer=", u), {u}, false});
  }
  return spec;
}

PlanLimits with_arena(PlanLimits limits, uint64_t unit_bytes, uint32_t arena_units) {
  const uint64_t arena = align_up(unit_bytes, kTensorAlignment) * arena_units;
  limits.arena_bytes = arena;
  limits.home_bytes = 0;
  limits.device_bytes = device_block_bytes(arena);
  return limits;
}

// The engine with all that must outlive it.
class Pipeline {
 public:
  Pipeline(const Settings& settings, uint64_t file_bytes)
      : spec_(make_spec(settings, file_bytes)),
        plan_(make_plan(spec_,
                        with_arena(settings.limits, settings.unit_bytes, settings.arena_units))),
        target_(settings.on_cuda, plan_.arena_bytes),
        engine_(spec_, plan_,
                Handoff{.device = settings.on_cuda ? make_cuda_device(0) : make_host_device()},
                target_.data(), {}, {nullptr}, target_.stream(), settings.options) {}

  // Acquire and release of every unit, `passes` times; seconds until the device has ended.
  double run(uint64_t passes) {
    const double begin = now_seconds();
    for (uint64_t pass = 0; pass < passes; ++pass) enqueue_pass();
    engine_.last_pass({});
    return now_seconds() - begin;
  }

  void enqueue_pass() {
    engine_.begin_pass(target_.stream());
    for (uint32_t u = 0; u < plan_.units.size(); ++u) {
      engine_.acquire(u, target_.stream(), {});
      engine_.release(u, target_.stream());
    }
    engine_.end_pass(target_.stream());
  }

  // Throws when a unit on the device is not what the file has.
  void verify(const Shard& shard) {
    engine_.begin_pass(target_.stream());
    for (uint32_t u = 0; u < plan_.units.size(); ++u) {
      engine_.acquire(u, target_.stream(), {});
      const Extent& extent = spec_.tensors[u].extents[0];
      const uint64_t count = std::min(kCompareBytes, extent.bytes);
      for (const uint64_t at : {uint64_t{0}, extent.bytes - count}) {
        compare(shard, u, extent.offset + at, plan_.units[u].tensors[0].offset + at, count);
      }
      engine_.release(u, target_.stream());
    }
    engine_.end_pass(target_.stream());
    engine_.last_pass({});
  }

  Engine& engine() { return engine_; }
  const Plan& plan() const { return plan_; }

 private:
  void compare(const Shard& shard, uint32_t unit, uint64_t in_file, uint64_t in_arena,
               uint64_t count) const {
    std::vector<char> wanted(count), arrived(count);
    const ssize_t got =
        pread(shard.buffered_fd(), wanted.data(), count, static_cast<off_t>(in_file));
    check<IoError>(got == static_cast<ssize_t>(count), "cannot read ", shard.path());
    target_.read_back(arrived.data(), in_arena, count);
    check<Error>(std::memcmp(wanted.data(), arrived.data(), count) == 0, "unit ", unit,
                 " differs on the device from ", shard.path(), " at ", in_file);
  }

  ModelSpec spec_;
  Plan plan_;
  Target target_;
  Engine engine_;
};

// Over one run: what came from the file, and what crossed the link to the device.
struct Run {
  double disk_gb_per_second = 0;
  double h2d_gb_per_second = 0;
  Counts counts;
};

Run measure(Pipeline& pipeline, const Shard& shard, bool cold, uint64_t passes) {
  if (cold) shard.drop_from_page_cache(0, shard.bytes());
  const Counts before = pipeline.engine().totals();
  const double seconds = pipeline.run(passes);
  Run run;
  run.counts = pipeline.engine().totals().since(before);
  run.disk_gb_per_second = static_cast<double>(run.counts.disk_bytes) / seconds / 1e9;
  run.h2d_gb_per_second = static_cast<double>(run.counts.h2d_bytes) / seconds / 1e9;
  return run;
}

// Host microseconds of an acquire and a release when the unit is in its place already.
std::vector<double> measure_host(Settings settings, uint64_t file_bytes, uint64_t passes) {
  settings.unit_bytes = kSmallUnitBytes;
  settings.units = settings.arena_units =
      static_cast<uint32_t>(std::min<uint64_t>(kSmallUnits, file_bytes / kSmallUnitBytes));
  check(settings.units > 1, settings.path, " is too small: ", file_bytes, " bytes");
  settings.limits = {};
  settings.limits.host_bytes = 16 * kMiB;
  settings.limits.lookahead_units = settings.units - 1;
  Pipeline pipeline(settings, file_bytes);
  pipeline.run(2);
  const uint64_t loads = pipeline.engine().totals().loads;
  std::vector<double> microseconds;
  for (uint64_t pass = 0; pass < passes; ++pass) {
    const double begin = now_seconds();
    pipeline.enqueue_pass();
    microseconds.push_back((now_seconds() - begin) * 1e6 / settings.units);
    pipeline.engine().last_pass({});
  }
  check<Error>(pipeline.engine().totals().loads == loads,
               "units were loaded again: the host's cost was not measured alone");
  return microseconds;
}

Settings read_settings(const Arguments& arguments) {
  Settings settings;
  settings.path = arguments.positional()[0];
  const std::string& device = arguments.text("device");
  check(device == "cpu" || device == "cuda", "--device is cpu or cuda, not ", device);
  settings.on_cuda = device == "cuda";
  settings.unit_bytes = arguments.number("unit-mb") * kMiB;
  settings.units = static_cast<uint32_t>(arguments.number("units"));
  settings.arena_units = static_cast<uint32_t>(arguments.number("arena-units"));
  check(settings.arena_units > 0, "--arena-units must be at least 1");
  const uint64_t cache = arguments.number("host-mb") * kMiB;
  const uint64_t staging = arguments.number("staging-mb") * kMiB;
  settings.limits.host_bytes = cache + staging;
  settings.limits.cache_bytes = cache;
  settings.limits.staging_bytes = staging;
  if (const uint64_t chunk = arguments.number("chunk-mb")) {
    settings.limits.chunk_bytes = chunk * kMiB;
  }
  const std::string& reader = arguments.text("reader");
  check(reader == "auto" || reader == "uring" || reader == "pread",
        "--reader is auto, uring or pread, not ", reader);
  settings.options.reader = reader == "auto"    ? ReaderChoice::kAuto
                            : reader == "uring" ? ReaderChoice::kUring
                                                : ReaderChoice::kPread;
  return settings;
}

JsonObject describe(const std::vector<double>& values) {
  const auto [least, most] = std::minmax_element(values.begin(), values.end());
  return JsonObject()
      .add("median", median(values))
      .add("min", *least)
      .add("max", *most)
      .add("samples", uint64_t{values.size()});
}

JsonObject describe(const Plan& plan) {
  return JsonObject()
      .add("arena_bytes", plan.arena_bytes)
      .add("cache_bytes", plan.cache_bytes)
      .add("staging_bytes", plan.staging_bytes())
      .add("chunk_bytes", plan.chunk_bytes)
      .add("lookahead_units", uint64_t{plan.lookahead_units})
      .add("host_home_bytes", plan.host_home_bytes)
      .add("disk_home_bytes", plan.disk_home_bytes)
      .add("warnings", plan.warnings);
}

int run(int argc, char** argv) {
  const Arguments arguments(argc, argv,
                            {{"unit-mb", "64"},
                             {"units", "8"},
                             {"arena-units", "2"},
                             {"host-mb", "0"},
                             {"staging-mb", "256"},
                             {"chunk-mb", "0"},
                             {"passes", "10"},
                             {"repeats", "3"},
                             {"reader", "auto"},
                             {"device", "cpu"},
                             {"cold", "1"},
                             {"json", ""}});
  check(arguments.positional().size() == 1,
        "usage: bench_pipeline FILE [--unit-mb 64] [--units 8] [--arena-units 2] [--host-mb 0] "
        "[--staging-mb 256] [--chunk-mb 0] [--passes 10] [--repeats 3] "
        "[--reader auto|uring|pread] [--device cpu|cuda] [--cold 1] [--json OUT]");
  const Settings settings = read_settings(arguments);
  const uint64_t passes = arguments.number("passes"), repeats = arguments.number("repeats");
  check(passes > 0 && repeats > 0, "--passes and --repeats must be at least 1");
  const std::unique_ptr<Shard> shard = Shard::open(settings.path, DirectMode::kAuto);
  const bool cold = arguments.number("cold") != 0;

  JsonObject out;
  std::vector<double> disk_rates, h2d_rates;
  uint64_t disk_bytes = 0, h2d_bytes = 0;
  {
    Pipeline pipeline(settings, shard->bytes());
    pipeline.run(1);  // fills the cache, where there is one
    for (uint64_t repeat = 0; repeat < repeats; ++repeat) {
      const Run one = measure(pipeline, *shard, cold, passes);
      disk_rates.push_back(one.disk_gb_per_second);
      h2d_rates.push_back(one.h2d_gb_per_second);
      disk_bytes += one.counts.disk_bytes;
      h2d_bytes += one.counts.h2d_bytes;
    }
    pipeline.verify(*shard);
    out.add("plan", describe(pipeline.plan()));
    for (const ShardReport& report : pipeline.engine().shards()) out.add("reader", report.why);
  }
  std::printf("%s to %s: %.2f GB/s from the file, %.2f GB/s to the device\n",
              cold ? "cold file" : "file", settings.on_cuda ? "cuda" : "cpu", median(disk_rates),
              median(h2d_rates));
  const std::vector<double> host = measure_host(settings, shard->bytes(), 100);
  std::printf("acquire and release, nothing to wait for: %.2f us\n", median(host));

  out.add("benchmark", "bench_pipeline").add("device", arguments.text("device"));
  out.add("unit_bytes", settings.unit_bytes).add("units", uint64_t{settings.units});
  out.add("passes", passes).add("cold", cold).add("disk_GB_per_s", describe(disk_rates));
  out.add("h2d_GB_per_s", describe(h2d_rates));
  out.add("disk_bytes", disk_bytes).add("h2d_bytes", h2d_bytes);
  out.add("acquire_release_us", describe(host));
  out.add("cores", uint64_t{std::thread::hardware_concurrency()});
  if (!arguments.text("json").empty()) write_json(arguments.text("json"), out);
  return 0;
}

}  // namespace
}  // namespace wsm::bench

int main(int argc, char** argv) {
  return wsm::bench::run_main("bench_pipeline", wsm::bench::run, argc, argv);
}
