// Whatever the system or the device refuses, wherever it does: an engine is made and right, or
// there is an error that says what was refused, and nothing is left behind.
#include "support/failing_calls.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <optional>
#include <string>
#include <vector>

#include "support/failing_device.h"
#include "support/streamed_model.h"
#include "util/align.h"

namespace wsm {
namespace {

using testing::Call;
using testing::DeviceLedger;
using testing::FailingCalls;
using testing::FailingDevice;
using testing::Held;
using testing::held_no_more_than;
using testing::held_now;
using testing::ModelShape;
using testing::StreamedModel;

constexpr ModelShape kShape{.units = 6,
                            .tensors_per_unit = 2,
                            .shards = 2,
                            .least_tensor_bytes = 400'000,
                            .most_tensor_bytes = 700'000,
                            .encloses_units = {}};

// Of many calls, those at the start and at the end are tried, and some of the others: a constructor
// makes thousands alike. WSM_TEST_EVERY=1 tries all.
uint64_t following(uint64_t nth, uint64_t calls) {
  static const bool every = std::getenv("WSM_TEST_EVERY") != nullptr;
  constexpr uint64_t kFirst = 12, kLast = 40, kStep = 100;
  const bool near = every || nth < kFirst || nth + kLast >= calls;
  return near ? nth + 1 : std::min(nth + kStep, calls - kLast);
}

// An engine with some of everything: homes, cache, ring.
class Life {
 public:
  explicit Life(ReaderChoice reader) : reader_(reader) {
    PlanLimits limits;
    limits.device_bytes = 64 * kMiB;
    limits.arena_bytes = 2 * model_.largest_unit_bytes() + 8 * kKiB;
    limits.home_bytes = model_.bytes() / 3;
    limits.chunk_bytes = kChunk;
    limits.staging_bytes = 5 * kChunk;
    limits.cache_bytes = 5 * kChunk;
    limits.host_bytes = 10 * kChunk;
    plan_ = model_.plan(limits);
    EXPECT_GT(plan_.device_home_bytes, 0u);
    EXPECT_GT(plan_.host_home_bytes, 0u);
    EXPECT_GT(plan_.disk_home_bytes, 0u);
  }

  void open() {
    EngineOptions options;
    options.reader = reader_;
    options.read_threads = 2;
    options.read_timeout_s = 10;
    model_.open(plan_, options, std::make_unique<FailingDevice>(make_host_device(), ledger));
  }

  // Empty, or what was wrong with the bytes.
  std::string run() {
    model_.engine().load_resident(0, {});
    std::string wrong;
    for (int pass = 0; pass < 2; ++pass) wrong += model_.pass(model_.all_units());
    return wrong;
  }

  void close() { model_.close(); }
  StreamedModel& model() { return model_; }

  DeviceLedger ledger;

