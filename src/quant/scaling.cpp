// SPDX-License-Identifier: Apache-2.0
#include "quant/scaling.h"

#include "quant/rounding_error.h"
#include "quant/smoothquant.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>

namespace quern {
namespace {

// Rows of each consumer that judge a candidate; factors have few degrees of freedom.
constexpr std::int64_t kSampledRows = 512;
// Factors further apart than this spend the range of 16-bit scales on nothing.
constexpr double kLargestSpread = 1e6;
// A transform must earn its place: below this gain the model is left alone.
constexpr double kWorthwhile = 0.995;

// A consumer as the judge sees it.
struct Sample {
  RowSample rows;
  QuantScheme scheme;
  double weight = 0;  // 1 / sum d W^2: each linear's error relative to its own output
};

// The error of rounding after scaling, up to a constant: sum over consumers of
// sum_j (d_j / s_j^2) |Q(W s)_j - W_j s_j|^2, relative to each consumer's output.
class Judge {
 public:
  Judge(
      const Context& ctx,
      const ScalingProblem& problem,
      const MethodOptions& options,
      std::vector<double> importance)
      : ctx_(ctx), options_(options), importance_(std::move(importance)) {
    const auto n = static_cast<std::int64_t>(importance_.size());
    for (const ScalingConsumer& consumer : problem.consumers) {
      Sample sample;
      sample.rows = sample_rows(rows_of(consumer.W), consumer.out_features, n, {}, kSampledRows);
      sample.scheme = consumer.scheme;
      double energy = 0;
      for (std::size_t i = 0; i < sample.rows.W.size(); ++i) {
        const double w = sample.rows.W[i];
        energy += importance_[i % importance_.size()] * w * w;
      }
      energy *= sample.rows.weights.front();
      sample.weight = energy > 0 ? 1.0 / energy : 0.0;
      samples_.push_back(std::move(sample));
    }
  }

  [[nodiscard]] double error(std::span<const float> factors) const {
    double total = 0;
    for (const Sample& sample : samples_) {
      total += sample.weight *
               rounding_error(ctx_, sample.rows, sample.scheme, importance_, factors, options_);
    }
    return total;
  }

  [[nodiscard]] const std::vector<double>& importance() const { return importance_; }

  // Mean over the rows of |w_j| relative to the largest of its group (AWQ's "duo" factor).
  [[nodiscard]] std::vector<double> weight_means() const {
    const auto n = static_cast<std::int64_t>(importance_.size());
    std::vector<double> means(importance_.size(), 0.0);
    double rows = 0;
    for (const Sample& sample : samples_) {
      const std::int64_t width = sample.scheme.group_width(n);
      rows += static_cast<double>(sample.rows.rows);
      for (std::int64_t r = 0; r < sample.rows.rows; ++r) {
        const float* row = sample.rows.W.data() + r * n;
        for (std::int64_t begin = 0; begin < n; begin += width) {
          const std::int64_t end = std::min(begin + width, n);
          float highest = 0;
          for (std::int64_t j = begin; j < end; ++j) {
            highest = std::max(highest, std::fabs(row[j]));
          }
          for (std::int64_t j = begin; j < end && highest > 0; ++j) {
            means[static_cast<std::size_t>(j)] += std::fabs(row[j]) / highest;
          }
        }
      }
    }
    for (double& mean : means) {
      mean = mean / rows + 1e-6;
    }
    return means;
  }

