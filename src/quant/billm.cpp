// SPDX-License-Identifier: Apache-2.0
#include "quant/billm.h"

#include "base/half.h"
#include "kernels/blas.h"
#include "quant/billm_matrix.h"
#include "quant/curvature.h"
#include "quant/error_feedback.h"
#include "quant/quadratic_error.h"
#include "quant/rtn.h"
#include "quant/shrinkage.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace quern {
namespace {

constexpr std::int64_t kSampledRows = 512;
constexpr std::int64_t kRows = 32;
constexpr std::int64_t kMostSalient = 49;
constexpr int kQuantiles = 81;

// mean + scale and mean - scale stand for all values.
struct TwoLevels {
  double mean = 0;
  double scale = 0;
};

// Some weights of a row and what their errors count for.
struct Weighted {
  std::vector<float> w;
  std::vector<float> d;

  void clear() {
    w.clear();
    d.clear();
  }
  void add(float value, float weight) {
    w.push_back(value);
    d.push_back(weight);
  }
};

// The weighted means of what lies above the weighted mean and of what lies below it.
TwoLevels fit_levels(std::span<const float> w, std::span<const float> d) {
  double sum = 0;
  double weight = 0;
  for (std::size_t i = 0; i < w.size(); ++i) {
    sum += static_cast<double>(d[i]) * w[i];
    weight += d[i];
  }
  if (!(weight > 0)) {
    return {};
  }
  const auto mean = static_cast<float>(sum / weight);
  double above = 0;
  double above_weight = 0;
  for (std::size_t i = 0; i < w.size(); ++i) {
    const bool is_above = w[i] >= mean;
    above += is_above ? static_cast<double>(d[i]) * w[i] : 0.0;
    above_weight += is_above ? static_cast<double>(d[i]) : 0.0;
  }
  if (!(above_weight > 0) || !(above_weight < weight)) {
    return {sum / weight, 0};
  }
  const double high = above / above_weight;
  const double low = (sum - above) / (weight - above_weight);
  return {(high + low) / 2, (high - low) / 2};
}

// sum d (w - nearest level)^2; the differences replace w when `residual` is given.
double level_error(
    std::span<const float> w,
    std::span<const float> d,
    const TwoLevels& levels,
    float* residual = nullptr) {
  const auto mean = static_cast<float>(levels.mean);
  const auto scale = static_cast<float>(levels.scale);
  double error = 0;
  for (std::size_t i = 0; i < w.size(); ++i) {
    const float from_mean = w[i] - mean;
    const float difference = from_mean - (from_mean >= 0.0F ? scale : -scale);
    error += static_cast<double>(d[i]) * difference * difference;
    if (residual != nullptr) {
      residual[i] = difference;
    }
  }
  return error;
}

double error_of_one(std::span<const float> w, std::span<const float> d) {
  return level_error(w, d, fit_levels(w, d));
}

// Binarised, and what is left binarised again.
double error_of_two(std::span<const float> w, std::span<const float> d) {
  std::vector<float> residual(w.size());
  (void)level_error(w, d, fit_levels(w, d), residual.data());
  return error_of_one(residual, d);
}

// What all rows of a block share.
struct Structure {
  std::vector<bool> salient;  // [columns]
  float threshold = 0;  // of |w| between the two groups of the other columns
};

// numpy's quantile of sorted values, by linear interpolation.
float quantile(const std::vector<float>& sorted, double q) {
  const double position = q * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<std::size_t>(position);
  const std::size_t above = std::min(below + 1, sorted.size() - 1);
  const double share = position - static_cast<double>(below);
  return static_cast<float>((1 - share) * sorted[below] + share * sorted[above]);
}

float as_half(double value) {
  constexpr double kLargest = 65504.0;
  return f16_to_float(float_to_f16(static_cast<float>(std::clamp(value, -kLargest, kLargest))));
}

class Binarizer {
 public:
  // Without a factor there is no error feedback.
  Binarizer(
      const Context& ctx,
      const LinearProblem& problem,
      const std::vector<float>& importance,
      const Factor* factor)
      : ctx_(ctx),
        importance_(importance),
        factor_(factor),
        rows_(problem.out_features),
        n_(problem.in_features),
        W_(problem.goal().begin(), problem.goal().end()),
        made_(BillmMatrix::make(
            problem.out_features,
            problem.in_features,
            problem.scheme.group_width(problem.in_features))) {}

  BillmMatrix run() {
    for (std::int64_t begin = 0; begin < n_; begin += made_.block) {
      const std::int64_t columns = std::min(made_.block, n_ - begin);
      const Structure structure = find_structure(begin, columns);
      encode(begin, columns, structure);
    }
    return std::move(made_);
  }

