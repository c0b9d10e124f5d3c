// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "quant/curvature.h"
#include "quant/method.h"

#include <cstdint>
#include <span>
#include <vector>

namespace quern {

// GPTAQ (arXiv 2504.02692; methods.md 2.4): the target of the recursion is W X~^T, the outputs of
// the unquantized model, instead of W X^T. With D = (1/T) (X~ - X)^T X = (G - H)^T and
//   P = alpha triu(D U^T, strictly upper) U
// column j, before it is rounded, pulls the later ones by w_j P[j, :]; w_j is the value before
// rounding everywhere. What follows the recursion works towards W + alpha (W G^T H^-1 - W), the
// least-squares target of the same strength (mismatch.h). Needs SiteStats::G; without it the result
// is GPTQ's, and the report says so.
[[nodiscard]] LinearResult quantize_gptaq(
    const Context& ctx, const LinearProblem& problem, const MethodOptions& options);

// The recursion w_k = W_k - sum_{j<k} e_j U_jk + sum_{j<k} w_j P_jk is linear in what precedes it,
// so it is GPTQ's own with other numbers: w = W (I - P)^-1 - e U (I - P)^-1, without the diagonal
// of U. Puts that U into factor.Ut and returns W (I - P)^-1, by columns of W [rows, width].
[[nodiscard]] std::vector<float> apply_asymmetry(
    const Context& ctx,
    const SiteStats& stats,
    const std::vector<std::int32_t>& order,
    double alpha,
    std::span<const float> W,
    Factor& factor);

}  // namespace quern
