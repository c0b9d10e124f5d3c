// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/context.h"
#include "quant/quantized_matrix.h"
#include "quant/scheme.h"
#include "quant/site_stats.h"

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace quern {

// How the range (scale, zero point) of a group is found before any code is chosen; methods.md 1.2.
enum class RangeSearch {
  kMinMax,  // the extremes of the group
  kPower24,  // shrink p = 1 - i/100, i = 0…79, minimising sum |q - w|^2.4 (GPTQ's "mse")
  kWeighted,  // the same kind of search, minimising sum diag(H)_j (q_j - w_j)^2, finer grid
  kOutput,  // from there on to the least error of the group's part of the output (clipping.h)
  kAbsMax,  // symmetric: scale = max |w| / (2^(bits-1)-1) (SmoothQuant); asymmetric: kMinMax
};

enum class ColumnOrder {
  kNatural,
  kActivation,  // falling diag(H), groups stay those of the file ("static groups")
  kGroupAware,  // columns by falling diag(H) inside a group, groups by their largest entry
};

// What an expert of a mixture is rounded on that calibration hardly reaches.
enum class RareExperts {
  kPooled,  // its own rows and those that came closest to being sent to it
  kRtn,  // plain rounding, as other tools do
};

// What a method may be told. The defaults are quern's recommended GPTQ.
struct MethodOptions {
  RangeSearch range = RangeSearch::kWeighted;
  ColumnOrder order = ColumnOrder::kActivation;
  double damping = 0.01;  // lambda_0: H_jj += lambda * mean(diag H); the ladder goes up from it
  int descent_sweeps = 3;  // coordinate-descent sweeps after the recursion
  int refit_rounds = 3;  // rounds of (closed-form scale refit, 2 sweeps)
  StorageRules storage;  // of the format that is written
  // Further rounds of recursion and descent, each from the scales that the last one ended with; the
  // better rows are kept. One costs as much as the first pass and lowers the error by 1 to 3 %.
  int restarts = 0;
  std::optional<double> shrinkage;  // kappa of shrinkage.h; nothing: estimated
  // Round towards what W does in the unquantized model (mismatch.h); needs the second stream of
  // activations, which costs another forward pass.
  bool mismatch_target = false;
  std::optional<double> mismatch_strength;  // tau; nothing: chosen on the held-out rows
  RareExperts rare_experts = RareExperts::kPooled;
  double asymmetry = 0.25;  // alpha of gptaq.h: GPTQModel's default, 1 in the paper
};

// One linear to be rounded. W is [out_features, in_features], row-major.
struct LinearProblem {
  std::span<const float> W;
  std::int64_t out_features = 0;
  std::int64_t in_features = 0;
  const SiteStats* stats = nullptr;  // null: data-free
  QuantScheme scheme;
  // [out_features, in_features]; what the codes should come close to instead of W (mismatch.h).
  // Empty: W itself.
  std::span<const float> target = {};
  std::optional<RangeSearch> range = {};  // instead of MethodOptions::range

  [[nodiscard]] std::span<const float> goal() const noexcept { return target.empty() ? W : target; }
};

[[nodiscard]] inline RangeSearch range_of(
    const LinearProblem& problem, const MethodOptions& options) noexcept {
  return problem.range.value_or(options.range);
}

// What plain rounding with one way to find ranges would have given.
struct RangeError {
  RangeSearch range = RangeSearch::kMinMax;
  double error = 0;  // relative, on H
};

// What happened, for the manifest. Errors are tr((W-Q) H (W-Q)^T) / tr(W H W^T).
struct LinearReport {
  std::string method;  // what the result is: "gptq", or "rtn" after a fallback
  std::string order;  // "natural", "activation", "group-aware"
  double damping = 0;  // lambda that the factorisation took; 0: none was made
  std::int64_t tokens = 0;  // rows behind H
  std::int64_t borrowed_tokens = 0;  // of other experts, joined to them for a rare one
  std::int64_t dead_columns = 0;  // inputs that calibration never saw active
  double relative_error = 0;  // on H; without statistics |W-Q|^2 / |W|^2
  std::optional<double> holdout_error;  // on H_holdout
  std::optional<double> rtn_error;  // of plain RTN on H, for comparison
  std::optional<std::string> fallback;  // why the method asked for was not used
  double mismatch_strength = 0;  // tau of mismatch.h
  double trust = 1;  // rho, by which the off-diagonal of H was multiplied (shrinkage.h)
  // Mean of scale / min-max scale over the groups; nothing for grids that have no scale.
  std::optional<double> clip_threshold;
  std::vector<RangeError> range_errors;  // where they were compared (clipping.h)
};

struct LinearResult {
  std::shared_ptr<const QuantizedMatrix> matrix;
  LinearReport report;
};

// One rounding method; one line in methods.cpp. Rows are independent and spread over ctx.pool; the
// result is the same for any thread count.
struct Method {
  std::string_view name;
  std::string_view summary;
  int min_bits;
  int max_bits;
  bool needs_statistics;
  bool error_feedback;  // later columns make up for what earlier ones lost
  bool needs_reference;  // SiteStats::G, which takes the second stream of activations
  std::string_view kind;  // of the matrices that it makes of a scheme without ggml type
  LinearResult (*quantize)(
      const Context& ctx, const LinearProblem& problem, const MethodOptions& options);
};

[[nodiscard]] std::span<const Method> methods();
[[nodiscard]] const Method* find_method(std::string_view name);

[[nodiscard]] std::string_view order_name(ColumnOrder order);
[[nodiscard]] std::string_view range_name(RangeSearch range);
[[nodiscard]] std::optional<RangeSearch> range_from_name(std::string_view name);

}  // namespace quern
