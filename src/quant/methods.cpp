// SPDX-License-Identifier: Apache-2.0
#include "quant/gptaq.h"
#include "quant/gptq.h"
#include "quant/method.h"
#include "quant/rtn.h"

#include <algorithm>
#include <array>

namespace quern {
namespace {

constexpr std::array kMethods = {
    Method{"rtn", "round to nearest; needs no calibration", 2, 8, false, false, quantize_rtn},
    Method{
        "gptq",
        "error feedback, coordinate descent and scale refit on second moments",
        2,
        8,
        true,
        false,
        quantize_gptq},
    Method{
        "gptaq",
        "gptq towards the outputs of the unquantized model (asymmetric calibration)",
        2,
        8,
        true,
        true,
        quantize_gptaq},
};

}  // namespace

std::span<const Method> methods() {
  return kMethods;
}

const Method* find_method(std::string_view name) {
  const auto* found = std::find_if(
      kMethods.begin(), kMethods.end(), [&](const Method& method) { return method.name == name; });
  return found == kMethods.end() ? nullptr : found;
}

std::string_view order_name(ColumnOrder order) {
  switch (order) {
    case ColumnOrder::kNatural: return "natural";
    case ColumnOrder::kActivation: return "activation";
    case ColumnOrder::kGroupAware: return "group-aware";
  }
  return "";
}

std::string_view range_name(RangeSearch range) {
  switch (range) {
    case RangeSearch::kMinMax: return "minmax";
    case RangeSearch::kPower24: return "power-2.4";
    case RangeSearch::kWeighted: return "weighted";
    case RangeSearch::kOutput: return "output";
    case RangeSearch::kAbsMax: return "absmax";
  }
  return "";
}

std::optional<RangeSearch> range_from_name(std::string_view name) {
  for (const RangeSearch range :
       {RangeSearch::kMinMax,
        RangeSearch::kPower24,
        RangeSearch::kWeighted,
        RangeSearch::kOutput,
        RangeSearch::kAbsMax}) {
    if (range_name(range) == name) {
      return range;
    }
  }
  return std::nullopt;
}

}  // namespace quern
