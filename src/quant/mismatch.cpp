// SPDX-License-Identifier: Apache-2.0
#include "quant/mismatch.h"

#include "kernels/blas.h"
#include "quant/curvature.h"
#include "quant/shrinkage.h"

#include <algorithm>
#include <numeric>

namespace quern {
namespace {

// tau when nothing was held out that could choose it (GPTAQ's default strength).
constexpr double kUnjudgedStrength = 0.25;
constexpr std::int64_t kRows = 64;

// Y [rows, n] = A [rows, n] B^T (or A B), by row chunks on the pool.
std::vector<float> product(
    const Context& ctx,
    std::span<const float> A,
    std::int64_t rows,
    std::int64_t n,
    const std::vector<float>& B,
    bool transpose) {
  std::vector<float> Y(static_cast<std::size_t>(rows * n));
  ctx.pool.for_chunks(rows, kRows, [&](std::int64_t begin, std::int64_t end, int) {
    ctx.blas.gemm(
        false,
        transpose,
        end - begin,
        n,
        n,
        1.0F,
        A.data() + begin * n,
        n,
        B.data(),
        n,
        0.0F,
        Y.data() + begin * n,
        n);
  });
  return Y;
}

double inner(const std::vector<float>& a, std::span<const float> b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    sum += static_cast<double>(a[i]) * b[i];
  }
  return sum;
}

// H^-1 (G - H), with H shrunk and damped as the solvers see it.
std::optional<std::vector<float>> solve_correction(
    const Context& ctx, const SiteStats& stats, const MethodOptions& options) {
  const std::int64_t n = stats.width;
  Curvature curvature = make_curvature(stats);
  curvature.shrink(options.shrinkage.value_or(estimate_kappa(stats)));
  std::vector<double> A(static_cast<std::size_t>(n * n));
  std::vector<double> B(A.size());
  for (const double damping : {options.damping, 0.1, 1.0}) {
    const double shift = damping * curvature.mean_diagonal;
    ctx.pool.for_chunks(n, kRows, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t i = begin; i < end; ++i) {
        for (std::int64_t j = 0; j < n; ++j) {
          const auto at = static_cast<std::size_t>(i * n + j);
          A[at] = curvature.entry(i, j) + (i == j ? shift : 0.0);
          B[at] = stats.G[at] - stats.H[at];
        }
      }
    });
    if (!ctx.blas.cholesky_lower(n, A.data(), n)) {
      continue;
    }
    ctx.pool.for_chunks(n, 128, [&](std::int64_t begin, std::int64_t end, int) {
      ctx.blas.solve_cholesky_lower(n, end - begin, A.data(), n, B.data() + begin, n);
    });
    return std::vector<float>(B.begin(), B.end());
  }
  return std::nullopt;
}

}  // namespace

std::optional<MismatchCorrection> MismatchCorrection::make(
    const Context& ctx, const SiteStats& stats, const MethodOptions& options) {
  if (stats.G.empty() || unusable(&stats, stats.width)) {
    return std::nullopt;
  }
  std::optional<std::vector<float>> correction = solve_correction(ctx, stats, options);
  if (!correction) {
    return std::nullopt;
  }
  MismatchCorrection made;
  made.stats_ = &stats;
  made.correction_ = std::move(*correction);
  made.fixed_strength_ = options.mismatch_strength;
  if (has_holdout(stats) && !stats.G_holdout.empty()) {
    made.holdout_.assign(stats.H_holdout.begin(), stats.H_holdout.end());
    made.difference_.resize(made.holdout_.size());
    std::transform(
        stats.H_holdout.begin(),
        stats.H_holdout.end(),
        stats.G_holdout.begin(),
        made.difference_.begin(),
        [](double h, double g) { return static_cast<float>(h - g); });
  }
  return made;
}

MismatchCorrection::Target MismatchCorrection::target(
    const Context& ctx, std::span<const float> W, std::int64_t rows) const {
  const std::int64_t n = stats_->width;
  const std::vector<float> D = product(ctx, W, rows, n, correction_, true);
  double strength = kUnjudgedStrength;
  if (fixed_strength_) {
    strength = *fixed_strength_;
  } else if (!holdout_.empty()) {
    // d/dtau of tr((W + tau D) H (W + tau D)^T) - 2 tr((W + tau D) G W^T) on the held-out rows.
    const double curvature = inner(product(ctx, D, rows, n, holdout_, false), D);
    const double slope = inner(product(ctx, D, rows, n, difference_, false), W);
    strength = curvature > 0 ? std::clamp(-slope / curvature, 0.0, 1.0) : 0.0;
  }
  Target target{{W.begin(), W.end()}, strength};
  for (std::size_t i = 0; i < target.W.size(); ++i) {
    target.W[i] += static_cast<float>(strength) * D[i];
  }
  return target;
}

}  // namespace quern
