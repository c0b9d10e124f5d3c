// SPDX-License-Identifier: Apache-2.0
#include "quant/grid.h"

#include "base/half.h"
#include "kernels/kernels.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

namespace quern {
namespace {

using Lanes = std::array<float, kRowLanes>;

constexpr float kLargestHalf = 65504.0F;
// Bounds for scales with the exponent of a float: products with codes stay normal and finite.
constexpr float kSmallestWideScale = 1e-30F;
constexpr float kLargestWideScale = 1e30F;

using Extents = std::array<Extent, kRowLanes>;

struct Grid {
  Lanes scale{};
  Lanes zero{};
};

Extents find_extents(const float* W, std::int64_t lanes, std::int64_t columns) {
  Extents extents;
  for (std::int64_t j = 0; j < columns; ++j) {
    for (std::size_t r = 0; r < kRowLanes; ++r) {
      extents[r].add(W[j * lanes + static_cast<std::int64_t>(r)]);
    }
  }
  return extents;
}

Grid spanning_grids(const GridRules& rules, const Extents& extents, float p) {
  Grid grid;
  for (std::size_t r = 0; r < kRowLanes; ++r) {
    spanning_grid(rules, extents[r], p, grid.scale[r], grid.zero[r]);
  }
  return grid;
}

// Sum |q - w|^2.4 over p = 1, 0.99 … 0.21, the first smallest wins; IST-DASLab/gptq, quant.py.
Grid search_power24(
    const KernelTable& kernels,
    const GridRules& rules,
    const Extents& extents,
    const float* W,
    std::int64_t lanes,
    std::int64_t columns) {
  constexpr int kSteps = 80;
  Grid best = spanning_grids(rules, extents, 1.0F);
  Lanes lowest;
  lowest.fill(std::numeric_limits<float>::infinity());
  for (int i = 0; i < kSteps; ++i) {
    const Grid grid = spanning_grids(rules, extents, 1.0F - static_cast<float>(i) / 100.0F);
    Lanes error;
    kernels.fit_grids_power24(
        W, lanes, columns, grid.scale.data(), grid.zero.data(), rules.max_code(), 1, error.data());
    for (std::size_t r = 0; r < kRowLanes; ++r) {
      if (error[r] < lowest[r]) {
        lowest[r] = error[r];
        best.scale[r] = grid.scale[r];
        best.zero[r] = grid.zero[r];
      }
    }
  }
  return best;
}

// The search behind kWeighted: a sweep over shrinks, then moves around the best grid found.
class WeightedSearch {
 public:
  WeightedSearch(
      const KernelTable& kernels,
      const GridRules& rules,
      const float* W,
      std::int64_t lanes,
      const float* weights,
      std::int64_t columns)
      : kernels_(kernels),
        rules_(rules),
        W_(W),
        lanes_(lanes),
        weights_(weights),
        columns_(columns) {
    lowest_.fill(std::numeric_limits<float>::infinity());
  }

  Grid run(const Extents& extents) {
    sweep_shrinks(extents);
    sweep_around(0.0F);
    if (!rules_.symmetric) {
      for (int round = 0; round < kZeroRounds; ++round) {
        sweep_around(-1.0F);
        sweep_around(1.0F);
      }
    }
    return best_;
  }

 private:
  static constexpr int kShrinks = 96;
  static constexpr int kZeroRounds = 2;
  static constexpr std::size_t kBatch = 16;

  // Candidates of a batch: scale and zero point [candidate][kRowLanes], and what fit_grids says.
  struct Batch {
    std::array<float, kBatch * kRowLanes> scale;
    std::array<float, kBatch * kRowLanes> zero;
    std::array<float, kBatch * 3 * kRowLanes> sums;
  };

  // Shrinks above 1 let a symmetric grid hold both extremes: at 2 bits +a takes p = 1.5.
  [[nodiscard]] float shrink(int i) const {
    const float highest = absmax_shrink(rules_);
    const float lowest = rules_.bits <= 3 ? 0.2F : 0.35F;
    return highest - (highest - lowest) * static_cast<float>(i) / static_cast<float>(kShrinks - 1);
  }

  void sweep_shrinks(const Extents& extents) {
    // Plain min-max first, so that the search never ends behind it.
    Batch batch;
    put(batch, 0, spanning_grids(rules_, extents, 1.0F));
    std::size_t filled = 1;
    for (int i = 0; i < kShrinks; ++i) {
      put(batch, filled, spanning_grids(rules_, extents, shrink(i)));
      ++filled;
      if (filled == kBatch || i + 1 == kShrinks) {
        evaluate(batch, filled);
        filled = 0;
      }
    }
  }

  // Scales around the best one with its zero point moved by `step`: a zero point that moves wants
  // another scale.
  void sweep_around(float step) {
    static constexpr std::array<float, kBatch> kFactors = {
        0.7F,
        0.76F,
        0.82F,
        0.87F,
        0.91F,
        0.95F,
        0.98F,
        1.0F,
        1.02F,
        1.05F,
        1.09F,
        1.13F,
        1.18F,
        1.24F,
        1.31F,
        1.4F};
    Batch batch;
    for (std::size_t i = 0; i < kBatch; ++i) {
      Grid grid = best_;
      for (std::size_t r = 0; r < kRowLanes; ++r) {
        grid.scale[r] = storable_scale(grid.scale[r] * kFactors[i], rules_.storage.scale_dtype);
        grid.zero[r] = clamp_zero(rules_, grid.zero[r] + step);
      }
      put(batch, i, grid);
    }
    evaluate(batch, kBatch);
  }

