// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/context.h"
#include "quant/method.h"
#include "quant/site_stats.h"

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace quern {

// What the solvers need to know of H = X^T X / T beside its entries; methods.md 2.2. The matrix
// they work on is  rho H + (1 - rho) diag(H) + lambda mean(diag H) I  with the diagonal of dead
// inputs replaced by mean(diag H).
struct Curvature {
  const SiteStats* stats = nullptr;
  std::vector<float> importance;  // [n] diag(H), mean(diag H) for dead inputs
  double mean_diagonal = 0;
  double rho = 1;  // trust in what is off the diagonal; shrinkage.h
  std::int64_t dead_columns = 0;

  void shrink(double kappa) noexcept {
    const auto rows = static_cast<double>(stats->rows);
    rho = rows / (rows + kappa * static_cast<double>(stats->width));
  }

  // Entry (i, j) of the matrix without the damping.
  [[nodiscard]] double entry(std::int64_t i, std::int64_t j) const noexcept {
    return i == j ? static_cast<double>(importance[static_cast<std::size_t>(i)])
                  : rho * stats->H[static_cast<std::size_t>(i * stats->width + j)];
  }
};

// Why `stats` cannot steer a solver ("no calibration rows reached this input", "H has …"), or
// nothing when they can.
[[nodiscard]] std::optional<std::string> unusable(const SiteStats* stats, std::int64_t in_features);

// Whether H_holdout can judge a result.
[[nodiscard]] bool has_holdout(const SiteStats& stats);

[[nodiscard]] Curvature make_curvature(const SiteStats& stats);

// The whole matrix without damping, row-major, in float. On the pool.
[[nodiscard]] std::vector<float> dense_curvature(const Context& ctx, const Curvature& curvature);

// Position -> column: the order in which GPTQ visits the columns (methods.md 2.3.2). `group_width`
// only matters for kGroupAware, where a shorter last group stays at the end in natural order.
[[nodiscard]] std::vector<std::int32_t> column_order(
    ColumnOrder order, const std::vector<float>& importance, std::int64_t group_width);

// U with P^T (damped matrix)^-1 P = U^T U for the order P, upper triangular.
struct Factor {
  std::vector<float> Ut;  // [n, n] row-major, the transpose: row k holds U[0…k][k]
  std::vector<float> inverse_diagonal;  // [n] 1 / U_kk
  double lambda = 0;
};

// Tries the damping ladder {l, 2 l, 5 l, 0.1, 0.3, 1}; nothing when every step fails. By one
// Cholesky factorisation of the reversed matrix and one triangular inverse (methods.md 2.2.3), in
// double up to 8192 columns.
[[nodiscard]] std::optional<Factor> factorise(
    const Context& ctx,
    const Curvature& curvature,
    const std::vector<std::int32_t>& order,
    double damping);

}  // namespace quern
