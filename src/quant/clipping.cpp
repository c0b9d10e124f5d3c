// SPDX-License-Identifier: Apache-2.0
#include "quant/clipping.h"

#include "kernels/blas.h"
#include "kernels/kernels.h"
#include "quant/curvature.h"
#include "quant/quadratic_error.h"
#include "quant/row_block.h"
#include "quant/rtn.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

namespace quern {
namespace {

constexpr std::int64_t kComparedRows = 256;

// The search of one group; every row has its own best grid.
class OutputSearch {
 public:
  OutputSearch(
      const Context& ctx,
      const GridRules& rules,
      const float* H,
      const float* W,
      std::int64_t lanes,
      std::int64_t columns,
      float* scales,
      float* zeros)
      : ctx_(ctx),
        rules_(rules),
        H_(H),
        W_(W),
        lanes_(lanes),
        columns_(columns),
        best_scales_(scales),
        best_zeros_(zeros),
        group_(static_cast<std::size_t>(columns), 0),
        D_(static_cast<std::size_t>(columns * lanes)),
        HD_(D_.size()),
        HW_(D_.size()),
        codes_(D_.size()),
        scales_(scales, scales + lanes),
        zeros_(zeros, zeros + lanes),

        best_fitted_(static_cast<std::size_t>(lanes)),
        lowest_(static_cast<std::size_t>(lanes), std::numeric_limits<double>::infinity()) {
    multiply(W_, HW_.data());
  }

  void run() {
    evaluate();  // what it starts from
    sweep_shrinks();
    fit();
    sweep_around(0.0F, kNear);
    if (!rules_.symmetric) {
      for (int round = 0; round < kZeroRounds; ++round) {
        sweep_around(-1.0F, kWide);
        sweep_around(1.0F, kWide);
      }
    }
    for (int round = 0; round < kFitRounds; ++round) {
      fit();
    }
  }

 private:
  static constexpr int kShrinks = 28;
  static constexpr int kZeroRounds = 2;
  static constexpr int kFitRounds = 3;
  static constexpr std::array<float, 8> kNear = {
      0.9F, 0.94F, 0.97F, 0.985F, 1.015F, 1.03F, 1.06F, 1.1F};
  static constexpr std::array<float, 3> kWide = {0.94F, 1.0F, 1.06F};

  // out [columns][lanes] = H in.
  void multiply(const float* in, float* out) const {
    ctx_.blas.gemm(
        false,
        false,
        columns_,
        lanes_,
        columns_,
        1.0F,
        H_,
        columns_,
        in,
        lanes_,
        0.0F,
        out,
        lanes_);
  }

  void sweep_shrinks() {
    std::vector<Extent> extents(lowest_.size());
    for (std::int64_t j = 0; j < columns_; ++j) {
      for (std::int64_t r = 0; r < lanes_; ++r) {
        extents[static_cast<std::size_t>(r)].add(W_[j * lanes_ + r]);
      }
    }
    const auto try_shrink = [&](float p) {
      for (std::size_t r = 0; r < extents.size(); ++r) {
        spanning_grid(rules_, extents[r], p, scales_[r], zeros_[r]);
      }
      evaluate();
    };
    try_shrink(1.0F);
    const float highest = absmax_shrink(rules_);
    const float lowest = rules_.bits <= 3 ? 0.2F : 0.35F;
    for (int i = 0; i < kShrinks; ++i) {
      try_shrink(highest - (highest - lowest) * static_cast<float>(i) / (kShrinks - 1));
    }
  }

  // Scales around the best one with its zero point moved by `step`.
  void sweep_around(float step, std::span<const float> factors) {
    const std::vector<float> scales(best_scales_, best_scales_ + lanes_);
    const std::vector<float> zeros(best_zeros_, best_zeros_ + lanes_);
    for (const float factor : factors) {
      for (std::size_t r = 0; r < scales.size(); ++r) {
        scales_[r] = storable_scale(scales[r] * factor, rules_.storage.scale_dtype);
        zeros_[r] = clamp_zero(rules_, zeros[r] + step);
      }
      evaluate();
    }
  }

  // The best grid with the scale that fits its codes best.
  void fit() {
    for (std::size_t r = 0; r < lowest_.size(); ++r) {
      const float scale = best_fitted_[r];
      scales_[r] = scale > 0.0F && std::isfinite(scale)
                       ? storable_scale(scale, rules_.storage.scale_dtype)
                       : best_scales_[r];
      zeros_[r] = best_zeros_[r];
    }
    evaluate();
  }

  // delta^T H delta of scales_ and zeros_, taken over by the rows for which it is the lowest.
  void evaluate() {
    const ColumnGrid grid = {
        lanes_, columns_, group_.data(), scales_.data(), zeros_.data(), rules_.max_code()};
    ctx_.kernels.round_columns(&grid, W_, D_.data(), codes_.data());
    multiply(D_.data(), HD_.data());
    std::vector<double> error(lowest_.size());
    std::vector<double> slope(lowest_.size());  // s V^T H D, with Q = s V
    std::vector<double> square(lowest_.size());  // s^2 V^T H V
    for (std::int64_t j = 0; j < columns_; ++j) {
      for (std::int64_t r = 0; r < lanes_; ++r) {
        const auto at = static_cast<std::size_t>(j * lanes_ + r);
        const auto lane = static_cast<std::size_t>(r);
        const auto d = static_cast<double>(D_[at]);
        const auto hd = static_cast<double>(HD_[at]);
        const double q = d + static_cast<double>(W_[at]);
        error[lane] += d * hd;
        slope[lane] += q * hd;
        square[lane] += q * (hd + static_cast<double>(HW_[at]));
      }
    }
    for (std::size_t r = 0; r < lowest_.size(); ++r) {
      if (error[r] < lowest_[r]) {
        lowest_[r] = error[r];
        best_scales_[r] = scales_[r];
        best_zeros_[r] = zeros_[r];
        best_fitted_[r] = static_cast<float>(scales_[r] * (1 - slope[r] / square[r]));
      }
    }
  }

