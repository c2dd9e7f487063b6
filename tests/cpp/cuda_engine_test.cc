// The engine on a GPU that fails as the test wants. Skipped where no GPU answers; with
// WSM_REQUIRE_GPU=1 that is a failure.
#ifdef WSM_WITH_CUDA

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <span>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "support/failing_device.h"
#include "support/streamed_model.h"
#include "support/temp_file.h"
#include "util/align.h"

namespace wsm {
namespace {

using testing::DeviceLedger;
using testing::FailingDevice;
using testing::StreamedModel;

constexpr uint64_t kChunk = 64 * kKiB;

class CudaEngineTest : public ::testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
      cudaGetLastError();
      if (std::getenv("WSM_REQUIRE_GPU")) FAIL() << "WSM_REQUIRE_GPU=1, and no GPU answers";
      GTEST_SKIP() << "no GPU answers";
    }
    PlanLimits limits;
    limits.device_bytes = 64 * kMiB;
    limits.arena_bytes = 2 * model_.largest_unit_bytes() + 8 * kKiB;
    limits.home_bytes = 0;
    limits.staging_bytes = 4 * kChunk;
    limits.cache_bytes = 4 * kChunk;
    limits.host_bytes = 8 * kChunk;
    limits.chunk_bytes = kChunk;
    plan_ = model_.plan(limits);
    ASSERT_EQ(cudaMalloc(&arena_, plan_.arena_bytes), cudaSuccess);
  }
  void TearDown() override {
    if (arena_ == nullptr) return;  // skipped
    close();
    EXPECT_EQ(cudaFree(arena_), cudaSuccess);
    EXPECT_EQ(cudaPeekAtLastError(), cudaSuccess) << "an error is left";
    EXPECT_EQ(ledger_.events, 0);
    EXPECT_EQ(ledger_.registered_bytes, 0u);
  }

  void close() { engine_.reset(); }
  Engine& open() {
    close();
    const std::vector<const void*> memory(model_.spec().shards.size(), nullptr);
    Handoff handoff{.device = std::make_unique<FailingDevice>(make_cuda_device(0), ledger_)};
    engine_ = std::make_unique<Engine>(model_.spec(), plan_, std::move(handoff),
                                       static_cast<std::byte*>(arena_), std::vector<HomeMemory>{},
                                       memory, StreamHandle{0}, EngineOptions{});
    return *engine_;
  }

  // One pass on the default stream. The names of the tensors whose bytes are wrong.
  std::string pass() {
    std::string wrong;
    engine_->begin_pass(0);
    for (uint32_t unit = 0; unit < model_.spec().units.size(); ++unit) {
      engine_->acquire(unit, 0, {});
      wrong += wrong_bytes(unit);
      engine_->release(unit, 0);
    }
    engine_->end_pass(0);
    return wrong;
  }

  StreamedModel model_;
  Plan plan_;
  DeviceLedger ledger_;

 private:
  // By a copy on the default stream, which waits for what the unit's acquire made it wait for.
  std::string wrong_bytes(uint32_t unit) const {
    const UnitPlan& planned = plan_.units[unit];
    std::string wrong;
    for (size_t t = 0; t < planned.tensors.size(); ++t) {
      const TensorSpec& tensor = model_.spec().tensors[model_.spec().units[unit].tensors[t]];
      std::vector<std::byte> found(tensor.bytes);
      const auto* place = static_cast<std::byte*>(arena_) + planned.tensors[t].image_offset;
      EXPECT_EQ(cudaMemcpy(found.data(), place, found.size(), cudaMemcpyDeviceToHost), cudaSuccess);
      for (const Extent& extent : tensor.extents) {
        const std::span<const std::byte> part(found.data() + extent.tensor_offset, extent.bytes);
        if (testing::first_mismatch(part, extent.offset, extent.shard) < part.size()) {
          wrong += " " + tensor.name;
        }
      }
    }
    return wrong;
  }

  void* arena_ = nullptr;
  std::unique_ptr<Engine> engine_;
};