  static void put(Batch& batch, std::size_t candidate, const Grid& grid) {
    std::copy(grid.scale.begin(), grid.scale.end(), &batch.scale[candidate * kRowLanes]);
    std::copy(grid.zero.begin(), grid.zero.end(), &batch.zero[candidate * kRowLanes]);
  }

  // Each candidate, then the same with the scale that fits its codes best.
  void evaluate(Batch& batch, std::size_t candidates) {
    fit(batch, candidates);
    accept(batch, candidates);
    for (std::size_t c = 0; c < candidates; ++c) {
      for (std::size_t r = 0; r < kRowLanes; ++r) {
        batch.scale[c * kRowLanes + r] = least_squares_scale(batch, c, r);
      }
    }
    fit(batch, candidates);
    accept(batch, candidates);
  }

  void fit(Batch& batch, std::size_t candidates) const {
    kernels_.fit_grids(
        W_,
        lanes_,
        weights_,
        columns_,
        batch.scale.data(),
        batch.zero.data(),
        rules_.max_code(),
        static_cast<std::int64_t>(candidates),
        batch.sums.data());
  }

  void accept(const Batch& batch, std::size_t candidates) {
    for (std::size_t c = 0; c < candidates; ++c) {
      for (std::size_t r = 0; r < kRowLanes; ++r) {
        const float error = batch.sums[3 * c * kRowLanes + r];
        if (error < lowest_[r] || first_) {
          lowest_[r] = error;
          best_.scale[r] = batch.scale[c * kRowLanes + r];
          best_.zero[r] = batch.zero[c * kRowLanes + r];
        }
      }
      first_ = false;
    }
  }

  // argmin over s of sum d (s v - w)^2 at the candidate's codes, or its own scale if there is none.
  [[nodiscard]] float least_squares_scale(
      const Batch& batch, std::size_t candidate, std::size_t row) const {
    const float* sums = &batch.sums[3 * candidate * kRowLanes + row];
    const float scale = sums[kRowLanes] / sums[2 * kRowLanes];
    return scale > 0.0F && std::isfinite(scale) ? storable_scale(scale, rules_.storage.scale_dtype)
                                                : batch.scale[candidate * kRowLanes + row];
  }

  const KernelTable& kernels_;
  const GridRules& rules_;
  const float* W_;
  std::int64_t lanes_;
  const float* weights_;
  std::int64_t columns_;
  Grid best_;
  Lanes lowest_;
  bool first_ = true;  // nothing was accepted yet
};

}  // namespace

GridRules grid_rules(const QuantScheme& scheme, const MethodOptions& options) {
  return {scheme.bits, scheme.symmetric, options.storage, options.range};
}

GridRules grid_rules(const LinearProblem& problem, const MethodOptions& options) {
  return {
      problem.scheme.bits, problem.scheme.symmetric, options.storage, range_of(problem, options)};
}

float clamp_zero(const GridRules& rules, float zero) noexcept {
  return std::clamp(zero, rules.storage.minimum_zero_one ? 1.0F : 0.0F, rules.max_code());
}

float absmax_shrink(const GridRules& rules) noexcept {
  return rules.symmetric ? rules.max_code() / (rules.max_code() - 1.0F) : 1.0F;
}

void spanning_grid(
    const GridRules& rules, const Extent& extent, float p, float& scale, float& zero) noexcept {
  const DType dtype = rules.storage.scale_dtype;
  const float max_code = rules.max_code();
  const float middle = static_cast<float>(1 << (rules.bits - 1));
  const auto [low, high] = extent;
  if (low == high) {  // both zero
    scale = storable_scale(2.0F / max_code, dtype);
    zero = middle;
    return;
  }
  if (rules.symmetric) {
    scale = storable_scale(p * (2.0F * std::max(-low, high) / max_code), dtype);
    zero = middle;
    return;
  }
  scale = storable_scale(p * (high / max_code - low / max_code), dtype);
  zero = clamp_zero(rules, std::nearbyint(-(p * low) / scale));
  if (rules.storage.minimum_zero_one && low == 0.0F) {
    // Code 0 is spent below zero, so max_code - 1 steps must reach the top.
    scale = storable_scale(p * (high / (max_code - 1.0F)), dtype);
  }
}

float storable_scale(float scale, DType dtype) noexcept {
  switch (dtype) {
    case DType::kF16:
      return f16_to_float(float_to_f16(std::clamp(scale, kSmallestNormalHalf, kLargestHalf)));
    case DType::kBF16:
      return bf16_to_float(float_to_bf16(std::clamp(scale, kSmallestWideScale, kLargestWideScale)));
    default: return std::clamp(scale, kSmallestWideScale, kLargestWideScale);
  }
}

void find_ranges(
    const KernelTable& kernels,
    const GridRules& rules,
    const float* W,
    std::int64_t lanes,
    const float* weights,
    std::int64_t columns,
    float* scales,
    float* zeros) {
  for (std::int64_t first = 0; first < lanes; first += kRowLanes) {
    const Extents extents = find_extents(W + first, lanes, columns);
    Grid grid;
    switch (rules.search) {
      case RangeSearch::kMinMax: grid = spanning_grids(rules, extents, 1.0F); break;
      case RangeSearch::kAbsMax: grid = spanning_grids(rules, extents, absmax_shrink(rules)); break;
      case RangeSearch::kPower24:
        grid = search_power24(kernels, rules, extents, W + first, lanes, columns);
        break;
      case RangeSearch::kWeighted:
      case RangeSearch::kOutput:
        grid = WeightedSearch(kernels, rules, W + first, lanes, weights, columns).run(extents);
        break;
    }
    std::copy(grid.scale.begin(), grid.scale.end(), scales + first);
    std::copy(grid.zero.begin(), grid.zero.end(), zeros + first);
  }
}

}  // namespace quern