 private:
  [[nodiscard]] std::int64_t sampled_rows() const { return std::min(rows_, kSampledRows); }
  [[nodiscard]] const float* sampled_row(std::int64_t i, std::int64_t begin) const {
    return W_.data() + i * rows_ / sampled_rows() * n_ + begin;
  }

  // sum over the sampled rows of add(w, errors), which adds to `count` errors; on the pool.
  template <class Add>
  [[nodiscard]] std::vector<double> sum_over_sample(
      std::int64_t begin, std::size_t count, const Add& add) const {
    const std::int64_t rows = sampled_rows();
    const auto chunks = static_cast<std::size_t>((rows + kRows - 1) / kRows);
    std::vector<double> partial(chunks * count);
    ctx_.pool.for_chunks(rows, kRows, [&](std::int64_t first, std::int64_t last, int) {
      double* errors = partial.data() + static_cast<std::size_t>(first / kRows) * count;
      for (std::int64_t i = first; i < last; ++i) {
        add(sampled_row(i, begin), errors);
      }
    });
    std::vector<double> sums(count);
    for (std::size_t i = 0; i < partial.size(); ++i) {
      sums[i % count] += partial[i];
    }
    return sums;
  }

  // Columns of a block by falling sum_i w_ij^2 / U_jj^2.
  [[nodiscard]] std::vector<std::int64_t> rank_columns(
      std::int64_t begin, std::int64_t columns) const {
    std::vector<double> saliency = sum_over_sample(
        begin, static_cast<std::size_t>(columns), [&](const float* w, double* sums) {
          for (std::int64_t j = 0; j < columns; ++j) {
            sums[j] += static_cast<double>(w[j]) * w[j];
          }
        });
    for (std::int64_t j = 0; j < columns; ++j) {
      const auto column = static_cast<std::size_t>(begin + j);
      const double inverse = factor_ != nullptr ? factor_->inverse_diagonal[column] : 0.0;
      saliency[static_cast<std::size_t>(j)] *=
          factor_ != nullptr ? inverse * inverse : static_cast<double>(importance_[column]);
    }
    std::vector<std::int64_t> order(static_cast<std::size_t>(columns));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
      return saliency[static_cast<std::size_t>(a)] > saliency[static_cast<std::size_t>(b)];
    });
    return order;
  }

  [[nodiscard]] Structure find_structure(std::int64_t begin, std::int64_t columns) const {
    Structure structure;
    structure.salient.resize(static_cast<std::size_t>(columns));
    if (columns > 1) {
      const std::vector<std::int64_t> order = rank_columns(begin, columns);
      const auto count = best_count(begin, order);
      for (std::size_t i = 0; i < count; ++i) {
        structure.salient[static_cast<std::size_t>(order[i])] = true;
      }
    }
    structure.threshold = best_threshold(begin, structure.salient);
    return structure;
  }

  // How many of the first columns of `order` are binarised twice; the others are, too, while this
  // is compared.
  [[nodiscard]] std::size_t best_count(
      std::int64_t begin, const std::vector<std::int64_t>& order) const {
    const auto most = static_cast<std::size_t>(
        std::min<std::int64_t>(kMostSalient, static_cast<std::int64_t>(order.size()) - 1));
    std::vector<float> d;
    for (const std::int64_t j : order) {
      d.push_back(importance_[static_cast<std::size_t>(begin + j)]);
    }
    const std::vector<double> errors =
        sum_over_sample(begin, most, [&](const float* w, double* sums) {
          std::vector<float> ranked;
          for (const std::int64_t j : order) {
            ranked.push_back(w[j]);
          }
          const std::span<const float> all(ranked);
          const std::span<const float> weights(d);
          for (std::size_t k = 1; k <= most; ++k) {
            sums[k - 1] += error_of_two(all.first(k), weights.first(k)) +
                           error_of_two(all.subspan(k), weights.subspan(k));
          }
        });
    return static_cast<std::size_t>(
        std::min_element(errors.begin(), errors.end()) - errors.begin() + 1);
  }

  [[nodiscard]] float best_threshold(std::int64_t begin, const std::vector<bool>& salient) const {
    std::vector<float> sizes;
    for (std::int64_t i = 0; i < sampled_rows(); ++i) {
      const float* w = sampled_row(i, begin);
      for (std::size_t j = 0; j < salient.size(); ++j) {
        if (!salient[j]) {
          sizes.push_back(std::fabs(w[j]));
        }
      }
    }
    std::sort(sizes.begin(), sizes.end());
    std::array<float, kQuantiles> candidates{};
    for (std::size_t i = 0; i < candidates.size(); ++i) {
      candidates[i] = quantile(sizes, 0.1 + 0.01 * static_cast<double>(i));
    }
    const std::vector<double> errors =
        sum_over_sample(begin, candidates.size(), [&](const float* w, double* sums) {
          Weighted low;
          Weighted high;
          for (std::size_t i = 0; i < candidates.size(); ++i) {
            low.clear();
            high.clear();
            split(w, begin, salient, candidates[i], low, high);
            sums[i] += error_of_one(low.w, low.d) + error_of_one(high.w, high.d);
          }
        });
    return candidates[static_cast<std::size_t>(
        std::min_element(errors.begin(), errors.end()) - errors.begin())];
  }

  void split(
      const float* w,
      std::int64_t begin,
      const std::vector<bool>& salient,
      float threshold,
      Weighted& low,
      Weighted& high) const {
    for (std::size_t j = 0; j < salient.size(); ++j) {
      if (!salient[j]) {
        (std::fabs(w[j]) < threshold ? low : high)
            .add(w[j], importance_[static_cast<std::size_t>(begin) + j]);
      }
    }
  }

  // Levels of one row, as they are stored.
  [[nodiscard]] BillmLevels fit_row(
      const float* w, std::int64_t begin, const Structure& structure) const {
    Weighted low;
    Weighted high;
    Weighted salient;
    split(w, begin, structure.salient, structure.threshold, low, high);
    for (std::size_t j = 0; j < structure.salient.size(); ++j) {
      if (structure.salient[j]) {
        salient.add(w[j], importance_[static_cast<std::size_t>(begin) + j]);
      }
    }
    const TwoLevels below = fit_levels(low.w, low.d);
    const TwoLevels above = fit_levels(high.w, high.d);
    const TwoLevels first = fit_levels(salient.w, salient.d);
    std::vector<float> residual(salient.w.size());
    (void)level_error(salient.w, salient.d, first, residual.data());
    const TwoLevels second = fit_levels(residual, salient.d);
    BillmLevels levels;
    levels.values = {
        as_half(below.mean),
        as_half(below.scale),
        as_half(above.mean),
        as_half(above.scale),
        as_half(first.mean + second.mean),
        as_half(first.scale),
        as_half(second.scale)};
    return levels;
  }

  // Bits and levels of a block, and what its errors do to the columns behind it.
  void encode(std::int64_t begin, std::int64_t columns, const Structure& structure) {
    for (std::int64_t j = 0; j < columns; ++j) {
      if (structure.salient[static_cast<std::size_t>(j)]) {
        made_.salient[static_cast<std::size_t>((begin + j) / 8)] |=
            static_cast<std::uint8_t>(1U << ((begin + j) % 8));
      }
    }
    const std::vector<float> U = block_factor(begin, columns);
    ctx_.pool.for_chunks(rows_, kRows, [&](std::int64_t first, std::int64_t last, int) {
      std::vector<float> errors(static_cast<std::size_t>((last - first) * columns));
      for (std::int64_t r = first; r < last; ++r) {
        encode_row(r, begin, structure, U, errors.data() + (r - first) * columns);
      }
      if (factor_ != nullptr && begin + columns < n_) {
        feed_errors(first, last, begin, columns, errors);
      }
    });
  }

  // U of the block's columns, row-major; empty without a factor.
  [[nodiscard]] std::vector<float> block_factor(std::int64_t begin, std::int64_t columns) const {
    std::vector<float> U;
    if (factor_ != nullptr) {
      U.resize(static_cast<std::size_t>(columns * columns));
      for (std::int64_t j = 0; j < columns; ++j) {
        for (std::int64_t k = j; k < columns; ++k) {
          U[static_cast<std::size_t>(j * columns + k)] =
              factor_->Ut[static_cast<std::size_t>((begin + k) * n_ + begin + j)];
        }
      }
    }
    return U;
  }

  void encode_row(
      std::int64_t row,
      std::int64_t begin,
      const Structure& structure,
      const std::vector<float>& U,
      float* errors) {
    const auto columns = static_cast<std::int64_t>(structure.salient.size());
    float* w = W_.data() + row * n_ + begin;
    const BillmLevels levels = fit_row(w, begin, structure);
    made_.levels[static_cast<std::size_t>(row * made_.blocks() + begin / made_.block)] = levels;
    std::uint8_t* signs = made_.signs.data() + row * made_.row_bytes();
    std::uint8_t* seconds = made_.seconds.data() + row * made_.row_bytes();
    for (std::int64_t j = 0; j < columns; ++j) {
      const bool salient = structure.salient[static_cast<std::size_t>(j)];
      int nearest = 0;
      float difference = w[j] - levels.value(salient, false, false);
      for (int bits = 1; bits < 4; ++bits) {
        const float other = w[j] - levels.value(salient, (bits & 1) != 0, (bits & 2) != 0);
        if (std::fabs(other) < std::fabs(difference)) {
          difference = other;
          nearest = bits;
        }
      }
      const auto mask = static_cast<std::uint8_t>(1U << ((begin + j) % 8));
      signs[(begin + j) / 8] |= (nearest & 1) != 0 ? mask : std::uint8_t{0};
      seconds[(begin + j) / 8] |= (nearest & 2) != 0 ? mask : std::uint8_t{0};
      if (factor_ != nullptr) {
        errors[j] = difference * factor_->inverse_diagonal[static_cast<std::size_t>(begin + j)];
        const float* u = U.data() + j * columns;
        for (std::int64_t k = j + 1; k < columns; ++k) {
          w[k] -= errors[j] * u[k];
        }
      }
    }
  }

  // W[rows, behind the block] -= errors U[block, behind it].
  void feed_errors(
      std::int64_t first,
      std::int64_t last,
      std::int64_t begin,
      std::int64_t columns,
      const std::vector<float>& errors) {
    const std::int64_t end = begin + columns;
    ctx_.blas.gemm(
        false,
        true,
        last - first,
        n_ - end,
        columns,
        -1.0F,
        errors.data(),
        columns,
        factor_->Ut.data() + end * n_ + begin,
        n_,
        1.0F,
        W_.data() + first * n_ + end,
        n_);
  }

  const Context& ctx_;
  const std::vector<float>& importance_;
  const Factor* factor_;
  std::int64_t rows_;
  std::int64_t n_;
  std::vector<float> W_;  // [rows, n], corrected as the blocks are done
  BillmMatrix made_;
};

