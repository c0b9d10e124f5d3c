// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "model/graph.h"
#include "quant/method.h"

#include <cstdint>
#include <span>
#include <string_view>

namespace quern {

// A named set of choices for a whole run, which `--method` and `--recipe` take; every choice can be
// overridden. One line of the list in recipes.cpp.
struct Recipe {
  std::string_view name;
  std::string_view summary;
  std::string_view method;  // of quant/method.h
  std::string_view transform = "";  // of quant/scaling.h; empty: none
  RangeSearch range = RangeSearch::kWeighted;
  int bits = 4;
  std::int64_t group_size = 128;  // 0: the whole row
  int activation_bits = 16;
  bool mismatch_target = false;
  int restarts = 0;
  ColumnOrder order = ColumnOrder::kActivation;
  int descent_sweeps = 3;
  int refit_rounds = 3;
  bool experts_only = false;  // routed experts; everything else keeps its floats
  std::string_view format = "gptq";  // that it is written in
  bool planned = false;  // precision by what each linear loses, at the size of all alike
};

[[nodiscard]] std::span<const Recipe> recipes() noexcept;
// Throws UsageError, with the known names.
[[nodiscard]] const Recipe& find_recipe(std::string_view name);

// How the ranges of a linear of this role are found where kOutput is asked for: q and k are not
// clipped, as AWQ has it, because attention scores amplify what clipping does (methods.md 4.4).
[[nodiscard]] RangeSearch range_for(Role role, RangeSearch asked) noexcept;

}  // namespace quern