 private:
  const Context& ctx_;
  const MethodOptions& options_;
  std::vector<double> importance_;
  std::vector<Sample> samples_;
};

// Powers of the importance, alone and divided by the weights' own means, on a grid that is then
// refined; the best in the judge's eyes, if it is worth it.
ScalingResult search_powers(
    const Context& ctx,
    const ScalingProblem& problem,
    const MethodOptions& options,
    std::vector<double> importance,
    const std::vector<double>& magnitude) {
  const std::size_t n = importance.size();
  const Judge judge(ctx, problem, options, std::move(importance));
  const std::vector<double> means = judge.weight_means();
  const std::vector<float> ones(n, 1.0F);
  const double without = judge.error(ones);
  ScalingResult best{{}, "none", 1.0};
  if (!(without > 0)) {
    return best;
  }
  double best_error = without;
  double best_power = 0;
  bool best_duo = false;
  const auto consider = [&](double power, bool duo) {
    std::vector<double> wanted(n);
    for (std::size_t j = 0; j < n; ++j) {
      wanted[j] = std::pow(std::max(magnitude[j], 1e-30), power);
      wanted[j] /= duo ? std::pow(means[j], 1 - power) : 1.0;
    }
    std::vector<float> factors = allowed_factors(problem, wanted);
    const double error = judge.error(factors);
    if (error < best_error) {
      best_error = error;
      best_power = power;
      best_duo = duo;
      best.factors = std::move(factors);
      best.rule = fmt::format("{}^{:.3g}", duo ? "activation/weight" : "activation", power);
    }
  };
  for (const bool duo : {false, true}) {
    for (int i = duo ? 0 : 1; i <= 10; ++i) {
      consider(0.1 * i, duo);
    }
  }
  for (const double step : {0.05, 0.025}) {
    const double middle = best_power;
    const bool duo = best_duo;
    consider(middle - step, duo);
    consider(middle + step, duo);
  }
  if (best_error > kWorthwhile * without) {
    return {{}, "none", 1.0};
  }
  best.error_ratio = best_error / without;
  return best;
}

std::vector<double> root(std::vector<double> values) {
  for (double& value : values) {
    value = std::sqrt(value);
  }
  return values;
}

// AWQ before plain rounding: the error is weighted by diag(H).
ScalingResult find_awq(
    const Context& ctx, const ScalingProblem& problem, const MethodOptions& options) {
  const std::vector<double> diagonal = input_variances(*problem.stats);
  return search_powers(ctx, problem, options, diagonal, root(diagonal));
}

// The same before error feedback: weighted by what the feedback cannot repair.
ScalingResult find_feedback_aware(
    const Context& ctx, const ScalingProblem& problem, const MethodOptions& options) {
  std::vector<double> variances = conditional_variances(ctx, *problem.stats, options);
  const std::vector<double> by_variance = root(variances);
  ScalingResult first = search_powers(ctx, problem, options, variances, by_variance);
  ScalingResult second = search_powers(
      ctx, problem, options, std::move(variances), root(input_variances(*problem.stats)));
  return second.error_ratio < first.error_ratio ? second : first;
}

constexpr std::array kTransforms = {
    Transform{"awq", "channel factors for plain rounding (AWQ)", find_awq},
    Transform{"scale", "channel factors for rounding with error feedback", find_feedback_aware},
    Transform{
        "smoothquant", "channel factors for integer activations (SmoothQuant)", find_smoothquant},
};

}  // namespace

std::span<const Transform> transforms() {
  return kTransforms;
}

const Transform* find_transform(std::string_view name) {
  const auto* found = std::find_if(
      kTransforms.begin(), kTransforms.end(), [&](const auto& each) { return each.name == name; });
  return found == kTransforms.end() ? nullptr : found;
}

std::vector<float> allowed_factors(
    const ScalingProblem& problem, const std::vector<double>& wanted) {
  std::vector<double> logs(wanted.size());
  for (std::size_t j = 0; j < wanted.size(); ++j) {
    logs[j] = wanted[j] > 0 && std::isfinite(wanted[j]) ? std::log2(wanted[j]) : 0.0;
  }
  if (!problem.unit_of.empty()) {
    const auto units = static_cast<std::size_t>(
        *std::max_element(problem.unit_of.begin(), problem.unit_of.end()) + 1);
    std::vector<double> sum(units, 0.0);
    std::vector<double> count(units, 0.0);
    for (std::size_t j = 0; j < logs.size(); ++j) {
      sum[static_cast<std::size_t>(problem.unit_of[j])] += logs[j];
      count[static_cast<std::size_t>(problem.unit_of[j])] += 1;
    }
    for (std::size_t j = 0; j < logs.size(); ++j) {
      const auto unit = static_cast<std::size_t>(problem.unit_of[j]);
      logs[j] = sum[unit] / count[unit];
    }
  }
  const auto [lowest, highest] = std::minmax_element(logs.begin(), logs.end());
  const double middle = (*lowest + *highest) / 2;
  const double reach = std::log2(kLargestSpread) / 2;
  std::vector<float> factors(logs.size());
  for (std::size_t j = 0; j < logs.size(); ++j) {
    double exponent = std::clamp(logs[j] - middle, -reach, reach);
    exponent = problem.powers_of_two ? std::round(exponent) : exponent;
    factors[j] = static_cast<float>(std::exp2(exponent));
  }
  return factors;
}

void divide_by_factors(SiteStats& stats, std::span<const float> factors) {
  const auto n = static_cast<std::size_t>(stats.width);
  std::vector<double> inverse(n);
  for (std::size_t j = 0; j < n; ++j) {
    inverse[j] = 1.0 / static_cast<double>(factors[j]);
    stats.abs_max[j] /= factors[j];
  }
  for (std::size_t i = 0; i < stats.sample.size(); ++i) {
    stats.sample[i] /= factors[i % n];
  }
  for (std::vector<double>* H : {&stats.H, &stats.H_holdout, &stats.G, &stats.G_holdout}) {
    for (std::size_t i = 0; i * n < H->size(); ++i) {
      for (std::size_t j = 0; j < n; ++j) {
        (*H)[i * n + j] *= inverse[i] * inverse[j];
      }
    }
  }
}

}  // namespace quern
