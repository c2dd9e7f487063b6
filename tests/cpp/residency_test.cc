#include "plan/residency.h"

#include <gtest/gtest.h>

#include "support/models.h"
#include "util/align.h"

namespace wsm {
namespace {

using testing::ModelBuilder;
using testing::uniform_model;

TEST(ResidencyOrder, SmallTensorsThenRoundsOfTheLargest) {
  ModelBuilder model;
  model.shard("s");
  const uint32_t a_large = model.tensor("a.large", 9 * kMiB);
  const uint32_t a_norm = model.tensor("a.norm", 1000);
  const uint32_t a_middle = model.tensor("a.middle", 5 * kMiB);
  const uint32_t b_middle = model.tensor("b.middle", 4 * kMiB);
  const uint32_t b_large = model.tensor("b.large", 7 * kMiB);
  model.unit("a", {a_large, a_norm, a_middle});
  model.unit("b", {b_middle, b_large, a_norm});
  const ResidencyOrder order = residency_order(model.spec);
  EXPECT_EQ(order.tensors, (std::vector<uint32_t>{a_norm, a_large, b_large, a_middle, b_middle}));
  EXPECT_EQ(order.round_ends, (std::vector<size_t>{1, 3, 5}));
}

// Of the first k of n units, any stretch of w holds about w * k / n.
TEST(ResidencyOrder, EveryBeginningOfARoundIsSpreadEvenly) {
  const uint32_t n = 80;
  const ResidencyOrder order = residency_order(uniform_model(n, 1, kMiB));
  std::vector<int> taken(n, 0);
  for (uint32_t k = 1; k <= n; ++k) {
    taken[order.tensors[k - 1]] = 1;
    for (uint32_t begin = 0; begin < n; ++begin) {
      int count = 0;
      for (uint32_t w = 1; begin + w <= n; ++w) {
        count += taken[begin + w - 1];
        EXPECT_NEAR(count, double(w) * k / n, 2.5) << k << " taken, " << begin << " + " << w;
      }
    }
  }
}

TEST(ResidencyOrder, SomeMayComeFirst) {
  const ResidencyOrder order{.tensors = {4, 2, 0, 1, 3}, .round_ends = {2, 5}};
  const ResidencyOrder changed = with_first(order, {3, 2});
  EXPECT_EQ(changed.tensors, (std::vector<uint32_t>{3, 2, 4, 0, 1}));
  EXPECT_EQ(changed.round_ends, (std::vector<size_t>{2, 3, 5}));
}

}  // namespace
}  // namespace wsm
