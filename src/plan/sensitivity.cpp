// SPDX-License-Identifier: Apache-2.0
#include "plan/sensitivity.h"

#include "plan/site_scaling.h"
#include "quant/curvature.h"
#include "quant/rounding_error.h"

#include <algorithm>
#include <numeric>

namespace quern {
namespace {

// The scheme in the middle of the options by size: what most plans come close to.
const QuantScheme& middle_scheme(std::span<const PlanOption> options) {
  std::vector<const PlanOption*> order;
  for (const PlanOption& option : options) {
    order.push_back(&option);
  }
  std::stable_sort(order.begin(), order.end(), [](const PlanOption* a, const PlanOption* b) {
    return a->bytes < b->bytes;
  });
  return order[order.size() / 2]->scheme;
}

// The inputs of a site as its linears weight them, each linear counting alike.
SiteStats common_stats(std::span<const LinearEvidence> linears) {
  SiteStats stats = *linears.front().H;
  std::fill(stats.H.begin(), stats.H.end(), 0.0);
  const auto n = static_cast<std::size_t>(stats.width);
  for (const LinearEvidence& linear : linears) {
    double trace = 0;
    for (std::size_t j = 0; j < n; ++j) {
      trace += linear.H->H[j * n + j];
    }
    for (std::size_t i = 0; i < n * n && trace > 0; ++i) {
      stats.H[i] += linear.H->H[i] / trace;
    }
  }
  return stats;
}

std::vector<float> find_factors(
    const Context& ctx,
    const Block& block,
    int site,
    std::span<const LinearEvidence> linears,
    const Transform& transform,
    const MethodOptions& options) {
  const SiteStats stats = common_stats(linears);
  const bool all_have_options = std::all_of(
      linears.begin(), linears.end(), [](const auto& linear) { return !linear.options.empty(); });
  if (!all_have_options || unusable(&stats, stats.width)) {
    return {};
  }
  std::vector<RowSample> samples;
  std::vector<ScalingConsumer> consumers;
  for (const LinearEvidence& linear : linears) {
    const auto out = static_cast<std::int64_t>(linear.delta_square.size());
    samples.push_back(sample_rows(linear.rows, out, stats.width, {}, kScoredRows));
    consumers.push_back({samples.back().W, samples.back().rows, middle_scheme(linear.options)});
  }
  const ScalingProblem problem = scaling_problem(block, site, stats, std::move(consumers));
  return transform.find(ctx, problem, options).factors;
}

// r_i: delta_square over its mean.
std::vector<double> shares(std::span<const double> delta_square) {
  const double mean = std::accumulate(delta_square.begin(), delta_square.end(), 0.0) /
                      static_cast<double>(delta_square.size());
  std::vector<double> shares(delta_square.size(), 1.0);
  for (std::size_t i = 0; i < shares.size() && mean > 0; ++i) {
    shares[i] = delta_square[i] / mean;
  }
  return shares;
}

// Half the rounding error of each option, with the importance that its method works on.
std::vector<double> losses_of(
    const Context& ctx,
    const RowSample& sample,
    std::span<const PlanOption> options,
    std::span<const double> plain,
    std::span<const double> after_feedback,
    std::span<const float> factors,
    const MethodOptions& method_options) {
  std::vector<double> losses(options.size(), 0.0);
  // One option a chunk; what is parallel in rounding_error then runs inline.
  const auto count = static_cast<std::int64_t>(options.size());
  ctx.pool.for_chunks(count, 1, [&](std::int64_t o, std::int64_t, int) {
    const PlanOption& option = options[static_cast<std::size_t>(o)];
    if (option.keep()) {
      return;
    }
    const auto& importance = find_method(option.method)->error_feedback ? after_feedback : plain;
    losses[static_cast<std::size_t>(o)] =
        0.5 * rounding_error(ctx, sample, option.scheme, importance, factors, method_options);
  });
  return losses;
}

}  // namespace

LinearScore score_linear(
    const Context& ctx,
    const LinearEvidence& linear,
    const std::vector<float>& factors,
    const MethodOptions& options) {
  LinearScore score;
  score.row_weights = shares(linear.delta_square);
  score.variances = input_variances(*linear.H);
  score.factors = factors;
  score.losses.assign(linear.options.size(), 0.0);
  if (unusable(linear.H, linear.H->width)) {
    return score;  // nothing comes through this linear, or nothing of it comes through
  }
  const RowSample sample = sample_rows(
      linear.rows,
      static_cast<std::int64_t>(linear.delta_square.size()),
      linear.H->width,
      score.row_weights,
      kScoredRows);
  const std::vector<double> after_feedback = conditional_variances(ctx, *linear.H, options);
  score.losses =
      losses_of(ctx, sample, linear.options, score.variances, after_feedback, factors, options);
  return score;
}

std::vector<double> score_lookup(
    const Context& ctx,
    const RowReader& rows,
    std::int64_t count,
    std::span<const double> gradient_squares,
    std::span<const PlanOption> options,
    const MethodOptions& method_options) {
  const std::vector<double> alike(
      static_cast<std::size_t>(count), 1.0 / static_cast<double>(count));
  const RowSample sample = sample_rows(
      rows, count, static_cast<std::int64_t>(gradient_squares.size()), alike, kScoredRows);
  return losses_of(ctx, sample, options, gradient_squares, gradient_squares, {}, method_options);
}

std::vector<LinearScore> score_site(
    const Context& ctx,
    const Block& block,
    int site,
    std::span<const LinearEvidence> linears,
    const Transform* transform,
    const MethodOptions& options) {
  std::vector<float> factors;
  if (transform != nullptr) {
    factors = find_factors(ctx, block, site, linears, *transform, options);
  }
  std::vector<LinearScore> scores;
  for (const LinearEvidence& linear : linears) {
    scores.push_back(score_linear(ctx, linear, factors, options));
  }
  return scores;
}

}  // namespace quern
