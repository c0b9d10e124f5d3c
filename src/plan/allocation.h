// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace quern {

// One way to store a unit: what it takes and what it loses.
struct AllocationOption {
  std::uint64_t bytes = 0;
  double loss = 0;
};

// What is decided as one: a linear, or linears that must be treated alike. At least one option.
using AllocationUnit = std::vector<AllocationOption>;

struct Allocation {
  std::vector<std::size_t> choice;  // the option of each unit
  std::uint64_t bytes = 0;
  double loss = 0;
};

// The fewest bytes that the units can take.
[[nodiscard]] std::uint64_t smallest_bytes(std::span<const AllocationUnit> units);

// The steps along the lower convex hull of a unit's options, from the fewest bytes on: indices of
// options, bytes rising, loss falling, and falling less per byte from step to step.
[[nodiscard]] std::vector<std::size_t> convex_hull(const AllocationUnit& unit);

// min sum of losses with sum of bytes <= budget (methods.md 11.3). For every multiplier mu the
// minimum of loss + mu bytes takes exactly the hull steps that gain more than mu per byte, so
// instead of bisecting mu the steps of all units are taken in falling order of gain per byte; a
// step that no longer fits is left out, with what would follow it, and smaller ones fill the rest.
// The loss is less than one step above the optimum, and never rises with the budget: at the first
// step in which two budgets differ, the larger one gains at least as much as the smaller one can
// gain with all it has left. Deterministic.
//
// std::logic_error when the budget is below smallest_bytes or a unit has no option.
[[nodiscard]] Allocation allocate(std::span<const AllocationUnit> units, std::uint64_t budget);

}  // namespace quern
