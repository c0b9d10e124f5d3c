// SPDX-License-Identifier: Apache-2.0
#include "quant/curvature.h"

#include "kernels/blas.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>

namespace quern {
namespace {

constexpr std::int64_t kLargestDouble = 8192;  // columns; methods.md 1.3
constexpr std::int64_t kRowsPerChunk = 64;

std::vector<double> damping_ladder(double first) {
  std::vector<double> ladder = {first};
  for (const double next : {2 * first, 5 * first, 0.1, 0.3, 1.0}) {
    if (next > ladder.back()) {
      ladder.push_back(next);
    }
  }
  return ladder;
}

template <class Real>
std::optional<Factor> try_factorise(
    const Context& ctx,
    const Curvature& curvature,
    const std::vector<std::int32_t>& order,
    double lambda) {
  const auto n = static_cast<std::int64_t>(order.size());
  const double shift = lambda * curvature.mean_diagonal;
  // Reversed: A[i][k] belongs to positions n-1-i and n-1-k. Only the lower triangle is needed.
  std::vector<Real> A(static_cast<std::size_t>(n * n));
  ctx.pool.for_chunks(n, kRowsPerChunk, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t row = order[static_cast<std::size_t>(n - 1 - i)];
      Real* out = A.data() + i * n;
      for (std::int64_t k = 0; k < i; ++k) {
        out[k] =
            static_cast<Real>(curvature.entry(row, order[static_cast<std::size_t>(n - 1 - k)]));
      }
      out[i] = static_cast<Real>(curvature.entry(row, row) + shift);
    }
  });
  if (!ctx.blas.cholesky_lower(n, A.data(), n) || !ctx.blas.invert_lower(n, A.data(), n)) {
    return std::nullopt;
  }
  for (std::int64_t i = 0; i < n; ++i) {
    const Real pivot = A[static_cast<std::size_t>(i * n + i)];
    if (!std::isfinite(pivot) || pivot <= 0) {
      return std::nullopt;
    }
  }
  Factor factor;
  factor.lambda = lambda;
  factor.Ut.resize(static_cast<std::size_t>(n * n));
  factor.inverse_diagonal.resize(static_cast<std::size_t>(n));
  // U = J L^-1 J, so U[j][k] = L^-1[n-1-j][n-1-k]. By strips, because it is a transposition.
  ctx.pool.for_chunks(n, kRowsPerChunk, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t j = 0; j < end; ++j) {
      const Real* from = A.data() + (n - 1 - j) * n;
      for (std::int64_t k = std::max(begin, j); k < end; ++k) {
        factor.Ut[static_cast<std::size_t>(k * n + j)] = static_cast<float>(from[n - 1 - k]);
      }
    }
    for (std::int64_t k = begin; k < end; ++k) {
      factor.inverse_diagonal[static_cast<std::size_t>(k)] =
          static_cast<float>(1 / A[static_cast<std::size_t>((n - 1 - k) * (n + 1))]);
    }
  });
  return factor;
}

}  // namespace

std::optional<std::string> unusable(const SiteStats* stats, std::int64_t in_features) {
  if (stats == nullptr || stats->H.empty()) {
    return "no calibration statistics for this input";
  }
  if (stats->rows <= 0) {
    return "no calibration rows reached this input";
  }
  if (stats->width != in_features ||
      stats->H.size() != static_cast<std::size_t>(in_features * in_features)) {
    return fmt::format(
        "the statistics are for {} inputs, the linear has {}", stats->width, in_features);
  }
  // One sum sees every NaN and infinity.
  const double sum = std::accumulate(stats->H.begin(), stats->H.end(), 0.0);
  if (!std::isfinite(sum)) {
    return "H holds NaN or infinity";
  }
  double trace = 0;
  for (std::int64_t j = 0; j < in_features; ++j) {
    const double diagonal = stats->H[static_cast<std::size_t>(j * (in_features + 1))];
    if (diagonal < 0) {
      return fmt::format("H has a negative diagonal entry at input {}", j);
    }
    trace += diagonal;
  }
  if (!(trace > 0)) {
    return "every calibration input was zero";
  }
  return std::nullopt;
}

