// SPDX-License-Identifier: Apache-2.0
#include "quant/billm.h"
#include "quant/billm_matrix.h"
#include "quant/gptaq.h"
#include "quant/gptq.h"
#include "quant/method.h"
#include "quant/packed_linear.h"
#include "quant/rtn.h"

#include <algorithm>
#include <array>

namespace quern {
namespace {

// AWQ and SmoothQuant round to nearest: what makes them is the transform before it (scaling.h) and
// the way to find ranges.
template <const char* kName>
LinearResult round_after_transform(
    const Context& ctx, const LinearProblem& problem, const MethodOptions& options) {
  LinearResult result = quantize_rtn(ctx, problem, options);
  result.report.method = kName;
  return result;
}
constexpr char kAwq[] = "awq";
constexpr char kSmoothQuant[] = "smoothquant";

constexpr std::array kMethods = {
    Method{
        .name = "rtn",
        .summary = "round to nearest; needs no calibration",
        .min_bits = 2,
        .max_bits = 8,
        .needs_statistics = false,
        .error_feedback = false,
        .needs_reference = false,
        .kind = PackedLinear::kKind,
        .quantize = quantize_rtn},
    Method{
        .name = "gptq",
        .summary = "error feedback, coordinate descent and scale refit on second moments",
        .min_bits = 2,
        .max_bits = 8,
        .needs_statistics = true,
        .error_feedback = true,
        .needs_reference = false,
        .kind = PackedLinear::kKind,
        .quantize = quantize_gptq},
    Method{
        .name = "gptaq",
        .summary = "gptq towards the outputs of the unquantized model (asymmetric calibration)",
        .min_bits = 2,
        .max_bits = 8,
        .needs_statistics = true,
        .error_feedback = true,
        .needs_reference = true,
        .kind = PackedLinear::kKind,
        .quantize = quantize_gptaq},
    Method{
        .name = kAwq,
        .summary = "round to nearest after channel factors (AWQ)",
        .min_bits = 2,
        .max_bits = 8,
        .needs_statistics = true,
        .error_feedback = false,
        .needs_reference = false,
        .kind = PackedLinear::kKind,
        .quantize = round_after_transform<kAwq>},
    Method{
        .name = kSmoothQuant,
        .summary = "round to nearest after factors for integer activations",
        .min_bits = 4,
        .max_bits = 8,
        .needs_statistics = true,
        .error_feedback = false,
        .needs_reference = false,
        .kind = PackedLinear::kKind,
        .quantize = round_after_transform<kSmoothQuant>},
    Method{
        .name = "billm",
        .summary = "binary, salient columns twice, the others in two groups (BiLLM)",
        .min_bits = 1,
        .max_bits = 1,
        .needs_statistics = true,
        .error_feedback = true,
        .needs_reference = false,
        .kind = BillmMatrix::kKind,
        .quantize = quantize_billm},
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