 private:
  static constexpr uint64_t kChunk = 512 * kKiB;  // cache and ring have room for huge pages
  const ReaderChoice reader_;
  StreamedModel model_{1, kShape};
  Plan plan_;
};

// What opening, running and closing threw. The bytes are right, where it threw nothing.
std::optional<std::string> error_of_a_life(Life& life) {
  try {
    life.open();
    EXPECT_EQ(life.run(), "");
    life.close();
    return {};
  } catch (const Error& error) {
    life.close();
    return error.what();
  } catch (const std::bad_alloc& error) {
    life.close();
    return error.what();
  }
}

struct Refusal {
  Call call;
  ReaderChoice reader;
  std::vector<std::string> words;  // one of them is in the error
  bool always_an_error;
};

class FailingCallsTest : public ::testing::TestWithParam<Refusal> {};

std::string name_of(const ::testing::TestParamInfo<Refusal>& info) {
  std::string name = testing::text(info.param.call);
  std::erase_if(name, [](char c) { return c == ' ' || c == '_'; });
  return name;
}

TEST_P(FailingCallsTest, AreAnErrorOrDoNotMatter_AndNothingIsLeft) {
  const auto& [call, reader, words, always_an_error] = GetParam();
  Life life(reader);
  ASSERT_EQ(error_of_a_life(life), std::nullopt);
  const Held before = held_now();
  uint64_t calls = 0;
  {
    const FailingCalls counting(call, UINT64_MAX);
    ASSERT_EQ(error_of_a_life(life), std::nullopt);
    calls = counting.calls();
  }
  ASSERT_GT(calls, 0u) << "the linker wraps no " << testing::text(call);
  for (const bool for_ever : {false, true}) {
    if (for_ever && call == Call::kNew) continue;  // then the words of the error cannot be had
    uint64_t tried = 0, refused = 0;
    for (uint64_t nth = 1;; nth = following(nth, calls)) {
      SCOPED_TRACE(concat(testing::text(call), " number ", nth, for_ever ? " and all later" : ""));
      std::optional<std::string> error;
      {
        const FailingCalls failing(call, nth, for_ever);
        error = error_of_a_life(life);
        if (!failing.struck()) {
          EXPECT_EQ(error, std::nullopt);
          break;
        }
      }
      ++tried;
      refused += error.has_value();
      if (error) {
        EXPECT_TRUE(std::ranges::any_of(words, [&](const std::string& word) {
          return error->find(word) != std::string::npos;
        })) << *error;
      }
      EXPECT_TRUE(error || !always_an_error);
      EXPECT_TRUE(held_no_more_than(before));
      EXPECT_EQ(life.ledger.events, 0);
      EXPECT_EQ(life.ledger.registered_bytes, 0u);
      if (HasFailure()) return;
    }
    std::cout << testing::text(call) << (for_ever ? ", for ever: " : ": ") << tried << " tried, "
              << refused << " errors\n";
  }
  EXPECT_EQ(error_of_a_life(life), std::nullopt);
}

INSTANTIATE_TEST_SUITE_P(
    Pread, FailingCallsTest,
    ::testing::Values(
        Refusal{Call::kNew, ReaderChoice::kPread, {"bad_alloc"}, false},
        Refusal{Call::kMap, ReaderChoice::kPread, {"cannot map"}, true},
        // Without huge pages it works.
        Refusal{Call::kAdvise, ReaderChoice::kPread, {"out of forked children"}, false},
        Refusal{Call::kEventFd, ReaderChoice::kPread, {"cannot make an eventfd"}, true},
        // Where the second descriptor of a file cannot be had, it is read buffered.
        Refusal{Call::kOpen, ReaderChoice::kPread, {"cannot open"}, false},
        // Those that help to touch memory can be done without.
        Refusal{Call::kThread, ReaderChoice::kPread, {"cannot start a thread for"}, false}),
    name_of);

#if WSM_HAVE_LIBURING
INSTANTIATE_TEST_SUITE_P(
    Uring, FailingCallsTest,
    ::testing::Values(Refusal{Call::kRing, ReaderChoice::kUring, {"io_uring"}, true},
                      Refusal{
                          Call::kEventFd, ReaderChoice::kUring, {"cannot make an eventfd"}, true}),
    name_of);
#endif

// -- the device
// ------------------------------------------------------------------------------------

TEST(FailingDeviceTest, EveryCallMayFail_AndNothingIsLeft) {
  Life life(ReaderChoice::kPread);
  ASSERT_EQ(error_of_a_life(life), std::nullopt);
  const Held before = held_now();
  const uint64_t calls = life.ledger.calls;
  for (const bool for_ever : {false, true}) {
    uint64_t tried = 0, refused = 0;
    for (uint64_t nth = 1;; nth = following(nth, calls)) {
      SCOPED_TRACE(concat("call ", nth, for_ever ? " and all later" : ""));
      life.ledger.calls = 0;
      life.ledger.fail_at = nth;
      life.ledger.for_ever = for_ever;
      const std::optional<std::string> error = error_of_a_life(life);
      if (!life.ledger.struck()) {
        EXPECT_EQ(error, std::nullopt);
        break;
      }
      ++tried;
      refused += error.has_value();
      if (error) {
        EXPECT_NE(error->find("the device is broken: "), std::string::npos) << *error;
      }
      EXPECT_TRUE(held_no_more_than(before));
      EXPECT_EQ(life.ledger.events, 0);
      EXPECT_EQ(life.ledger.registered_bytes, 0u);
      if (HasFailure()) return;
    }
    std::cout << "calls of the device" << (for_ever ? ", for ever: " : ": ") << tried << " tried, "
              << refused << " errors\n";
    EXPECT_GT(refused, 0u);
  }
}

TEST(FailingDeviceTest, WhatTheEngineCountsIsWhatIsTaken) {
  Life life(ReaderChoice::kPread);
  const uint64_t before = held_now().mapped_bytes;
  life.open();
  ASSERT_EQ(life.run(), "");
  const Engine& engine = life.model().engine();
  EXPECT_EQ(engine.memory().host_bytes, held_now().mapped_bytes - before);
  EXPECT_EQ(engine.memory().host_pinned_bytes, life.ledger.registered_bytes);
  EXPECT_EQ(engine.memory().host_bytes, engine.plan().cache_bytes + engine.plan().staging_bytes());
  EXPECT_LE(engine.memory().host_bytes, engine.plan().host_budget_bytes);
}

TEST(FailingDeviceTest, WhatIsNotPinnedIsCountedAndSaid_AndTheBytesAreRight) {
  for (const uint64_t most : {uint64_t{0}, 4 * kMiB}) {
    Life life(ReaderChoice::kPread);
    life.ledger.most_registered_bytes = most;
    life.open();
    ASSERT_EQ(life.run(), "");
    const Engine& engine = life.model().engine();
    EXPECT_EQ(engine.memory().host_pinned_bytes, life.ledger.registered_bytes);
    EXPECT_LE(life.ledger.registered_bytes, most);
    const std::vector<std::string> warnings = engine.warnings();
    ASSERT_FALSE(warnings.empty());
    EXPECT_NE(warnings[0].find("refused by the test"), std::string::npos) << warnings[0];
    EXPECT_NE(warnings[0].find("stay pageable"), std::string::npos) << warnings[0];
    life.close();
    EXPECT_EQ(life.ledger.registered_bytes, 0u);
  }
}

}  // namespace
}  // namespace wsm