LinearResult finish(
    const Context& ctx,
    const LinearProblem& problem,
    std::span<const double> H,
    const BillmMatrix& plain,
    BillmMatrix chosen,
    LinearReport report) {
  const std::array<const QuantizedMatrix*, 2> both = {&plain, &chosen};
  const QuadraticErrors errors =
      quadratic_errors(ctx, problem.W, problem.out_features, problem.in_features, H, both);
  report.method = "billm";
  report.order = order_name(ColumnOrder::kNatural);
  report.rtn_error = errors.relative(0);
  report.relative_error = errors.relative(1);
  LinearResult result;
  result.report = std::move(report);
  result.matrix = std::make_shared<const BillmMatrix>(std::move(chosen));
  return result;
}

}  // namespace

LinearResult quantize_billm(
    const Context& ctx, const LinearProblem& problem, const MethodOptions& options) {
  check_problem(problem, options, 1, 1);
  LinearReport report;
  if (std::optional<std::string> reason = unusable(problem.stats, problem.in_features)) {
    report.fallback = "no error feedback: " + *reason;
    const std::vector<float> ones(static_cast<std::size_t>(problem.in_features), 1.0F);
    const BillmMatrix plain = Binarizer(ctx, problem, ones, nullptr).run();
    return finish(ctx, problem, {}, plain, plain, std::move(report));
  }
  const SiteStats& stats = *problem.stats;
  Curvature curvature = make_curvature(stats);
  curvature.shrink(options.shrinkage.value_or(estimate_kappa(stats)));
  report.tokens = stats.rows;
  report.dead_columns = curvature.dead_columns;
  report.trust = curvature.rho;
  const std::vector<float>& importance = curvature.importance;
  const BillmMatrix plain = Binarizer(ctx, problem, importance, nullptr).run();
  const std::optional<Factor> factor = factorise(
      ctx,
      curvature,
      column_order(ColumnOrder::kNatural, importance, problem.in_features),
      options.damping);
  if (!factor) {
    report.fallback =
        "no error feedback: H is not positive definite at any damping up to 1 x its mean";
    return finish(ctx, problem, stats.H, plain, plain, std::move(report));
  }
  report.damping = factor->lambda;
  BillmMatrix fed = Binarizer(ctx, problem, importance, &*factor).run();
  if (has_holdout(stats)) {
    const std::array<const QuantizedMatrix*, 2> both = {&plain, &fed};
    const QuadraticErrors holdout = quadratic_errors(
        ctx, problem.goal(), problem.out_features, problem.in_features, stats.H_holdout, both);
    const bool worse = holdout.errors[0] * holdout_margin(stats) < holdout.errors[1];
    report.holdout_error = holdout.relative(worse ? 0 : 1);
    if (worse) {
      report.fallback = fmt::format(
          "no error feedback: worse with it on {} held-out rows: {:.4g} against {:.4g}",
          stats.holdout_rows,
          holdout.relative(1),
          holdout.relative(0));
      fed = plain;
    }
  }
  return finish(ctx, problem, stats.H, plain, std::move(fed), std::move(report));
}

}  // namespace quern
