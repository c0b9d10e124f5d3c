// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace quern {

// How large a mixed-precision result may be.
struct SizeBudget {
  enum class Unit {
    kNone,  // no budget: every linear alike
    kBitsPerWeight,  // every stored byte of the model over its parameters
    kLinearBitsPerWeight,  // the tensors of the quantized linears over their weights
    kFileBytes,  // all weight files together
    kMemoryBytes,  // weights, the cache of `context` tokens and what the program needs
    kUniform,  // what all linears alike, as asked for, would take
  };
  Unit unit = Unit::kNone;
  double bits = 0;  // of the units in bits
  std::uint64_t bytes = 0;  // of the units in bytes
  std::int64_t context = 4096;  // tokens, of kMemoryBytes

  [[nodiscard]] bool given() const noexcept { return unit != Unit::kNone; }
};

// What a plan for a budget is chosen from. What the format cannot hold is left out.
struct PlanningOptions {
  SizeBudget budget;
  std::vector<int> bits = {2, 3, 4, 5, 6, 8};
  std::vector<std::int64_t> group_sizes = {32, 64, 128};
  std::vector<bool> symmetric = {true, false};
  std::optional<bool> fused_alike;  // nothing: when the format demands it
  bool choose_tables = true;  // embedding and head too, where the budget counts them
  bool check_additivity = true;
};

}  // namespace quern
