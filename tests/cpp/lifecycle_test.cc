// The engine's end beside calls of other threads: each call ends, in a result or in an error that
// says why, and nothing is used that was taken away.
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "engine/engine.h"
#include "support/contains.h"
#include "support/failing_device.h"
#include "support/faulty_reader.h"
#include "support/streamed_model.h"
#include "util/align.h"

namespace wsm {
namespace {

using testing::contains;
using testing::FaultyOptions;
using testing::FaultyReader;
using testing::StreamedModel;

constexpr uint64_t kChunk = 64 * kKiB;

PlanLimits limits_of(const StreamedModel& model) {
  PlanLimits limits;
  limits.device_bytes = 64 * kMiB;
  limits.arena_bytes = 2 * model.largest_unit_bytes() + 8 * kKiB;
  limits.home_bytes = 0;
  limits.chunk_bytes = kChunk;
  limits.staging_bytes = 4 * kChunk;
  limits.cache_bytes = model.bytes() / 2;
  limits.host_bytes = *limits.staging_bytes + *limits.cache_bytes;
  return limits;
}

// A reader that loses the first read, so that an acquire waits until something else ends it.
EngineOptions losing_a_read(double timeout_s, std::shared_ptr<testing::FaultLog> log = {}) {
  EngineOptions options;
  options.read_timeout_s = timeout_s;
  options.make_readers = [log] {
    FaultyOptions faults;
    faults.lost_read = 0;
    faults.log = log ? log : std::make_shared<testing::FaultLog>();
    Readers readers;
    readers.pool = std::make_unique<FaultyReader>(1, faults);
    return readers;
  };
  return options;
}

// Threads that make a call again and again, until the engine is closed to it.
class Callers {
 public:
  void add(std::function<void()> call) {
    threads_.emplace_back([this, call = std::move(call)] {
      while (!stop_) {
        try {
          call();
          ++calls_;
        } catch (const Error& error) {
          if (!contains(error.what(), "closed") && !contains(error.what(), "any more")) {
            ADD_FAILURE() << error.what();
          }
        }
      }
    });
  }
  void await_calls(uint64_t more) const {
    const uint64_t enough = calls_ + more;
    while (calls_ < enough) std::this_thread::yield();
  }
  ~Callers() {
    stop_ = true;
    for (std::thread& thread : threads_) thread.join();
  }

 private:
  std::atomic<bool> stop_{false};
  std::atomic<uint64_t> calls_{0};
  std::vector<std::thread> threads_;
};

TEST(Lifecycle, ReportsAndFetchesBesideAnEngineThatIsHandedOver) {
  StreamedModel model;
  for (int round = 0; round < 30; ++round) {
    Engine& engine = model.open(model.plan(limits_of(model)));
    ASSERT_EQ(model.pass(model.all_units()), "");
    Handoff handoff;
    {
      Callers callers;
      std::vector<std::byte> bytes(model.largest_unit_bytes());
      callers.add([&] { engine.fetch(round % 8, 0, bytes.data()); });
      callers.add([&] {
        engine.memory();
        engine.shards();
        engine.warnings();
        engine.kept_cache();
      });
      callers.add([&] {
        engine.totals();
        engine.last_pass({});
        engine.steady_passes();
        engine.passes();
      });
      callers.await_calls(10);
      handoff = engine.hand_over();
      callers.await_calls(3);
    }
    EXPECT_NE(handoff.cache, nullptr);
    EXPECT_EQ(engine.memory().host_bytes, 0u);
    model.close();
  }
}

TEST(Lifecycle, PassesBesideClose) {
  StreamedModel model;
  for (int round = 0; round < 30; ++round) {
    Engine& engine = model.open(model.plan(limits_of(model)));
    std::string closed;
    std::atomic<uint64_t> uses{0};
    std::thread runner([&] {
      try {
        while (true) {
          engine.begin_pass(0);
          for (const uint32_t unit : model.all_units()) {
            EXPECT_EQ(model.use(unit), "");
            ++uses;
          }
          engine.end_pass(0);
        }
      } catch (const Error& error) {
        closed = error.what();
      }
    });
    while (uses < 5 + static_cast<uint64_t>(round)) std::this_thread::yield();
    if (round % 2) {
      engine.close();
    } else {
      EXPECT_NE(engine.hand_over().cache, nullptr);
    }
    runner.join();
    EXPECT_TRUE(contains(closed, "closed")) << closed;
    model.close();
  }
}

TEST(Lifecycle, OfTwoThatTakeOverOneGetsEverything) {
  StreamedModel model;
  for (int round = 0; round < 60; ++round) {
    Engine& engine = model.open(model.plan(limits_of(model)));
    if (round % 2) {
      ASSERT_EQ(model.pass(model.all_units()), "");
    }
    std::atomic<int> whole{0}, refused{0};
    const auto take_over = [&] {
      try {
        const Handoff handoff = engine.hand_over();
        whole += handoff.cache && handoff.device && handoff.files.size() == 2;
      } catch (const Error& error) {
        EXPECT_TRUE(contains(error.what(), "nothing to hand over")) << error.what();
        ++refused;
      }
    };
    std::thread first(take_over), second([&] { engine.close(); }), third(take_over);
    for (std::thread* thread : {&first, &second, &third}) thread->join();
    EXPECT_EQ(whole, 1);
    EXPECT_EQ(refused, 1);
    EXPECT_TRUE(engine.closed());
    model.close();
  }
}

// Tells when its copies were drained, which is the last that `close` does.
class DrainedDevice final : public testing::FailingDevice {
 public:
  DrainedDevice(testing::DeviceLedger& ledger, std::atomic<bool>& drained)
      : FailingDevice(make_host_device(), ledger), drained_(drained) {}
  void drain() override {
    FailingDevice::drain();
    drained_ = true;
  }