TEST_F(CudaEngineTest, AnErrorInACopyIsThrown_AndTheNextEngineIsRight) {
  open();
  ASSERT_EQ(pass(), "");
  const uint64_t copies = ledger_.copies;
  ASSERT_GT(copies, 3u);
  for (const uint64_t failing : {uint64_t{1}, copies / 2, copies}) {
    SCOPED_TRACE(failing);
    close();
    ledger_.copies = 0;
    ledger_.fail_at_copy = failing;
    open();
    for (int attempt = 0; attempt < 2; ++attempt) {
      try {
        // The copies of a second pass come before an error in the last of a first one.
        for (int passes = 0; passes < 3; ++passes) EXPECT_EQ(pass(), "");
        FAIL() << "no error";
      } catch (const Error& error) {
        EXPECT_NE(std::string(error.what()).find("the device is broken"), std::string::npos)
            << error.what();
      }
    }
    ledger_.fail_at_copy = UINT64_MAX;
    open();
    EXPECT_EQ(pass(), "");
  }
}

TEST_F(CudaEngineTest, WhatCannotBePinnedIsCopiedAllTheSame) {
  for (const uint64_t most : {uint64_t{0}, 4 * kChunk}) {
    SCOPED_TRACE(most);
    ledger_.most_registered_bytes = most;
    const Engine& engine = open();
    for (int passes = 0; passes < 3; ++passes) EXPECT_EQ(pass(), "");
    EXPECT_EQ(engine.memory().host_pinned_bytes, ledger_.registered_bytes);
    EXPECT_LE(ledger_.registered_bytes, most);
    ASSERT_FALSE(engine.warnings().empty());
    EXPECT_NE(engine.warnings()[0].find("stay pageable"), std::string::npos);
  }
}

// The device's clock and the host's agree: nothing is copied before any of it was read, nor used
// before it was copied, nor ends after the trace did.
TEST_F(CudaEngineTest, ATraceHasTheDevicesTimesOnTheHostsClock) {
  plan_.lookahead_units = 0;  // each unit is read when it is asked for
  plan_.read_ahead_bytes = 0;
  Engine& engine = open();
  const auto begin = Trace::Clock::now();
  engine.start_trace(0, 10'000, {});
  ASSERT_EQ(pass(), "");
  const Timeline timeline = engine.stop_trace({});
  const std::chrono::nanoseconds took = Trace::Clock::now() - begin;
  RecordProperty("clock_error_ns", static_cast<int>(timeline.clock_error_ns));
  const int64_t slack_ns = timeline.clock_error_ns + 20'000;
  EXPECT_LE(timeline.length_ns, took.count() + slack_ns);
  for (uint32_t unit = 0; unit < model_.spec().units.size(); ++unit) {
    SCOPED_TRACE(unit);
    int64_t read_ns = INT64_MAX, copy_ns = INT64_MAX, copied_ns = 0, used_ns = INT64_MAX;
    for (const TraceRecord& record : timeline.records) {
      if (record.unit != unit) continue;
      EXPECT_GE(record.begin_ns, 0);
      EXPECT_LE(record.begin_ns, record.end_ns);
      if (record.kind == TraceKind::kRead) read_ns = std::min(read_ns, record.end_ns);
      if (record.kind == TraceKind::kForward) used_ns = record.begin_ns;
      if (record.kind != TraceKind::kCopy) continue;
      copy_ns = std::min(copy_ns, record.begin_ns);
      copied_ns = std::max(copied_ns, record.end_ns);
    }
    EXPECT_LE(read_ns, copy_ns + slack_ns);
    EXPECT_LT(copy_ns, copied_ns);
    EXPECT_LE(copied_ns, used_ns);
    EXPECT_LT(used_ns, INT64_MAX);
  }
}

}  // namespace
}  // namespace wsm

#endif  // WSM_WITH_CUDA
