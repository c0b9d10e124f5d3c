// SPDX-License-Identifier: Apache-2.0
#include "plan/allocation.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <stdexcept>
#include <vector>

namespace quern {
namespace {

using Units = std::vector<AllocationUnit>;

// Units with options of random size and mostly falling loss, as scores are.
Units random_units(std::mt19937_64& random, std::size_t count, std::size_t most_options) {
  Units units(count);
  for (AllocationUnit& unit : units) {
    const std::size_t options = 1 + random() % most_options;
    const auto size = static_cast<double>(1 + random() % 50);
    const auto scale = static_cast<double>(1 + random() % 1000);
    for (std::size_t o = 0; o < options; ++o) {
      const double bits = 2.0 + static_cast<double>(random() % 60) / 10;
      const double noise = 1 + static_cast<double>(random() % 100) / 50;
      unit.push_back(
          {static_cast<std::uint64_t>(bits * size), scale * noise / (bits * bits * bits)});
    }
  }
  return units;
}

// The least loss of any choice within the budget, by trying them all.
double brute_force(const Units& units, std::uint64_t budget, std::size_t from = 0) {
  if (from == units.size()) {
    return 0;
  }
  double best = std::numeric_limits<double>::infinity();
  for (const AllocationOption& option : units[from]) {
    if (option.bytes <= budget) {
      best = std::min(best, option.loss + brute_force(units, budget - option.bytes, from + 1));
    }
  }
  return best;
}

std::uint64_t largest_bytes(const Units& units) {
  std::uint64_t sum = 0;
  for (const AllocationUnit& unit : units) {
    sum += std::max_element(unit.begin(), unit.end(), [](const auto& a, const auto& b) {
             return a.bytes < b.bytes;
           })->bytes;
  }
  return sum;
}

double largest_step(const Units& units) {
  double largest = 0;
  for (const AllocationUnit& unit : units) {
    const std::vector<std::size_t> hull = convex_hull(unit);
    for (std::size_t i = 0; i + 1 < hull.size(); ++i) {
      largest = std::max(largest, unit[hull[i]].loss - unit[hull[i + 1]].loss);
    }
  }
  return largest;
}

void expect_consistent(const Units& units, const Allocation& found, std::uint64_t budget) {
  ASSERT_EQ(found.choice.size(), units.size());
  std::uint64_t bytes = 0;
  double loss = 0;
  for (std::size_t u = 0; u < units.size(); ++u) {
    ASSERT_LT(found.choice[u], units[u].size());
    bytes += units[u][found.choice[u]].bytes;
    loss += units[u][found.choice[u]].loss;
  }
  EXPECT_EQ(found.bytes, bytes);
  EXPECT_DOUBLE_EQ(found.loss, loss);
  EXPECT_LE(found.bytes, budget);
}

TEST(Allocation, KeepsTheBudgetAndComesWithinOneStepOfTheBest) {
  std::mt19937_64 random(1);
  for (int trial = 0; trial < 200; ++trial) {
    const Units units = random_units(random, 1 + random() % 6, 5);
    const std::uint64_t least = smallest_bytes(units);
    const std::uint64_t budget = least + random() % (largest_bytes(units) - least + 2);
    const Allocation found = allocate(units, budget);
    expect_consistent(units, found, budget);
    const double best = brute_force(units, budget);
    // 1e-9: sums in another order.
    EXPECT_GE(found.loss, best * (1 - 1e-9)) << trial;
    EXPECT_LE(found.loss, best + largest_step(units)) << trial;
  }
}

TEST(Allocation, IsTheBestWhereTheBudgetIsThatOfAMultiplier) {
  std::mt19937_64 random(2);
  for (int trial = 0; trial < 100; ++trial) {
    const Units units = random_units(random, 1 + random() % 5, 5);
    const double mu = std::pow(10.0, static_cast<double>(random() % 400) / 100 - 3);
    std::uint64_t budget = 0;
    double best = 0;  // of loss among all choices with so many bytes (Everett 1963)
    for (const AllocationUnit& unit : units) {
      const auto option =
          std::min_element(unit.begin(), unit.end(), [&](const auto& a, const auto& b) {
            return a.loss + mu * static_cast<double>(a.bytes) <
                   b.loss + mu * static_cast<double>(b.bytes);
          });
      budget += option->bytes;
      best += option->loss;
    }
    EXPECT_NEAR(allocate(units, budget).loss, best, 1e-9 * best) << trial;
  }
}

TEST(Allocation, NeverLosesMoreWithALargerBudget) {
  std::mt19937_64 random(3);
  for (int trial = 0; trial < 20; ++trial) {
    const Units units = random_units(random, 1 + random() % 30, 12);
    double before = std::numeric_limits<double>::infinity();
    for (std::uint64_t budget = smallest_bytes(units); budget <= largest_bytes(units) + 1;
         ++budget) {
      const Allocation found = allocate(units, budget);
      expect_consistent(units, found, budget);
      EXPECT_LE(found.loss, before * (1 + 1e-12)) << trial << " at " << budget;
      before = found.loss;
    }
    // With room for everything each unit has its best option.
    double best = 0;
    for (const AllocationUnit& unit : units) {
      best += std::min_element(unit.begin(), unit.end(), [](const auto& a, const auto& b) {
                return a.loss < b.loss;
              })->loss;
    }
    EXPECT_NEAR(before, best, 1e-9 * best);
  }
}

TEST(Allocation, HullLeavesOutWhatIsNeverWorthwhile) {
  const AllocationUnit unit = {
      {30, 1.0}, {10, 9.0}, {20, 8.9}, {20, 5.0}, {25, 5.0}, {40, 1.5}, {50, 0.5}};
  // 20 bytes at 5.0 lie under the line from (10, 9) to (30, 1)? 9 -> 5 -> 1: on it, so left out.
  EXPECT_EQ(convex_hull(unit), (std::vector<std::size_t>{1, 0, 6}));
  EXPECT_EQ(convex_hull({{7, 3.0}}), std::vector<std::size_t>{0});
  // More bytes that lose more: the smallest stays alone.
  EXPECT_EQ(convex_hull({{7, 3.0}, {9, 3.0}, {11, 4.0}}), std::vector<std::size_t>{0});
}

TEST(Allocation, SmallerStepsFillWhatALargeOneCannot) {
  // The large unit's step gains most per byte but does not fit.
  const Units units = {{{100, 1000.0}, {200, 0.0}}, {{10, 5.0}, {20, 4.0}, {30, 3.5}}};
  const Allocation found = allocate(units, 140);
  EXPECT_EQ(found.choice, (std::vector<std::size_t>{0, 2}));
  EXPECT_EQ(found.bytes, 130U);
  EXPECT_EQ(allocate(units, 210).choice, (std::vector<std::size_t>{1, 0}));
  EXPECT_EQ(allocate(units, 1'000'000).choice, (std::vector<std::size_t>{1, 2}));
}

TEST(Allocation, RefusesWhatCannotBe) {
  const Units units = {{{10, 1.0}, {5, 2.0}}, {{7, 1.0}}};
  EXPECT_EQ(smallest_bytes(units), 12U);
  EXPECT_EQ(allocate(units, 12).bytes, 12U);
  EXPECT_THROW((void)allocate(units, 11), std::logic_error);
  EXPECT_THROW((void)allocate(Units{{}}, 11), std::logic_error);
  EXPECT_EQ(allocate({}, 0).bytes, 0U);
}

}  // namespace
}  // namespace quern
