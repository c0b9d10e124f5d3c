// SPDX-License-Identifier: Apache-2.0
#include "quant/smoothquant.h"

#include "kernels/blas.h"
#include "quant/activation.h"
#include "quant/curvature.h"
#include "quant/row_block.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <vector>

namespace quern {
namespace {

// Rows of each consumer that judge a candidate.
constexpr std::int64_t kSampledRows = 512;
constexpr std::int64_t kRows = 64;
constexpr double kSmallest = 1e-5;  // of w_j and s_j, as published
// A transform must earn its place: below this gain the model is left alone.
constexpr double kWorthwhile = 0.995;

// Evenly spaced rows of a consumer.
struct SampledConsumer {
  const ScalingConsumer* consumer = nullptr;
  std::vector<float> W;
  std::int64_t rows = 0;
};

double sum_of_squares(const std::vector<float>& values) {
  return std::inner_product(
      values.begin(), values.end(), values.begin(), 0.0, std::plus<>(), [](double a, double b) {
        return a * b;
      });
}

class OutputJudge {
 public:
  OutputJudge(const Context& ctx, const ScalingProblem& problem, const MethodOptions& options)
      : ctx_(ctx), options_(options), stats_(*problem.stats) {
    const std::int64_t n = stats_.width;
    for (const ScalingConsumer& consumer : problem.consumers) {
      SampledConsumer sampled;
      sampled.consumer = &consumer;
      sampled.rows = std::min(consumer.out_features, kSampledRows);
      for (std::int64_t r = 0; r < sampled.rows; ++r) {
        const float* row = consumer.W.data() + r * consumer.out_features / sampled.rows * n;
        sampled.W.insert(sampled.W.end(), row, row + n);
      }
      consumers_.push_back(std::move(sampled));
    }
  }

  // sum over consumers of |X W^T - A(X / s) Q(W s)^T|^2 / |X W^T|^2.
  [[nodiscard]] double error(const std::vector<float>& factors) const {
    double total = 0;
    for (const SampledConsumer& consumer : consumers_) {
      total += error_of(consumer, factors);
    }
    return total;
  }

 private:
  // The rows as the linear will see them.
  [[nodiscard]] std::vector<float> rounded_inputs(
      ActivationScheme scheme, const std::vector<float>& factors) const {
    std::vector<float> X = stats_.sample;
    std::vector<float> abs_max = stats_.abs_max;
    for (std::size_t i = 0; i < X.size(); ++i) {
      X[i] /= factors[i % factors.size()];
    }
    for (std::size_t j = 0; j < abs_max.size(); ++j) {
      abs_max[j] /= factors[j];
    }
    if (scheme.active()) {
      scheme = with_static_scale(scheme, abs_max);
      round_activations(ctx_, scheme, X.data(), stats_.sample_rows(), stats_.width);
    }
    return X;
  }

  [[nodiscard]] double error_of(
      const SampledConsumer& sampled, const std::vector<float>& factors) const {
    const std::int64_t n = stats_.width;
    const std::int64_t tokens = stats_.sample_rows();
    const ScalingConsumer& consumer = *sampled.consumer;
    const std::vector<float> X = rounded_inputs(consumer.activation, factors);
    std::vector<float> W = sampled.W;
    std::vector<float> weights(factors.size());
    for (std::size_t i = 0; i < W.size(); ++i) {
      W[i] *= factors[i % factors.size()];
    }
    for (std::size_t j = 0; j < factors.size(); ++j) {
      weights[j] = static_cast<float>(
          stats_.H[j * (factors.size() + 1)] / (static_cast<double>(factors[j]) * factors[j]));
    }
    LinearProblem problem = {W, sampled.rows, n, nullptr, consumer.scheme};
    problem.range = consumer.range;
    const GridRules rules = grid_rules(problem, options_);
    const auto chunks = static_cast<std::size_t>((sampled.rows + kRows - 1) / kRows);
    std::vector<double> errors(chunks);
    std::vector<double> totals(chunks);
    ctx_.pool.for_chunks(sampled.rows, kRows, [&](std::int64_t begin, std::int64_t end, int) {
      RowBlock block = RowBlock::load(problem, begin, end);
      block.find_all_ranges(ctx_.kernels, consumer.scheme, rules, weights.data());
      block.round_all(ctx_.kernels, consumer.scheme);
      for (std::size_t i = 0; i < block.D.size(); ++i) {
        block.D[i] += block.W[i];  // Q
      }
      // Y [tokens, lanes] of the original, then the difference.
      std::vector<float> Y(static_cast<std::size_t>(tokens * block.lanes));
      const std::vector<float> original =
          load_columns(sampled.W, n, begin, block.rows, block.lanes);
      const auto multiply =
          [&](const float* inputs, const float* columns, float alpha, float beta) {
            ctx_.blas.gemm(
                false,
                false,
                tokens,
                block.lanes,
                n,
                alpha,
                inputs,
                n,
                columns,
                block.lanes,
                beta,
                Y.data(),
                block.lanes);
          };
      const auto chunk = static_cast<std::size_t>(begin / kRows);
      multiply(stats_.sample.data(), original.data(), 1.0F, 0.0F);
      totals[chunk] = sum_of_squares(Y);
      multiply(X.data(), block.D.data(), -1.0F, 1.0F);
      errors[chunk] = sum_of_squares(Y);
    });
    const double total = std::accumulate(totals.begin(), totals.end(), 0.0);
    return total > 0 ? std::accumulate(errors.begin(), errors.end(), 0.0) / total : 0.0;
  }