 private:
  std::atomic<bool>& drained_;
};

TEST(Lifecycle, WhoeverClosesSecondReturnsWhenTheFirstHasEnded) {
  StreamedModel model;
  testing::DeviceLedger ledger;
  std::atomic<bool> drained{false};
  // A read that does not end: the first closer waits for it.
  Engine& engine = model.open(model.plan(limits_of(model)), losing_a_read(0.3),
                              std::make_unique<DrainedDevice>(ledger, drained));
  engine.begin_pass(0);
  EXPECT_THROW(engine.acquire(0, 0, {}), TimeoutError);
  std::thread first([&] { engine.close(); });
  while (!engine.closed()) std::this_thread::yield();
  engine.close();
  EXPECT_TRUE(drained);
  first.join();
  engine.close();
}

// Ctrl-C's handler, the garbage collector: what runs while an acquire waits may close the engine.
TEST(Lifecycle, AnInterruptMayCloseTheEngineThatItInterrupts) {
  for (const bool hand_over : {false, true}) {
    StreamedModel model;
    const auto log = std::make_shared<testing::FaultLog>();
    Engine& engine = model.open(model.plan(limits_of(model)), losing_a_read(10, log));
    engine.begin_pass(0);
    std::optional<Handoff> handoff;
    try {
      engine.acquire(0, 0, [&] {
        log->calm = true;  // so that the read ends
        hand_over ? (void)handoff.emplace(engine.hand_over()) : engine.close();
      });
      FAIL() << "no error";
    } catch (const Error& error) {
      EXPECT_TRUE(contains(error.what(), "closed while unit 'unit0'")) << error.what();
    }
    EXPECT_EQ(handoff.has_value(), hand_over);
    model.close();
  }
}

TEST(Lifecycle, ATraceMayBeReadWhileItsEngineIsHandedOver) {
  StreamedModel model;
  for (int round = 0; round < 20; ++round) {
    Engine& engine = model.open(model.plan(limits_of(model)));
    engine.start_trace(0, 1000, {});
    ASSERT_EQ(model.pass(model.all_units()), "");
    std::thread reader([&] {
      try {
        EXPECT_GT(engine.stop_trace({}).records.size(), 0u);
      } catch (const Error& error) {
        EXPECT_TRUE(contains(error.what(), "no trace is being taken")) << error.what();
      }
    });
    std::optional<Handoff> handoff(engine.hand_over());
    handoff.reset();
    reader.join();
    model.close();
  }
}

// Fails a call that the caller's thread makes, once it is told to.
class FailingForCaller final : public testing::FailingDevice {
 public:
  explicit FailingForCaller(testing::DeviceLedger& ledger)
      : FailingDevice(make_host_device(), ledger), caller_(std::this_thread::get_id()) {}
  bool done(const Event& event) override {
    check<Error>(std::this_thread::get_id() != caller_ || !fail, "the device is broken: done");
    return FailingDevice::done(event);
  }
  bool fail = false;

 private:
  const std::thread::id caller_;
};

TEST(Lifecycle, AnAcquireThatFailsOnTheDeviceHoldsNothing) {
  StreamedModel model;
  testing::DeviceLedger ledger;
  auto owned = std::make_unique<FailingForCaller>(ledger);
  FailingForCaller& device = *owned;
  PlanLimits one_place = limits_of(model);
  one_place.arena_bytes = model.largest_unit_bytes() + 4 * kKiB;
  Engine& engine = model.open(model.plan(one_place), {}, std::move(owned));
  engine.begin_pass(0);
  device.fail = true;
  EXPECT_THROW(engine.acquire(0, 0, {}), Error);
  device.fail = false;
  EXPECT_EQ(model.use(1), "");
  EXPECT_TRUE(engine.acquire(0, 0, {}));  // nobody has seen these bytes before
  EXPECT_EQ(model.wrong_bytes(0), "");
  engine.release(0, 0);
  engine.end_pass(0);
}

}  // namespace
}  // namespace wsm
