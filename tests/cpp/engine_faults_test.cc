// The engine over faulty storage: the right bytes or a clear error, never a hang.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <random>
#include <set>
#include <thread>

#include "support/faulty_device.h"
#include "support/faulty_reader.h"
#include "support/streamed_model.h"
#include "support/wait_until.h"
#include "util/align.h"

namespace wsm {
namespace {

using testing::FaultyDevice;
using testing::FaultyDeviceOptions;
using testing::FaultyOptions;
using testing::FaultyReader;
using testing::StreamedModel;

constexpr uint64_t kChunk = 64 * kKiB;
// Of a read that gets lost. Where none does, the usual limit holds: a busy machine is not a fault.
constexpr double kLostLimit_s = 0.4;

PlanLimits small_limits(const StreamedModel& model, double cached, uint32_t slots = 4) {
  PlanLimits l;
  l.device_bytes = 64 * kMiB;
  l.arena_bytes = 2 * model.largest_unit_bytes() + 8 * kKiB;
  l.home_bytes = 0;
  l.staging_bytes = slots * kChunk;
  l.cache_bytes = static_cast<uint64_t>(cached * static_cast<double>(model.bytes()));
  l.host_bytes = *l.staging_bytes + *l.cache_bytes;
  l.chunk_bytes = kChunk;
  return l;
}

EngineOptions faulty(uint64_t seed, FaultyOptions options, double read_timeout_s = 30) {
  options.reader.block_bytes = 16 * kKiB;
  options.reader.requests = 8;
  EngineOptions engine;
  engine.poison = true;
  engine.read_timeout_s = read_timeout_s;
  engine.make_readers = [seed, options] {
    Readers readers;
    readers.pool = std::make_unique<FaultyReader>(seed, options);
    return readers;
  };
  return engine;
}

// A pass over a random order, with skips, repeats, nesting refused or not, and aborts.
void wild_pass(StreamedModel& model, std::mt19937_64& random) {
  Engine& engine = model.engine();
  const auto units = static_cast<uint32_t>(model.spec().units.size());
  engine.begin_pass(0);
  for (uint32_t i = 0; i < units; ++i) {
    const uint32_t unit = random() % 4 == 0 ? static_cast<uint32_t>(random() % units) : i;
    if (random() % 6 == 0) continue;
    ASSERT_EQ(model.use(unit), "");
    if (random() % 40 == 0) {
      engine.acquire(unit, 0, {});
      return;  // aborted: neither released nor ended
    }
  }
  engine.end_pass(0);
}

TEST(EngineFaults, ShortReadsDelaysAndDisorderChangeNothing) {
  const uint64_t first = testing::test_seed();
  for (uint64_t seed = first; seed < first + 12; ++seed) {
    SCOPED_TRACE(seed);
    StreamedModel model(seed);
    std::mt19937_64 random(seed);
    FaultyOptions options;
    options.short_chance = 0.2;
    options.interrupt_chance = 0.1;
    options.max_delay_polls = 6;
    options.shuffled = true;
    const double cached = static_cast<double>(random() % 3) / 2;
    model.open(model.plan(small_limits(model, cached, 2 + random() % 6)), faulty(seed, options));
    for (int pass = 0; pass < 12; ++pass) wild_pass(model, random);
    if (HasFatalFailure()) return;
  }
}

TEST(EngineFaults, AFailedReadIsAnErrorThatNamesFileOffsetAndUnit_AndTheNextPassWorks) {
  for (uint64_t at = 0; at < 40; at += 3) {
    SCOPED_TRACE(at);
    StreamedModel model;
    FaultyOptions options;
    options.eio_from_read = at;
    options.eio_reads = 1;
    model.open(model.plan(small_limits(model, 0.3)), faulty(7, options));
    std::string message;
    for (int pass = 0; pass < 3 && message.empty(); ++pass) {
      try {
        ASSERT_EQ(model.pass(model.all_units()), "");
      } catch (const IoError& error) {
        message = error.what();
      }
    }
    EXPECT_NE(message.find("shard"), std::string::npos) << message;
    EXPECT_NE(message.find("offset"), std::string::npos) << message;
    EXPECT_NE(message.find("unit '"), std::string::npos) << message;
    EXPECT_EQ(model.pass(model.all_units()), "");
    EXPECT_EQ(model.pass(model.all_units()), "");
  }
}

TEST(EngineFaults, ADriveThatIsGoneFailsEveryPassAndHangsNone) {
  StreamedModel model;
  FaultyOptions options;
  options.eio_from_read = 10;
  options.eio_reads = testing::kNever;
  model.open(model.plan(small_limits(model, 0)), faulty(7, options));
  int failed = 0;
  for (int pass = 0; pass < 4; ++pass) {
    try {
      ASSERT_EQ(model.pass(model.all_units()), "");
    } catch (const IoError&) {
      ++failed;
    }
  }
  EXPECT_EQ(failed, 4);
}

TEST(EngineFaults, AReadThatNeverEndsIsATimeoutThatNamesIt) {
  StreamedModel model;
  FaultyOptions options;
  options.lost_read = 5;
  model.open(model.plan(small_limits(model, 0)), faulty(7, options, kLostLimit_s));
  for (int pass = 0; pass < 2; ++pass) {
    try {
      std::string wrong = model.pass(model.all_units());
      FAIL() << "no error" << wrong;
    } catch (const TimeoutError& error) {
      const std::string message = error.what();
      EXPECT_NE(message.find("unit '"), std::string::npos) << message;
      EXPECT_NE(message.find("shard"), std::string::npos) << message;
      EXPECT_NE(message.find("offset"), std::string::npos) << message;
    }
  }
}

TEST(EngineFaults, ABrokenDeviceFailsEveryLaterAcquireAndHangsNone) {
  for (uint64_t good = 0; good < 24; ++good) {
    SCOPED_TRACE(good);
    StreamedModel model;
    model.open(model.plan(small_limits(model, 0.3)), {},
               std::make_unique<FaultyDevice>(FaultyDeviceOptions{.good_copies = good}));
    for (int pass = 0; pass < 3; ++pass) {
      try {
        ASSERT_EQ(model.pass(model.all_units()), "");
        FAIL() << "no error";
      } catch (const Error& error) {
        EXPECT_NE(std::string(error.what()).find("the device is broken"), std::string::npos);
      }
    }
  }
}

TEST(EngineFaults, ABrokenDeviceIsToldThoughAReadFailedBefore) {
  for (int attempt = 0; attempt < 8; ++attempt) {
    StreamedModel model;
    FaultyOptions options;
    options.eio_from_read = 5;  // of the second chunk; the first one's copy fails then
    Engine& engine =
        model.open(model.plan(small_limits(model, 0)), faulty(7, options),
                   std::make_unique<FaultyDevice>(FaultyDeviceOptions{.good_copies = 0}));
    engine.begin_pass(0);
    std::string last;
    for (int i = 0; i < 3; ++i) {
      try {
        engine.acquire(0, 0, {});
      } catch (const Error& error) {
        last = error.what();
      }
    }
    EXPECT_EQ(last, "the device is broken");
  }
}

// Whether the unit times out again and again. A busy machine may take longer than the limit for one
// that nothing holds up, but not every time.
bool is_held_up(StreamedModel& model, uint32_t unit) {
  for (int attempt = 0; attempt < 5; ++attempt) {
    try {
      EXPECT_EQ(model.use(unit), "");
      return false;
    } catch (const TimeoutError&) {
    }
  }
  return true;
}

// Its slot is gone; the other one serves all units but its own.
TEST(EngineFaults, AReadThatNeverEndsHoldsUpItsOwnUnitAlone) {
  StreamedModel model;
  FaultyOptions options;
  options.lost_read = 6;
  const auto log = options.log = std::make_shared<testing::FaultLog>();
  Engine& engine =
      model.open(model.plan(small_limits(model, 0, 2)), faulty(7, options, kLostLimit_s));
  std::mt19937_64 random(1);
  std::set<uint32_t> held_up;
  engine.begin_pass(0);
  for (int i = 0; i < 60; ++i) {
    const auto unit = static_cast<uint32_t>(random() % model.spec().units.size());
    if (!held_up.contains(unit) && is_held_up(model, unit)) held_up.insert(unit);
  }
  EXPECT_EQ(log->lost, 1u);
  EXPECT_LE(held_up.size(), 1u);
  // It comes back at last, into a slot that was kept for it; then all is well.
  log->calm = true;
  for (int pass = 0; pass < 2; ++pass) ASSERT_EQ(model.pass(model.all_units()), "");
}

TEST(EngineFaults, AReadThatTakesASecondIsWaitedFor) {
  StreamedModel model;
  FaultyOptions options;
  options.stall_chance = 0.02;
  options.stall_us = 1'100'000;  // longer than any nap of the engine's threads
  const auto log = options.log = std::make_shared<testing::FaultLog>();
  model.open(model.plan(small_limits(model, 0.5)), faulty(5, options));
  for (int pass = 0; pass < 20 && log->stalls == 0; ++pass) {
    ASSERT_EQ(model.pass(model.all_units()), "");
  }
  EXPECT_GT(log->stalls, 0u);
}

TEST(EngineFaults, AReadThatComesAfterItsTimeLimitIsAnErrorOnce) {
  StreamedModel model;
  FaultyOptions options;
  options.stall_chance = 1;
  options.stall_us = 600'000;
  const auto log = options.log = std::make_shared<testing::FaultLog>();
  model.open(model.plan(small_limits(model, 0)), faulty(5, options, 0.1));
  EXPECT_THROW(model.pass(model.all_units()), TimeoutError);
  log->calm = true;
  EXPECT_EQ(model.pass(model.all_units()), "");
}

size_t flips_in_tensors(const StreamedModel& model, const testing::FaultLog& log) {
  const auto flips = log.all_flips();
  return static_cast<size_t>(std::ranges::count_if(flips, [&](const auto& flip) {
    return std::ranges::any_of(model.spec().tensors, [&](const TensorSpec& tensor) {
      const Extent& extent = tensor.extents[0];
      return model.shard_path(extent.shard) == flip.path && flip.offset >= extent.offset &&
             flip.offset < extent.offset + extent.bytes;
    });
  }));
}

// Read once each, into the cache, and from RAM, so without padding that belongs to other tensors:
// each bit flipped in a tensor arrives, and no other.
TEST(EngineFaults, AFlippedBitIsFoundWhereItWasPutAndNowhereElse) {
  StreamedModel model(1, {.in_memory = true, .encloses_units = {}});
  FaultyOptions options;
  options.flip_chance = 0.5;
  const auto log = options.log = std::make_shared<testing::FaultLog>();
  PlanLimits limits = small_limits(model, 1.1);
  model.open(model.plan(limits), faulty(testing::test_seed(), options));
  Engine& engine = model.engine();
  engine.begin_pass(0);
  size_t found = 0;
  std::vector<std::byte> wanted;
  for (const uint32_t unit : model.all_units()) {
    engine.acquire(unit, 0, {});
    model.visit_images(unit, [&](const TensorSpec& tensor, const std::byte* image) {
      const Extent& extent = tensor.extents[0];
      wanted.resize(extent.bytes);
      testing::fill_pattern(wanted, extent.offset, extent.shard);
      for (uint64_t i = 0; i < extent.bytes; ++i) {
        if (image[i] == wanted[i]) continue;
        ++found;
        ASSERT_TRUE(
            log->flipped(model.shard_path(extent.shard), extent.offset + i, image[i] ^ wanted[i]))
            << tensor.name << " byte " << i;
      }
    });
    engine.release(unit, 0);
  }
  engine.end_pass(0);
  EXPECT_GT(found, 10u);
  EXPECT_EQ(found, flips_in_tensors(model, *log));
}

TEST(EngineFaults, TheReportOfAPassWhoseRecordIsGoneIsEmpty) {
  StreamedModel model;
  Engine& engine = model.open(model.plan(small_limits(model, 0)));
  ASSERT_EQ(model.pass(model.all_units()), "");
  for (int begun = 0; begun < 6; ++begun) {
    EXPECT_EQ(engine.last_pass({}).seconds > 0, begun < 4) << begun;
    engine.begin_pass(0);  // aborted: never ended
  }
}

TEST(EngineFaults, CloseWakesWhoeverWaitsInAnAcquire) {
  StreamedModel model;
  FaultyOptions options;
  options.lost_read = 0;
  const auto log = options.log = std::make_shared<testing::FaultLog>();
  Engine& engine = model.open(model.plan(small_limits(model, 0)), faulty(7, options));
  std::atomic<bool> waiting{false};
  std::string message;
  std::thread worker([&] {
    try {
      engine.begin_pass(0);
      engine.acquire(0, 0, [&] { waiting = true; });
    } catch (const Error& error) {
      message = error.what();
      log->calm = true;  // the close waits for the read
    }
  });
  testing::wait_until([&] { return waiting.load(); }, "the wait");
  engine.close();
  worker.join();
  EXPECT_NE(message.find("closed while unit 'unit0'"), std::string::npos) << message;
}

}  // namespace
}  // namespace wsm
