// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/context.h"
#include "model/graph.h"
#include "plan/quant_plan.h"
#include "quant/method.h"
#include "quant/rounding_error.h"
#include "quant/scaling.h"
#include "quant/site_stats.h"

#include <cstdint>
#include <span>
#include <vector>

namespace quern {

// What rounding each linear costs, in one unit: the increase of the mean KL divergence from the
// unquantized model, in nats per token. To second order, with delta_t the gradient of the loss of
// sampled labels at the outputs of a linear (their second moment is the Fisher information;
// methods.md 11.1 and 12, GuidedQuant, arXiv 2505.07004),
//
//   KL = 1/2 sum_i E_t[delta_ti^2 (dW_i x_t)^2],
//
// and with  E_t[delta_ti^2 x_t x_t^T] = r_i H,  H the second moment of the inputs weighted by the
// mean of delta_ti^2 over the outputs and r_i the share of output i in it:  1/2 sum_i r_i dW_i H
// dW_i^T. Error feedback leaves of H the conditional variances of the inputs (rounding_error.h).

// Rows of a linear that its options are tried on, at most.
inline constexpr std::int64_t kScoredRows = 128;

// What is known of one linear.
struct LinearEvidence {
  RowReader rows;  // of W [out, in]
  const SiteStats* H = nullptr;  // (1/rows) sum_t mean_i(delta_ti^2) x_t x_t^T
  std::span<const double> delta_square;  // [out] sum_t delta_ti^2
  std::span<const PlanOption> options;  // `loss` is what is asked for
};

struct LinearScore {
  std::vector<double> losses;  // one per option
  // 1/2 sum_i row_weights_i sum_j variances_j dW_ij^2 is the loss of errors that are independent of
  // each other.
  std::vector<double> row_weights;  // [out] r_i
  std::vector<double> variances;  // [in] diag(H)
  std::vector<float> factors;  // [in] by which the columns are multiplied before rounding; empty: 1
};

// A linear by itself: one that is no part of a block, such as the head.
[[nodiscard]] LinearScore score_linear(
    const Context& ctx,
    const LinearEvidence& linear,
    const std::vector<float>& factors,
    const MethodOptions& options);

// Losses of a table whose rows are looked up, one per option: 1/2 sum_j g_j mean_v dE_vj^2 with
// g [width] the mean squares of the gradients at what is looked up.
[[nodiscard]] std::vector<double> score_lookup(
    const Context& ctx,
    const RowReader& rows,
    std::int64_t count,
    std::span<const double> gradient_squares,
    std::span<const PlanOption> options,
    const MethodOptions& method_options);

// The linears of one site, in its order. With a transform they are rounded after the channel
// factors that it finds for their options of middling size.
[[nodiscard]] std::vector<LinearScore> score_site(
    const Context& ctx,
    const Block& block,
    int site,
    std::span<const LinearEvidence> linears,
    const Transform* transform,
    const MethodOptions& options);

}  // namespace quern
