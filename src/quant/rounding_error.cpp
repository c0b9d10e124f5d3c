// SPDX-License-Identifier: Apache-2.0
#include "quant/rounding_error.h"

#include "quant/curvature.h"
#include "quant/row_block.h"

#include <algorithm>
#include <numeric>
#include <optional>

namespace quern {

RowReader rows_of(std::span<const float> W) {
  return [W](std::int64_t row, std::span<float> out) {
    const auto first = W.begin() + row * static_cast<std::int64_t>(out.size());
    std::copy(first, first + static_cast<std::int64_t>(out.size()), out.begin());
  };
}

RowSample sample_rows(
    const RowReader& read,
    std::int64_t out_features,
    std::int64_t width,
    std::span<const double> row_weights,
    std::int64_t most) {
  RowSample sample;
  sample.rows = std::min(out_features, most);
  sample.width = width;
  sample.W.resize(static_cast<std::size_t>(sample.rows * width));
  for (std::int64_t r = 0; r < sample.rows; ++r) {
    const std::int64_t row = r * out_features / sample.rows;
    read(
        row,
        std::span(sample.W).subspan(
            static_cast<std::size_t>(r * width), static_cast<std::size_t>(width)));
    sample.weights.push_back(
        row_weights.empty() ? 1.0 : row_weights[static_cast<std::size_t>(row)]);
  }
  const auto sum = [](std::span<const double> values) {
    return std::accumulate(values.begin(), values.end(), 0.0);
  };
  const double all = row_weights.empty() ? static_cast<double>(out_features) : sum(row_weights);
  const double sampled = sum(sample.weights);
  for (double& weight : sample.weights) {
    weight *= sampled > 0 ? all / sampled : 0.0;
  }
  return sample;
}

double rounding_error(
    const Context& ctx,
    const RowSample& sample,
    const QuantScheme& scheme,
    std::span<const double> importance,
    std::span<const float> factors,
    const MethodOptions& options) {
  const std::int64_t n = sample.width;
  std::vector<float> W = sample.W;
  std::vector<float> weights(importance.begin(), importance.end());
  if (!factors.empty()) {
    for (std::size_t i = 0; i < W.size(); ++i) {
      W[i] *= factors[i % factors.size()];
    }
    for (std::size_t j = 0; j < factors.size(); ++j) {
      const double factor = factors[j];
      weights[j] = static_cast<float>(importance[j] / (factor * factor));
    }
  }
  LinearProblem problem;
  problem.W = W;
  problem.out_features = sample.rows;
  problem.in_features = n;
  problem.scheme = scheme;
  const GridRules rules = grid_rules(scheme, options);
  constexpr std::int64_t kRows = 64;
  std::vector<double> sums(static_cast<std::size_t>((sample.rows + kRows - 1) / kRows));
  ctx.pool.for_chunks(sample.rows, kRows, [&](std::int64_t begin, std::int64_t end, int) {
    RowBlock block = RowBlock::load(problem, begin, end);
    block.find_all_ranges(ctx.kernels, scheme, rules, weights.data());
    block.round_all(ctx.kernels, scheme);
    double sum = 0;
    for (std::int64_t j = 0; j < n; ++j) {
      double column = 0;
      for (std::int64_t r = 0; r < block.rows; ++r) {
        const double d = block.D[static_cast<std::size_t>(j * block.lanes + r)];
        column += sample.weights[static_cast<std::size_t>(begin + r)] * d * d;
      }
      sum += column * static_cast<double>(weights[static_cast<std::size_t>(j)]);
    }
    sums[static_cast<std::size_t>(begin / kRows)] = sum;
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

std::vector<double> input_variances(const SiteStats& stats) {
  const Curvature curvature = make_curvature(stats);
  return {curvature.importance.begin(), curvature.importance.end()};
}

std::vector<double> conditional_variances(
    const Context& ctx, const SiteStats& stats, const MethodOptions& options) {
  Curvature curvature = make_curvature(stats);
  curvature.shrink(options.shrinkage.value_or(2.0));
  const std::vector<std::int32_t> order =
      column_order(ColumnOrder::kActivation, curvature.importance, stats.width);
  const std::optional<Factor> factor = factorise(ctx, curvature, order, options.damping);
  if (!factor) {
    return input_variances(stats);
  }
  std::vector<double> variances(order.size());
  for (std::size_t p = 0; p < order.size(); ++p) {
    const double inverse = factor->inverse_diagonal[p];
    variances[static_cast<std::size_t>(order[p])] = inverse * inverse;
  }
  return variances;
}

}  // namespace quern