bool has_holdout(const SiteStats& stats) {
  return stats.holdout_rows > 0 && stats.H_holdout.size() == stats.H.size() &&
         std::isfinite(std::accumulate(stats.H_holdout.begin(), stats.H_holdout.end(), 0.0));
}

Curvature make_curvature(const SiteStats& stats) {
  const std::int64_t n = stats.width;
  Curvature curvature;
  curvature.stats = &stats;
  curvature.importance.resize(static_cast<std::size_t>(n));
  double trace = 0;
  for (std::int64_t j = 0; j < n; ++j) {
    trace += stats.H[static_cast<std::size_t>(j * (n + 1))];
  }
  curvature.mean_diagonal = trace / static_cast<double>(n);
  for (std::int64_t j = 0; j < n; ++j) {
    const double diagonal = stats.H[static_cast<std::size_t>(j * (n + 1))];
    const bool dead = diagonal == 0;
    curvature.dead_columns += dead ? 1 : 0;
    curvature.importance[static_cast<std::size_t>(j)] =
        static_cast<float>(dead ? curvature.mean_diagonal : diagonal);
  }
  return curvature;
}

std::vector<float> dense_curvature(const Context& ctx, const Curvature& curvature) {
  const std::int64_t n = curvature.stats->width;
  std::vector<float> H(static_cast<std::size_t>(n * n));
  ctx.pool.for_chunks(n, kRowsPerChunk, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t i = begin; i < end; ++i) {
      float* row = H.data() + i * n;
      for (std::int64_t j = 0; j < n; ++j) {
        row[j] = static_cast<float>(curvature.entry(i, j));
      }
    }
  });
  return H;
}

std::vector<std::int32_t> column_order(
    ColumnOrder order, const std::vector<float>& importance, std::int64_t group_width) {
  const auto n = static_cast<std::int64_t>(importance.size());
  std::vector<std::int32_t> columns(importance.size());
  std::iota(columns.begin(), columns.end(), 0);
  const auto heavier = [&](std::int32_t a, std::int32_t b) {
    return importance[static_cast<std::size_t>(a)] > importance[static_cast<std::size_t>(b)];
  };
  if (order == ColumnOrder::kActivation) {
    std::stable_sort(columns.begin(), columns.end(), heavier);
  }
  if (order != ColumnOrder::kGroupAware) {
    return columns;
  }
  const std::int64_t whole_groups = n / group_width;
  std::vector<std::int32_t> groups(static_cast<std::size_t>(whole_groups));
  std::iota(groups.begin(), groups.end(), 0);
  for (std::int64_t group = 0; group < whole_groups; ++group) {
    const auto begin = columns.begin() + group * group_width;
    std::stable_sort(begin, begin + group_width, heavier);
  }
  // After the inner sort a group's first column is its heaviest.
  std::stable_sort(groups.begin(), groups.end(), [&](std::int32_t a, std::int32_t b) {
    return heavier(
        columns[static_cast<std::size_t>(a * group_width)],
        columns[static_cast<std::size_t>(b * group_width)]);
  });
  std::vector<std::int32_t> result;
  result.reserve(columns.size());
  for (const std::int32_t group : groups) {
    const auto begin = columns.begin() + group * group_width;
    result.insert(result.end(), begin, begin + group_width);
  }
  result.insert(result.end(), columns.begin() + whole_groups * group_width, columns.end());
  return result;
}

std::optional<Factor> factorise(
    const Context& ctx,
    const Curvature& curvature,
    const std::vector<std::int32_t>& order,
    double damping) {
  for (const double lambda : damping_ladder(damping)) {
    std::optional<Factor> factor = static_cast<std::int64_t>(order.size()) <= kLargestDouble
                                       ? try_factorise<double>(ctx, curvature, order, lambda)
                                       : try_factorise<float>(ctx, curvature, order, lambda);
    if (factor) {
      return factor;
    }
  }
  return std::nullopt;
}

}  // namespace quern
