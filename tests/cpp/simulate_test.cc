#include "plan/simulate.h"

#include <gtest/gtest.h>

#include <random>

#include "plan/planner.h"
#include "support/contains.h"
#include "support/models.h"
#include "util/align.h"
#include "util/check.h"

namespace wsm {
namespace {

using testing::contains;
using testing::random_model;
using testing::uniform_model;

constexpr uint64_t kChunk = 1000;

// Units of chunks of 1000 bytes each, one copy a chunk.
class PlanBuilder {
 public:
  Plan plan;

  PlanBuilder(uint32_t slots, uint32_t lookahead) {
    plan.chunk_bytes = kChunk;
    plan.slot_count = slots;
    plan.lookahead_units = lookahead;
    plan.read_ahead_bytes = UINT64_MAX;
  }

  // One home for each of its chunks.
  void unit(uint64_t place_offset, const std::vector<Home>& homes) {
    UnitPlan& unit = plan.units.emplace_back();
    unit.place_offset = place_offset;
    unit.place_bytes = homes.size() * kChunk;
    unit.streamed_bytes = unit.place_bytes;
    unit.first_chunk = static_cast<uint32_t>(plan.chunks.size());
    unit.chunk_count = static_cast<uint32_t>(homes.size());
    for (const Home home : homes) {
      Chunk& chunk = plan.chunks.emplace_back();
      chunk.unit = static_cast<uint32_t>(plan.units.size() - 1);
      chunk.read_bytes = chunk.need_bytes = chunk.payload_bytes = kChunk;
      chunk.home = home;
      chunk.first_copy = static_cast<uint32_t>(plan.copies.size());
      chunk.copy_count = 1;
      const uint64_t at = place_offset + (plan.chunks.size() - 1 - unit.first_chunk) * kChunk;
      plan.copies.push_back({.target_offset = at, .bytes = kChunk});
      if (home != Home::kHost) continue;
      chunk.cache_offset = plan.cache_bytes;
      plan.cache_bytes += kChunk;
    }
    plan.first_resident_chunk = static_cast<uint32_t>(plan.chunks.size());
  }
};

// 1 s to read a chunk, 0.1 s to copy it, unless said otherwise.
Rates rates(double read_s = 1, double copy_s = 0.1, std::vector<double> compute_s = {}) {
  return {.disk_bytes_per_s = kChunk / read_s,
          .h2d_bytes_per_s = kChunk / copy_s,
          .copy_overhead_s = 0,
          .unit_overhead_s = 0,
          .compute_s = std::move(compute_s)};
}

const std::vector<Home> kTwoCached(2, Home::kHost);
const std::vector<Home> kTwoOnDisk(2, Home::kDisk);

TEST(Simulate, CopiesAloneTakeWhatTheLinkTakes) {
  PlanBuilder b(4, 1);
  for (int i = 0; i < 4; ++i) b.unit(i % 2 * 2000, kTwoCached);
  const Simulated s = simulate(b.plan, rates());
  EXPECT_NEAR(s.pass_s, 8 * 0.1, 1e-9);
  EXPECT_NEAR(s.h2d_s, 8 * 0.1, 1e-9);
  EXPECT_EQ(s.h2d_bytes, 8000u);
  EXPECT_EQ(s.disk_bytes, 0u);
  EXPECT_EQ(s.bottleneck, Bottleneck::kH2d);
  EXPECT_NEAR(s.h2d_stall_s, 0.8, 1e-9);
}

// Chunks that touch in the cache and on the device are one copy, but not beyond their unit.
TEST(Simulate, OverheadsCountForEachCopyAndEachLoad) {
  PlanBuilder b(4, 1);
  for (int i = 0; i < 4; ++i) b.unit(i % 2 * 2000, kTwoCached);
  Rates r = rates();
  r.copy_overhead_s = 0.01;
  r.unit_overhead_s = 0.02;
  EXPECT_NEAR(simulate(b.plan, r).pass_s, 4 * (2 * 0.1 + 0.01 + 0.02), 1e-9);
  b.plan.chunks[1].cache_offset += 50;  // apart in the cache
  EXPECT_NEAR(simulate(b.plan, r).pass_s, 4 * (2 * 0.1 + 0.01 + 0.02) + 0.01, 1e-9);
  b.plan.copies[3].target_offset += 50;  // apart on the device
  EXPECT_NEAR(simulate(b.plan, r).pass_s, 4 * (2 * 0.1 + 0.01 + 0.02) + 0.02, 1e-9);
}

TEST(Simulate, WhatPassesThroughSlotsIsCopiedPieceByPiece) {
  PlanBuilder b(8, 1);
  for (int i = 0; i < 4; ++i) b.unit(i % 2 * 2000, kTwoOnDisk);
  Rates r = rates(0.01);
  r.copy_overhead_s = 0.01;
  EXPECT_NEAR(simulate(b.plan, r).h2d_s, 8 * 0.11, 1e-9);
}

TEST(Simulate, CopiesHideBehindCompute) {
  PlanBuilder b(4, 1);
  for (int i = 0; i < 4; ++i) b.unit(i % 2 * 2000, kTwoCached);
  const Simulated s = simulate(b.plan, rates(1, 0.1, {1, 1, 1, 1}));
  EXPECT_NEAR(s.pass_s, 4, 1e-9);
  EXPECT_EQ(s.bottleneck, Bottleneck::kCompute);
  EXPECT_NEAR(s.h2d_stall_s + s.disk_stall_s + s.arena_stall_s, 0, 1e-9);
}

// One place for all: a copy begins when the forward before it has ended.
TEST(Simulate, OnePlaceMakesCopiesAndForwardsTakeTurns) {
  PlanBuilder b(4, 1);
  for (int i = 0; i < 3; ++i) b.unit(0, kTwoCached);
  const Simulated s = simulate(b.plan, rates(1, 0.1, {1, 1, 1}));
  EXPECT_NEAR(s.pass_s, 3 * (1 + 0.2), 1e-9);
}

// Three units in two places: the last and the first share one, so they take turns at the seam.
TEST(Simulate, TheSeamOfAnOddCycleTakesTurns) {
  PlanBuilder b(4, 1);
  for (const uint64_t place : {0, 2000, 0}) b.unit(place, kTwoCached);
  const Simulated s = simulate(b.plan, rates(1, 0.1, {1, 1, 1}));
  EXPECT_NEAR(s.pass_s, 3 + 0.2, 1e-9);
  EXPECT_NEAR(s.arena_stall_s + s.h2d_stall_s, 0.2, 1e-9);
}

TEST(Simulate, AUnitWhosePlaceNobodyTakesIsLoadedOnce) {
  PlanBuilder b(4, 1);
  for (const uint64_t place : {0, 2000, 4000, 2000, 4000}) b.unit(place, kTwoCached);
  EXPECT_EQ(simulate(b.plan, rates()).h2d_bytes, 8000u);
}

TEST(Simulate, ReadsAloneTakeWhatTheDiskTakes) {
  PlanBuilder b(4, 1);
  for (int i = 0; i < 4; ++i) b.unit(i % 2 * 2000, kTwoOnDisk);
  const Simulated s = simulate(b.plan, rates());
  EXPECT_NEAR(s.pass_s, 8, 1e-6);
  EXPECT_NEAR(s.disk_s, 8, 1e-9);
  EXPECT_EQ(s.disk_bytes, 8000u);
  EXPECT_EQ(s.bottleneck, Bottleneck::kDisk);
  EXPECT_NEAR(s.disk_stall_s + s.h2d_stall_s, 8, 1e-6);
}

// Two slots, one of them kept for demands: a read waits for the copy out of the other.
TEST(Simulate, OneSlotMakesReadsAndCopiesTakeTurns) {
  PlanBuilder b(2, 1);
  for (int i = 0; i < 4; ++i) b.unit(i % 2 * 2000, kTwoOnDisk);
  EXPECT_NEAR(simulate(b.plan, rates()).pass_s, 8 * 1.1, 1e-9);
}

// The disk works through the forwards: 4 chunks in 4 s, where forwards take 8 s.
TEST(Simulate, TheDiskReadsAheadWhileComputing) {
  PlanBuilder b(8, 1);
  for (int i = 0; i < 4; ++i) b.unit(i % 2 * 2000, {Home::kDisk, Home::kHost});
  const Simulated s = simulate(b.plan, rates(1, 0.1, {2, 2, 2, 2}));
  EXPECT_NEAR(s.pass_s, 8, 1e-9);
  EXPECT_EQ(s.disk_bytes, 4000u);
}

// Bytes spread evenly need little lookahead; in one heap they need slots for all of it.
TEST(Simulate, BytesOfTheDiskInOneHeapStall) {
  PlanBuilder even(3, 1), heap(3, 1);
  for (int i = 0; i < 4; ++i) even.unit(i % 2 * 2000, {Home::kDisk, Home::kHost});
  for (int i = 0; i < 4; ++i) heap.unit(i % 2 * 2000, i < 2 ? kTwoOnDisk : kTwoCached);
  const Rates r = rates(1, 0.1, {1, 1, 1, 1});
  EXPECT_NEAR(simulate(even.plan, r).pass_s, 4, 0.11);
  EXPECT_GT(simulate(heap.plan, r).pass_s, 4.5);
}

TEST(Simulate, TheFirstPassReadsWhatTheCacheWillKeep) {
  PlanBuilder b(4, 1);
  for (int i = 0; i < 4; ++i) b.unit(i % 2 * 2000, {Home::kDisk, Home::kHost});
  const Simulated s = simulate(b.plan, rates());
  EXPECT_NEAR(s.first_pass_s, 8.1, 0.01);
  EXPECT_NEAR(s.pass_s, 4, 1e-6);
}

TEST(Simulate, ReadsStayWithinTheirWindow) {
  PlanBuilder b(64, 1);
  for (int i = 0; i < 4; ++i) b.unit(i % 2 * 2000, kTwoOnDisk);
  Rates r = rates(1, 0.1, {4, 0, 4, 0});
  r.host_computes = true;
  const double free_s = simulate(b.plan, r).pass_s;
  b.plan.read_ahead_bytes = 0;
  EXPECT_NEAR(free_s, 8, 0.5);
  EXPECT_GT(simulate(b.plan, r).pass_s, free_s + 0.5);
}

TEST(Simulate, AnOrderMayRepeatAndSkipUnits) {
  PlanBuilder b(4, 1);
  for (int i = 0; i < 4; ++i) b.unit(i % 2 * 2000, kTwoCached);
  const Simulated s = simulate(b.plan, rates(), {0, 1, 0, 1, 1});
  EXPECT_EQ(s.h2d_bytes, 0u);                                        // both stay in their places
  EXPECT_EQ(simulate(b.plan, rates(), {0, 1, 2}).h2d_bytes, 4000u);  // 1 stays
}

TEST(Simulate, WhereTheHostComputesAcquiresWaitForForwards) {
  PlanBuilder b(4, 1);
  for (int i = 0; i < 4; ++i) b.unit(i % 2 * 2000, kTwoCached);
  Rates r = rates(1, 0.1, {1, 1, 1, 1});
  r.host_computes = true;
  EXPECT_NEAR(simulate(b.plan, r).pass_s, 4, 1e-9);
}

TEST(Simulate, RefusesWhatMakesNoSense) {
  PlanBuilder b(4, 1);
  b.unit(0, kTwoCached);
  Rates r = rates();
  r.disk_bytes_per_s = 0;
  EXPECT_THROW(simulate(b.plan, r), InvalidArgument);
  EXPECT_THROW(simulate(b.plan, rates(1, 1, {1, 1})), InvalidArgument);
  EXPECT_THROW(simulate(b.plan, rates(1, 1, {-1})), InvalidArgument);
  EXPECT_THROW(simulate(b.plan, rates(), {1}), InvalidArgument);
}

// Whatever the model and the budgets: a pass is never faster than any of its links, and reads no
// more than the plan says.
TEST(Simulate, APassIsNeverFasterThanItsSlowestLink) {
  int planned = 0;
  for (uint64_t i = 0; i < 600; ++i) {
    std::mt19937_64 random(i);
    const ModelSpec spec = random_model(random, 4 * kMiB);
    PlanLimits limits{.device_bytes = random() % (64 * kMiB), .host_bytes = random() % (64 * kMiB)};
    if (random() % 2) limits.home_bytes = 0;
    Plan plan;
    try {
      plan = make_plan(spec, limits);
    } catch (const InvalidArgument&) {
      continue;
    }
    ++planned;
    Rates r = rates(1e-3 * static_cast<double>(1 + random() % 100), 1e-4);
    for (size_t u = 0; u < plan.units.size(); ++u) {
      r.compute_s.push_back(static_cast<double>(random() % 1000) * 1e-3);
    }
    const Simulated s = simulate(plan, r);
    const double slowest = std::max({s.disk_s, s.h2d_s, s.compute_s});
    EXPECT_GE(s.pass_s, slowest * (1 - 1e-6)) << "model " << i;
    EXPECT_LE(s.pass_s, (s.disk_s + s.h2d_s + s.compute_s) * (1 + 1e-6) + 1e-9) << "model " << i;
    EXPECT_LE(s.disk_bytes, plan.disk_home_bytes);
    EXPECT_LE(s.h2d_bytes, plan.host_home_bytes + plan.disk_home_bytes);
    EXPECT_NEAR(s.disk_stall_s + s.h2d_stall_s + s.arena_stall_s, s.pass_s - s.compute_s,
                1e-6 * s.pass_s + 1e-9);
  }
  EXPECT_GT(planned, 100);
}

}  // namespace
}  // namespace wsm
