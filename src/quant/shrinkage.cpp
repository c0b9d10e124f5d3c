// SPDX-License-Identifier: Apache-2.0
#include "quant/shrinkage.h"

#include "quant/curvature.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace quern {
namespace {

constexpr double kSolverFactor = 0.7;
constexpr double kPriorRows = 2048;  // held-out rows that weigh as much as kDefaultKappa

// What H and H_holdout alone say.
double sampled_kappa(const SiteStats& stats) {
  const std::int64_t n = stats.width;
  const auto T = static_cast<double>(stats.rows);
  const auto held = static_cast<double>(stats.holdout_rows);
  // Both are turned into correlations by their common diagonal.
  std::vector<double> inverse_root(static_cast<std::size_t>(n));
  for (std::int64_t j = 0; j < n; ++j) {
    const auto at = static_cast<std::size_t>(j * (n + 1));
    const double pooled = (T * stats.H[at] + held * stats.H_holdout[at]) / (T + held);
    inverse_root[static_cast<std::size_t>(j)] = pooled > 0 ? 1 / std::sqrt(pooled) : 0.0;
  }
  double signal = 0;  // sum of squared true correlations: the noise of the samples is independent
  double difference = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j < i; ++j) {
      const auto at = static_cast<std::size_t>(i * n + j);
      const double scale =
          inverse_root[static_cast<std::size_t>(i)] * inverse_root[static_cast<std::size_t>(j)];
      const double a = scale * stats.H[at];
      const double b = scale * stats.H_holdout[at];
      signal += a * b;
      difference += (a - b) * (a - b);
    }
  }
  if (!(signal > 0)) {
    return kLargestKappa;
  }
  const double variance = difference / (1 / T + 1 / held);  // of one row
  return std::clamp(
      kSolverFactor * variance / (signal * static_cast<double>(n)), kSmallestKappa, kLargestKappa);
}

}  // namespace

double estimate_kappa(const SiteStats& stats) {
  if (!has_holdout(stats)) {
    return kDefaultKappa;
  }
  const auto held = static_cast<double>(stats.holdout_rows);
  const double weight = held / (held + kPriorRows);
  return std::exp(weight * std::log(sampled_kappa(stats)) + (1 - weight) * std::log(kDefaultKappa));
}

}  // namespace quern
