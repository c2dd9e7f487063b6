// The engine over a device whose streams run out of step: kernels that run late read the right
// bytes, whatever the engine has enqueued since.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "engine/engine.h"
#include "support/async_device.h"
#include "support/kernels.h"
#include "support/streamed_model.h"
#include "util/align.h"

namespace wsm {
namespace {

using testing::AsyncDevice;
using testing::AsyncGpu;
using testing::Kernels;
using testing::StreamedModel;

constexpr uint64_t kChunk = 64 * kKiB;
constexpr StreamHandle kFirst = 2, kSecond = 3;

// A model on a GPU of its own, with kernels that check.
class Scene {
 public:
  // `arena_units`: in largest units; `cached`: fraction of the model.
  Scene(uint64_t seed, double arena_units, double cached, uint32_t slots = 4)
      : gpu(std::make_shared<AsyncGpu>(seed)), model(seed), kernels(gpu, model) {
    PlanLimits limits;
    limits.device_bytes = 64 * kMiB;
    const uint64_t unit = model.largest_unit_bytes() + 4 * kKiB;
    limits.arena_bytes = static_cast<uint64_t>(arena_units * static_cast<double>(unit));
    limits.home_bytes = 0;
    limits.chunk_bytes = kChunk;
    limits.staging_bytes = slots * kChunk;
    limits.cache_bytes = static_cast<uint64_t>(cached * static_cast<double>(model.bytes()));
    limits.host_bytes = *limits.staging_bytes + *limits.cache_bytes;
    EngineOptions options;
    options.poison = seed % 2 == 0;
    model.open(model.plan(limits), options, std::make_unique<AsyncDevice>(gpu));
  }
  ~Scene() {
    gpu->synchronize();
    model.close();
  }
  Engine& engine() { return model.engine(); }

  const std::shared_ptr<AsyncGpu> gpu;
  StreamedModel model;
  Kernels kernels;
};

TEST(AsyncEngine, EveryKernelReadsTheRightBytes) {
  for (uint64_t seed = 0; seed < 24; ++seed) {
    SCOPED_TRACE(seed);
    Scene scene(seed, 1.02 + static_cast<double>(seed % 3), 0.3 * static_cast<double>(seed % 4),
                2 + seed % 5);
    std::mt19937_64 random(seed);
    std::vector<uint32_t> order = scene.model.all_units();
    for (int pass = 0; pass < 8; ++pass) {
      if (seed % 3 == 2) std::shuffle(order.begin(), order.end(), random);
      scene.kernels.pass(order, kFirst + random() % 3);
    }
    ASSERT_EQ(scene.kernels.wrong(), "");
    EXPECT_EQ(scene.kernels.ran(), 8 * 8 * 3u);
  }
}

TEST(AsyncEngine, AUnitMayBeUsedOnSeveralStreamsAtOnce) {
  for (uint64_t seed = 0; seed < 24; ++seed) {
    SCOPED_TRACE(seed);
    Scene scene(seed, 1.02, 0.5);
    for (int pass = 0; pass < 6; ++pass) {
      scene.engine().begin_pass(kFirst);
      for (const uint32_t unit : scene.model.all_units()) {
        for (const StreamHandle stream : {kFirst, kSecond}) {
          scene.engine().acquire(unit, stream, {});
          scene.kernels.read(unit, stream);
        }
        for (const StreamHandle stream : {kSecond, kFirst}) scene.engine().release(unit, stream);
      }
      scene.engine().end_pass(kFirst);
    }
    ASSERT_EQ(scene.kernels.wrong(), "");
  }
}

// What an aborted pass has enqueued still reads its units when the next pass begins, on another
// stream.
TEST(AsyncEngine, AnAbortedPassIsRecoveredOnItsOwnStreams) {
  for (uint64_t seed = 0; seed < 60; ++seed) {
    SCOPED_TRACE(seed);
    Scene scene(seed, 1.02, 1);
    std::mt19937_64 random(seed);
    for (int pass = 0; pass < 6; ++pass) {
      const StreamHandle stream = kFirst + static_cast<StreamHandle>(pass) % 3;
      scene.engine().begin_pass(stream);
      const auto unit = static_cast<uint32_t>(random() % 8);
      scene.engine().acquire(unit, stream, {});
      for (int kernel = 0; kernel < 10; ++kernel) scene.kernels.read(unit, stream);
      // Neither released nor ended.
    }
    ASSERT_EQ(scene.kernels.wrong(), "");
  }
}

// Kernels may still run when the engine is closed: the arena is the caller's.
TEST(AsyncEngine, CloseWaitsForNoKernelAndSpoilsNone) {
  for (uint64_t seed = 0; seed < 24; ++seed) {
    Scene scene(seed, 2.05, 0.5);
    scene.kernels.pass(scene.model.all_units(), kFirst);
    scene.engine().close();
    ASSERT_EQ(scene.kernels.wrong(), "") << seed;
  }
}

TEST(AsyncEngine, ReportsComeWhenTheDeviceHasEndedThePass) {
  Scene scene(1, 2.05, 0.5);
  for (int pass = 0; pass < 4; ++pass) {
    scene.kernels.pass(scene.model.all_units(), kFirst);
    const PassReport report = scene.engine().last_pass({});
    EXPECT_GT(report.seconds, 0);
    EXPECT_EQ(scene.gpu->pending(kFirst), 0u);
  }
  EXPECT_EQ(scene.engine().steady_passes().passes, 3u);
  EXPECT_EQ(scene.kernels.wrong(), "");
}

}  // namespace
}  // namespace wsm
