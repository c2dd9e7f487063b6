#include "plan/arena.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>

#include "util/check.h"

namespace wsm {
namespace {

std::vector<Place> places_of(const std::vector<uint64_t>& bytes) {
  std::vector<Place> places;
  for (const uint64_t b : bytes) places.push_back({b, false});
  return places;
}

bool overlap(const std::vector<Place>& places, const ArenaLayout& layout, size_t a, size_t b) {
  return places[a].bytes > 0 && places[b].bytes > 0 &&
         layout.offsets[a] < layout.offsets[b] + places[b].bytes &&
         layout.offsets[b] < layout.offsets[a] + places[a].bytes;
}

void expect_promise_kept(const std::vector<Place>& places, Lookahead ahead,
                         const ArenaLayout& layout) {
  std::vector<size_t> cycle;
  for (size_t i = 0; i < places.size(); ++i) {
    EXPECT_LE(layout.offsets[i] + places[i].bytes, layout.bytes);
    EXPECT_EQ(layout.offsets[i] % 256, 0u);
    for (size_t j = 0; places[i].encloses_units && j < places.size(); ++j) {
      EXPECT_FALSE(i != j && overlap(places, layout, i, j)) << i << " and " << j;
    }
    if (!places[i].encloses_units && places[i].bytes > 0) cycle.push_back(i);
  }
  for (size_t i = 0; i < cycle.size(); ++i) {
    for (size_t n = 1; n <= ahead.units && n < cycle.size(); ++n) {
      if (i + n >= cycle.size() && n > ahead.seam) break;
      const size_t other = (i + n) % cycle.size();
      EXPECT_FALSE(overlap(places, layout, cycle[i], cycle[other])) << i << " and " << other;
    }
  }
}

TEST(Arena, OneUnitAheadAlternates) {
  const auto places = places_of({512, 512, 512, 512});
  const auto layout = fit_arena(places, {1, 1}, 1024);
  ASSERT_TRUE(layout);
  EXPECT_EQ(layout->bytes, 1024u);
  EXPECT_EQ(layout->offsets, (std::vector<uint64_t>{0, 512, 0, 512}));
}

TEST(Arena, TwoUnitsAheadGoRound) {
  const auto places = places_of({256, 256, 256, 256, 256, 256});
  const auto layout = fit_arena(places, {2, 2}, 1 << 20);
  ASSERT_TRUE(layout);
  EXPECT_EQ(layout->bytes, 768u);
  EXPECT_EQ(layout->offsets, (std::vector<uint64_t>{0, 256, 512, 0, 256, 512}));
}

TEST(Arena, OnDemandTakesTheLargestUnit) {
  const auto layout = fit_arena(places_of({256, 1024, 512}), {0, 0}, 1024);
  ASSERT_TRUE(layout);
  EXPECT_EQ(layout->bytes, 1024u);
  EXPECT_FALSE(fit_arena(places_of({256, 1024, 512}), {0, 0}, 1023));
}

// An odd cycle cannot alternate between two places: the seam needs a third.
TEST(Arena, AnOddCycleTakesAThirdPlaceAtTheSeam) {
  const auto places = places_of({512, 512, 512, 512, 512});
  EXPECT_FALSE(fit_arena(places, {1, 1}, 1024));
  const auto without = fit_arena(places, {1, 0}, 1024);
  ASSERT_TRUE(without);
  expect_promise_kept(places, {1, 0}, *without);
  const auto with = fit_arena(places, {1, 1}, 1 << 20);
  ASSERT_TRUE(with);
  EXPECT_EQ(with->bytes, 1536u);
  expect_promise_kept(places, {1, 1}, *with);
}

TEST(Arena, ExclusivePlacesComeFirstAndAreNotShared) {
  std::vector<Place> places = places_of({512, 512, 512, 512, 512});
  places[2].encloses_units = true;
  const auto layout = fit_arena(places, {1, 1}, 1536);
  ASSERT_TRUE(layout);
  EXPECT_EQ(layout->offsets, (std::vector<uint64_t>{512, 1024, 0, 512, 1024}));
}

TEST(Arena, EmptyPlacesTakeNoPart) {
  const auto places = places_of({512, 0, 0, 512, 512, 0, 512});
  const auto layout = fit_arena(places, {1, 1}, 1024);
  ASSERT_TRUE(layout);
  expect_promise_kept(places, {1, 1}, *layout);
  const auto nothing = fit_arena(places_of({0, 0}), {2, 2}, 0);
  ASSERT_TRUE(nothing);
  EXPECT_EQ(nothing->bytes, 0u);
}

TEST(Arena, AShortCycleNeedsNoMoreThanAllItsUnits) {
  const auto layout = fit_arena(places_of({256, 512, 1024}), {64, 64}, 1792);
  ASSERT_TRUE(layout);
  EXPECT_EQ(layout->bytes, 1792u);
}

class ArenaProperty : public ::testing::TestWithParam<uint64_t> {};

TEST_P(ArenaProperty, KeepsItsPromise) {
  std::mt19937_64 random(GetParam());
  for (int i = 0; i < 500; ++i) {
    SCOPED_TRACE(concat("seed ", GetParam(), " round ", i));
    std::vector<Place> places(random() % 30);
    for (Place& place : places) {
      place.bytes = random() % 4 == 0 ? 0 : 256 * (1 + random() % 40);
      place.encloses_units = random() % 10 == 0;
    }
    Lookahead ahead{static_cast<uint32_t>(random() % 5), 0};
    ahead.seam = static_cast<uint32_t>(random() % (ahead.units + 1));
    const uint64_t least = least_arena_bytes(places, ahead);
    const uint64_t most = least + random() % (2 * least + 256);
    const auto layout = fit_arena(places, ahead, most);
    EXPECT_EQ(layout.has_value(), arena_fits(places, ahead, most));
    if (!layout) continue;
    EXPECT_GE(layout->bytes, least);
    EXPECT_LE(layout->bytes, most);
    expect_promise_kept(places, ahead, *layout);
  }
}

// What the search for a layout can rely on: sizes at which it cannot fail.
TEST_P(ArenaProperty, FindsALayoutWhereOneMustExist) {
  std::mt19937_64 random(GetParam());
  for (int i = 0; i < 500; ++i) {
    SCOPED_TRACE(concat("seed ", GetParam(), " round ", i));
    std::vector<Place> places(1 + random() % 30);
    uint64_t largest = 0;
    for (Place& place : places) {
      place.bytes = 256 * (1 + random() % 40);
      largest = std::max(largest, place.bytes);
    }
    const uint32_t seam = places.size() % 2 == 0 ? 1 : 0;
    EXPECT_TRUE(fit_arena(places, {1, seam}, least_arena_bytes(places, {1, seam})));
    const Lookahead further{static_cast<uint32_t>(2 + random() % 4), 0};
    EXPECT_TRUE(fit_arena(places, further, least_arena_bytes(places, further) + largest));
    const Lookahead all{64, 64};
    EXPECT_TRUE(fit_arena(places, all, least_arena_bytes(places, all)));
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, ArenaProperty, ::testing::Values(1, 2, 3));

}  // namespace
}  // namespace wsm