  const Context& ctx_;
  const GridRules& rules_;
  const float* H_;
  const float* W_;
  std::int64_t lanes_;
  std::int64_t columns_;
  float* best_scales_;  // [lanes]
  float* best_zeros_;
  std::vector<std::int32_t> group_;  // [columns] all 0: one group
  std::vector<float> D_;
  std::vector<float> HD_;
  std::vector<float> HW_;
  std::vector<std::uint8_t> codes_;
  std::vector<float> scales_;  // [lanes] the candidate
  std::vector<float> zeros_;
  std::vector<float> best_fitted_;  // argmin over the scale at the codes of the best grid
  std::vector<double> lowest_;
};

// Up to kComparedRows evenly spaced rows.
std::vector<float> sample_rows(const LinearProblem& problem, std::int64_t& rows) {
  rows = std::min(problem.out_features, kComparedRows);
  std::vector<float> sample;
  sample.reserve(static_cast<std::size_t>(rows * problem.in_features));
  for (std::int64_t r = 0; r < rows; ++r) {
    const float* row = problem.W.data() + r * problem.out_features / rows * problem.in_features;
    sample.insert(sample.end(), row, row + problem.in_features);
  }
  return sample;
}

}  // namespace

GroupMoments::GroupMoments(
    const SiteStats& stats, std::span<const std::int32_t> order, std::int64_t group_width)
    : width_(group_width), blocks_(static_cast<std::size_t>(stats.width * group_width)) {
  const std::int64_t n = stats.width;
  const auto column = [&](std::int64_t position) {
    return order.empty() ? position
                         : static_cast<std::int64_t>(order[static_cast<std::size_t>(position)]);
  };
  for (std::int64_t begin = 0; begin < n; begin += width_) {
    const std::int64_t columns = std::min(width_, n - begin);
    float* block = blocks_.data() + begin * width_;
    for (std::int64_t i = 0; i < columns; ++i) {
      for (std::int64_t j = 0; j < columns; ++j) {
        block[i * columns + j] = static_cast<float>(
            stats.H[static_cast<std::size_t>(column(begin + i) * n + column(begin + j))]);
      }
    }
  }
}

std::optional<GroupMoments> group_moments(
    const LinearProblem& problem,
    const MethodOptions& options,
    std::span<const std::int32_t> order) {
  if (range_of(problem, options) != RangeSearch::kOutput || problem.scheme.ggml ||
      unusable(problem.stats, problem.in_features)) {
    return std::nullopt;
  }
  return GroupMoments(*problem.stats, order, problem.scheme.group_width(problem.in_features));
}

void fit_ranges_to_output(
    const Context& ctx,
    const GridRules& rules,
    const float* H_gg,
    const float* W,
    std::int64_t lanes,
    std::int64_t columns,
    float* scales,
    float* zeros) {
  OutputSearch(ctx, rules, H_gg, W, lanes, columns, scales, zeros).run();
}

double clip_threshold(std::span<const float> W, const PackedLinear& packed) {
  const std::int64_t width = packed.scheme.group_width(packed.in_features);
  GridRules rules;
  rules.bits = packed.scheme.bits;
  rules.symmetric = packed.scheme.symmetric;
  rules.storage.scale_dtype = packed.scale_dtype;
  double sum = 0;
  std::int64_t counted = 0;
  for (std::int64_t row = 0; row < packed.out_features; ++row) {
    for (std::int64_t group = 0; group < packed.groups(); ++group) {
      Extent extent;
      const std::int64_t end = std::min((group + 1) * width, packed.in_features);
      for (std::int64_t j = group * width; j < end; ++j) {
        extent.add(W[static_cast<std::size_t>(row * packed.in_features + j)]);
      }
      if (extent.low < extent.high) {
        float scale = 0;
        float zero = 0;
        spanning_grid(rules, extent, 1.0F, scale, zero);
        sum += static_cast<double>(
                   packed.scales[static_cast<std::size_t>(row * packed.groups() + group)]) /
               static_cast<double>(scale);
        ++counted;
      }
    }
  }
  return counted == 0 ? 1.0 : sum / static_cast<double>(counted);
}

std::vector<RangeError> compare_ranges(
    const Context& ctx, const LinearProblem& problem, const MethodOptions& options) {
  if (problem.scheme.ggml || unusable(problem.stats, problem.in_features)) {
    return {};
  }
  LinearProblem part = problem;
  const std::vector<float> W = sample_rows(problem, part.out_features);
  part.W = W;
  part.target = {};
  const std::vector<float> importance = make_curvature(*problem.stats).importance;
  constexpr std::array kSearches = {
      RangeSearch::kMinMax, RangeSearch::kPower24, RangeSearch::kWeighted, RangeSearch::kOutput};
  std::vector<std::shared_ptr<const QuantizedMatrix>> rounded;
  std::vector<const QuantizedMatrix*> candidates;
  for (const RangeSearch search : kSearches) {
    part.range = search;
    rounded.push_back(round_to_nearest(ctx, part, options, importance));
    candidates.push_back(rounded.back().get());
  }
  const QuadraticErrors errors =
      quadratic_errors(ctx, W, part.out_features, part.in_features, problem.stats->H, candidates);
  std::vector<RangeError> result;
  for (std::size_t i = 0; i < kSearches.size(); ++i) {
    result.push_back({kSearches[i], errors.relative(i)});
  }
  return result;
}

}  // namespace quern
