// SPDX-License-Identifier: Apache-2.0
#include "plan/allocation.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <tuple>

namespace quern {
namespace {

// From one option of a unit's hull to the next.
struct Step {
  std::size_t unit = 0;
  std::size_t position = 0;  // on the hull, of the option that is left
  std::uint64_t bytes = 0;
  double gain = 0;  // of loss

  [[nodiscard]] double rate() const { return gain / static_cast<double>(bytes); }
};

double rate_between(const AllocationOption& from, const AllocationOption& to) {
  return (from.loss - to.loss) / static_cast<double>(to.bytes - from.bytes);
}

}  // namespace

std::uint64_t smallest_bytes(std::span<const AllocationUnit> units) {
  return std::accumulate(
      units.begin(), units.end(), std::uint64_t{0}, [](std::uint64_t sum, const auto& unit) {
        const auto least =
            std::min_element(unit.begin(), unit.end(), [](const auto& a, const auto& b) {
              return a.bytes < b.bytes;
            });
        return sum + least->bytes;
      });
}

std::vector<std::size_t> convex_hull(const AllocationUnit& unit) {
  if (unit.empty()) {
    throw std::logic_error("convex_hull: a unit without options");
  }
  std::vector<std::size_t> order(unit.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return std::tie(unit[a].bytes, unit[a].loss) < std::tie(unit[b].bytes, unit[b].loss);
  });
  std::vector<std::size_t> hull;
  for (const std::size_t next : order) {
    if (!hull.empty() && !(unit[next].loss < unit[hull.back()].loss)) {
      continue;  // takes more and loses no less
    }
    while (hull.size() > 1 && rate_between(unit[hull[hull.size() - 2]], unit[hull.back()]) <=
                                  rate_between(unit[hull.back()], unit[next])) {
      hull.pop_back();
    }
    hull.push_back(next);
  }
  return hull;
}

Allocation allocate(std::span<const AllocationUnit> units, std::uint64_t budget) {
  Allocation allocation;
  std::vector<std::vector<std::size_t>> hulls;
  std::vector<Step> steps;
  for (std::size_t u = 0; u < units.size(); ++u) {
    const std::vector<std::size_t>& hull = hulls.emplace_back(convex_hull(units[u]));
    allocation.choice.push_back(hull.front());
    allocation.bytes += units[u][hull.front()].bytes;
    for (std::size_t i = 0; i + 1 < hull.size(); ++i) {
      const AllocationOption& from = units[u][hull[i]];
      const AllocationOption& to = units[u][hull[i + 1]];
      steps.push_back({u, i, to.bytes - from.bytes, from.loss - to.loss});
    }
  }
  if (allocation.bytes > budget) {
    throw std::logic_error("allocate: the budget is below the smallest size");
  }
  // Steps of one unit stay in order: along its hull the rate falls.
  std::stable_sort(
      steps.begin(), steps.end(), [](const Step& a, const Step& b) { return a.rate() > b.rate(); });
  std::vector<std::size_t> reached(units.size(), 0);
  for (const Step& step : steps) {
    if (reached[step.unit] == step.position && step.bytes <= budget - allocation.bytes) {
      ++reached[step.unit];
      allocation.choice[step.unit] = hulls[step.unit][reached[step.unit]];
      allocation.bytes += step.bytes;
    }
  }
  for (std::size_t u = 0; u < units.size(); ++u) {
    allocation.loss += units[u][allocation.choice[u]].loss;
  }
  return allocation;
}

}  // namespace quern
