// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/context.h"
#include "quant/method.h"
#include "quant/site_stats.h"

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

namespace quern {

// Estimates of what rounding will cost, without a solver: channel factors and plans are chosen by
// them.

// Evenly spaced rows of a linear.
struct RowSample {
  std::vector<float> W;  // [rows, width]
  std::vector<double> weights;  // [rows] what a squared error of the row counts for
  std::int64_t rows = 0;
  std::int64_t width = 0;
};

// Row `row` of a linear, as floats, into `out` [width].
using RowReader = std::function<void(std::int64_t row, std::span<float> out)>;
[[nodiscard]] RowReader rows_of(std::span<const float> W);  // W must outlive it

// At most `most` of out_features rows. Weights are those of `row_weights`
// [out_features] (empty: 1), scaled to the sum over all rows: rows differ more in what they count
// for than in their error.
[[nodiscard]] RowSample sample_rows(
    const RowReader& read,
    std::int64_t out_features,
    std::int64_t width,
    std::span<const double> row_weights,
    std::int64_t most);

// sum over rows i and columns j of weights_i (d_j / s_j^2) (Q(W s) - W s)_ij^2 with d [width] the
// importance of the columns and s [width] channel factors (empty: 1); Q rounds to nearest with the
// ranges of options.range.
[[nodiscard]] double rounding_error(
    const Context& ctx,
    const RowSample& sample,
    const QuantScheme& scheme,
    std::span<const double> importance,
    std::span<const float> factors,
    const MethodOptions& options);

// diag(H), its mean for dead inputs: the importance of columns for plain rounding.
[[nodiscard]] std::vector<double> input_variances(const SiteStats& stats);

// What error feedback leaves of diag(H): the variance of each input given those that are rounded
// after it, 1 / U_jj^2. The error of GPTQ is the sum of squared rounding errors weighted by these.
[[nodiscard]] std::vector<double> conditional_variances(
    const Context& ctx, const SiteStats& stats, const MethodOptions& options);

}  // namespace quern
