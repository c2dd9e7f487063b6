#include "engine/sequence.h"

#include <gtest/gtest.h>

#include <vector>

namespace wsm {
namespace {

std::vector<uint32_t> ahead(const Sequence& sequence, size_t count) {
  const auto& all = sequence.upcoming();
  return {all.begin(), all.begin() + std::min(count, all.size())};
}

Sequence sequence_of(size_t units, uint64_t reach_bytes = 1000, uint32_t reach_units = 1) {
  return Sequence(std::vector<uint64_t>(units, 10), reach_bytes, reach_units);
}

using Units = std::vector<uint32_t>;

TEST(Sequence, ExpectsRegistrationOrderBeforeAnyUse) {
  EXPECT_EQ(ahead(sequence_of(4), 4), (Units{0, 1, 2, 3}));
}

TEST(Sequence, GoesRoundAtTheEnd) {
  Sequence sequence = sequence_of(4);
  for (const uint32_t unit : {0u, 1u, 2u}) EXPECT_TRUE(sequence.use(unit));
  EXPECT_EQ(ahead(sequence, 3), (Units{3, 0, 1}));
}

TEST(Sequence, NeverExpectsUnitsThatDoNotStream) {
  Sequence sequence({0, 10, 0, 10, 0}, 1000, 1);
  EXPECT_EQ(ahead(sequence, 5), (Units{1, 3}));
  EXPECT_TRUE(sequence.use(1));
  EXPECT_EQ(ahead(sequence, 5), (Units{3, 1}));
}

TEST(Sequence, LearnsAnOrderInOnePass) {
  Sequence sequence = sequence_of(4);
  const Units reverse{3, 2, 1, 0};
  for (const uint32_t unit : reverse) sequence.use(unit);
  sequence.end_pass();
  EXPECT_EQ(ahead(sequence, 4), reverse);
  for (int pass = 0; pass < 3; ++pass) {
    for (const uint32_t unit : reverse) EXPECT_TRUE(sequence.use(unit));
    sequence.end_pass();
  }
}

TEST(Sequence, TellsTheTwoUsesOfASharedUnitApart) {
  Sequence sequence = sequence_of(4);
  const Units order{0, 1, 0, 2, 3};
  for (int pass = 0; pass < 2; ++pass) {
    for (const uint32_t unit : order) sequence.use(unit);
    sequence.end_pass();
  }
  for (const uint32_t unit : order) EXPECT_TRUE(sequence.use(unit)) << unit;
}

TEST(Sequence, SkippedUnitsCostOneMissAndAreLearned) {
  Sequence sequence = sequence_of(5);
  for (const uint32_t unit : {0u, 1u, 2u, 3u, 4u}) sequence.use(unit);
  sequence.end_pass();
  int misses = 0;
  for (const uint32_t unit : {0u, 1u, 4u}) misses += sequence.use(unit) ? 0 : 1;
  EXPECT_EQ(misses, 1);
  sequence.end_pass();
  misses = 0;
  for (const uint32_t unit : {0u, 1u, 4u}) misses += sequence.use(unit) ? 0 : 1;
  EXPECT_EQ(misses, 0);
}

TEST(Sequence, AnEncoderBeforeManyDecoderPasses) {
  Sequence sequence = sequence_of(4);  // 0 1: encoder, 2 3: decoder
  for (const uint32_t unit : {0u, 1u, 2u, 3u}) sequence.use(unit);
  for (const uint32_t unit : {2u, 3u}) sequence.use(unit);
  for (int pass = 0; pass < 3; ++pass) {
    for (const uint32_t unit : {2u, 3u}) EXPECT_TRUE(sequence.use(unit));
  }
}

TEST(Sequence, TheWindowReachesSoManyBytesAndAtLeastSoManyUnits) {
  EXPECT_EQ(sequence_of(10, 35).upcoming().size(), 4u);
  EXPECT_EQ(sequence_of(10, 0, 3).upcoming().size(), 3u);
  EXPECT_EQ(sequence_of(10, 0, 0).upcoming().size(), 0u);
}

TEST(Sequence, TheWindowIsNeverLongerThanTheCycle) {
  EXPECT_EQ(sequence_of(3, 1'000'000).upcoming().size(), 3u);
  EXPECT_EQ(sequence_of(0).upcoming().size(), 0u);
}

}  // namespace
}  // namespace wsm
