// SPDX-License-Identifier: Apache-2.0
#include "plan/recipes.h"

#include "base/error.h"

#include <algorithm>
#include <array>
#include <string>

namespace quern {

std::span<const Recipe> recipes() noexcept {
  static constexpr std::array kRecipes = {
      Recipe{
          .name = "rtn",
          .summary = "round to nearest; needs no calibration",
          .method = "rtn",
          .range = RangeSearch::kMinMax},
      Recipe{
          .name = "gptq",
          .summary = "error feedback with range search, descent and scale refit",
          .method = "gptq"},
      Recipe{
          .name = "gptaq",
          .summary = "gptq towards the unquantized model's outputs; a second forward pass",
          .method = "gptaq"},
      Recipe{
          .name = "awq",
          .summary = "channel factors, clipping by the output's error, round to nearest",
          .method = "awq",
          .transform = "awq",
          .range = RangeSearch::kOutput},
      Recipe{
          .name = "smoothquant",
          .summary = "integer weights and activations, outliers moved into the weights",
          .method = "smoothquant",
          .transform = "smoothquant",
          .range = RangeSearch::kAbsMax,
          .bits = 8,
          .group_size = 0,
          .activation_bits = 8},
      Recipe{
          .name = "billm",
          .summary = "one bit and a share of a second one, after column saliency",
          .method = "billm",
          .bits = 1},
      Recipe{
          .name = "best",
          .summary = "the lowest error that one pass reaches: factors, mismatch target, restart",
          .method = "gptq",
          .transform = "scale",
          .mismatch_target = true,
          .restarts = 1},
      Recipe{
          .name = "gasq",
          .summary = "best, with the precision of each linear by what it loses",
          .method = "gptq",
          .transform = "scale",
          .mismatch_target = true,
          .restarts = 1,
          .planned = true},
      // The setting of the published int4 Qwen3.5-122B-A10B, whose 256 experts a layer make nearly
      // all of the model; two sweeps in place of three with refits halve the time.
      Recipe{
          .name = "experts-int4",
          .summary = "4 bits in groups of 32 for routed experts, all else as it is",
          .method = "gptq",
          .group_size = 32,
          .order = ColumnOrder::kGroupAware,
          .descent_sweeps = 1,
          .refit_rounds = 0,
          .experts_only = true,
          .format = "compressed-tensors"},
  };
  return kRecipes;
}

const Recipe& find_recipe(std::string_view name) {
  const auto all = recipes();
  const auto found =
      std::find_if(all.begin(), all.end(), [&](const Recipe& each) { return each.name == name; });
  if (found == all.end()) {
    std::string known;
    for (const Recipe& each : all) {
      known += (known.empty() ? "" : ", ") + std::string(each.name);
    }
    throw UsageError(
        "unknown method",
        printable(std::string(name), 60),
        "expected one of " + known,
        "--method gptq");
  }
  return *found;
}

RangeSearch range_for(Role role, RangeSearch asked) noexcept {
  const bool scores = role == Role::kQuery || role == Role::kKey;
  return scores && asked == RangeSearch::kOutput ? RangeSearch::kMinMax : asked;
}

}  // namespace quern