  const Context& ctx_;
  const MethodOptions& options_;
  const SiteStats& stats_;
  std::vector<SampledConsumer> consumers_;
};

// Every channel gets the largest value of its unit.
void spread_over_units(const std::vector<std::int32_t>& unit_of, std::vector<double>& values) {
  if (unit_of.empty()) {
    return;
  }
  const auto units =
      static_cast<std::size_t>(*std::max_element(unit_of.begin(), unit_of.end()) + 1);
  std::vector<double> largest(units, 0.0);
  for (std::size_t j = 0; j < values.size(); ++j) {
    double& unit = largest[static_cast<std::size_t>(unit_of[j])];
    unit = std::max(unit, values[j]);
  }
  for (std::size_t j = 0; j < values.size(); ++j) {
    values[j] = largest[static_cast<std::size_t>(unit_of[j])];
  }
}

// The largest |W_ij| of each column over all consumers.
std::vector<double> largest_weights(const ScalingProblem& problem) {
  std::vector<double> largest(static_cast<std::size_t>(problem.stats->width), kSmallest);
  for (const ScalingConsumer& consumer : problem.consumers) {
    for (std::size_t i = 0; i < consumer.W.size(); ++i) {
      double& column = largest[i % largest.size()];
      column = std::max(column, static_cast<double>(std::fabs(consumer.W[i])));
    }
  }
  return largest;
}

}  // namespace

ScalingResult find_smoothquant(
    const Context& ctx, const ScalingProblem& problem, const MethodOptions& options) {
  const SiteStats& stats = *problem.stats;
  ScalingResult best{{}, "none", 1.0};
  std::vector<double> activations(stats.abs_max.begin(), stats.abs_max.end());
  std::vector<double> weights = largest_weights(problem);
  spread_over_units(problem.unit_of, activations);
  spread_over_units(problem.unit_of, weights);
  const OutputJudge judge(ctx, problem, options);
  const double without = judge.error(std::vector<float>(weights.size(), 1.0F));
  if (!(without > 0)) {
    return best;
  }
  double best_error = without;
  double best_alpha = 0.5;
  const auto consider = [&](double alpha) {
    std::vector<double> wanted(weights.size());
    for (std::size_t j = 0; j < wanted.size(); ++j) {
      wanted[j] =
          std::max(std::pow(activations[j], alpha) / std::pow(weights[j], 1 - alpha), kSmallest);
    }
    std::vector<float> factors = allowed_factors(problem, wanted);
    const double error = judge.error(factors);
    if (error < best_error) {
      best_error = error;
      best_alpha = alpha;
      best.factors = std::move(factors);
      best.rule = fmt::format("smooth^{:.3g}", alpha);
    }
  };
  for (int i = 3; i <= 9; ++i) {
    consider(0.1 * i);
  }
  const double middle = best_alpha;
  consider(middle - 0.05);
  consider(middle + 0.05);
  if (best_error > kWorthwhile * without) {
    return {{}, "none", 1.0};
  }
  best.error_ratio = best_error / without;
  return best;
}

}  // namespace quern
