// SPDX-License-Identifier: Apache-2.0
#include "quant/error_feedback.h"

#include "kernels/blas.h"
#include "kernels/kernels.h"
#include "quant/clipping.h"
#include "quant/curvature.h"
#include "quant/descent.h"
#include "quant/quadratic_error.h"
#include "quant/row_block.h"
#include "quant/rtn.h"
#include "quant/shrinkage.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

namespace quern {
namespace {

// Everything the recursion of one row block shares with the others.
struct Recursion {
  const Context& ctx;
  const QuantScheme& scheme;
  const GridRules& rules;
  const Factor& factor;
  const std::vector<std::int32_t>& order;  // position -> column
  const std::vector<float>& importance;  // by position
  const std::optional<GroupMoments>& moments;  // by position; for kOutput
  bool dynamic_groups;  // ranges from the corrected weights, at the start of each group
  std::span<const float> start;  // [rows, columns] what it starts from; empty: the block's W
};

// GPTQ on one row block. Positions are visited from the left; an interval is split in two halves,
// the left one is finished, its errors are fed into the right one by one product, and so on down to
// intervals that the kernel handles. That is the blocked algorithm of the paper with every block
// size at once, so most of the work is in large products, and every interval is up to date when it
// is entered. Splits fall on group boundaries first: a group's range is found from weights that
// contain all earlier corrections, whatever the group size.
class RecursionBlock {
 public:
  RecursionBlock(const Recursion& shared, RowBlock& block)
      : shared_(shared),
        block_(block),
        n_(block.columns),
        lanes_(block.lanes),
        width_(shared.scheme.group_width(block.columns)),
        W_(block.W.size()),
        errors_(block.W.size()),
        codes_(block.codes.size()),
        group_of_(static_cast<std::size_t>(block.columns)) {}

  // Leaves codes, ranges (dynamic groups) and D in the block.
  void run() {
    const std::vector<float> start =
        shared_.start.empty() ? std::vector<float>()
                              : load_columns(shared_.start, n_, block_.first, block_.rows, lanes_);
    const std::vector<float>& from = start.empty() ? block_.W : start;
    for (std::int64_t p = 0; p < n_; ++p) {
      const std::int64_t column = shared_.order[static_cast<std::size_t>(p)];
      std::memcpy(at(W_, p), from.data() + column * lanes_, row_bytes<float>());
      group_of_[static_cast<std::size_t>(p)] = block_.group_of[static_cast<std::size_t>(column)];
    }
    if (shared_.dynamic_groups) {
      solve_groups(0, shared_.scheme.groups(n_));
    } else {
      solve_columns(0, n_);
    }
    for (std::int64_t p = 0; p < n_; ++p) {
      const std::int64_t column = shared_.order[static_cast<std::size_t>(p)];
      std::memcpy(at(block_.codes, column), at(codes_, p), row_bytes<std::uint8_t>());
    }
    block_.update_difference();
  }

 private:
  // Columns that the kernel takes at once: its triangle stays in the first-level cache.
  static constexpr std::int64_t kLeaf = 32;

  template <class Value>
  Value* at(std::vector<Value>& matrix, std::int64_t column) const {
    return matrix.data() + column * lanes_;
  }
  template <class Value>
  [[nodiscard]] std::size_t row_bytes() const {
    return static_cast<std::size_t>(lanes_) * sizeof(Value);
  }

  void solve_groups(std::int64_t first, std::int64_t last) {
    const std::int64_t begin = first * width_;
    const std::int64_t end = std::min(last * width_, n_);
    if (last - first == 1) {
      const std::int64_t cells = group_of_[static_cast<std::size_t>(begin)] * lanes_;
      find_ranges(
          shared_.ctx.kernels,
          shared_.rules,
          at(W_, begin),
          lanes_,
          shared_.importance.data() + begin,
          end - begin,
          block_.scales.data() + cells,
          block_.zeros.data() + cells);
      if (shared_.moments) {
        fit_ranges_to_output(
            shared_.ctx,
            shared_.rules,
            shared_.moments->at(begin),
            at(W_, begin),
            lanes_,
            end - begin,
            block_.scales.data() + cells,
            block_.zeros.data() + cells);
      }
      solve_columns(begin, end);
      return;
    }
    const std::int64_t middle = first + (last - first + 1) / 2;
    solve_groups(first, middle);
    feed_errors(begin, middle * width_, end);
    solve_groups(middle, last);
  }

  void solve_columns(std::int64_t begin, std::int64_t end) {
    if (end - begin <= kLeaf) {
      const ColumnGrid grid = {
          lanes_,
          end - begin,
          group_of_.data() + begin,
          block_.scales.data(),
          block_.zeros.data(),
          shared_.rules.max_code()};
      const ColumnTile triangle = {
          shared_.factor.Ut.data() + begin * (n_ + 1),
          n_,
          shared_.factor.inverse_diagonal.data() + begin};
      shared_.ctx.kernels.gptq_columns(
          &grid, &triangle, at(W_, begin), at(errors_, begin), at(codes_, begin));
      return;
    }
    const std::int64_t half = (end - begin + 1) / 2;
    const std::int64_t middle = begin + (half + kLeaf - 1) / kLeaf * kLeaf;
    solve_columns(begin, middle);
    feed_errors(begin, middle, end);
    solve_columns(middle, end);
  }

  // W[:, middle…end) -= errors[:, begin…middle) U[begin…middle, middle…end).
  void feed_errors(std::int64_t begin, std::int64_t middle, std::int64_t end) {
    shared_.ctx.blas.gemm(
        false,
        false,
        end - middle,
        lanes_,
        middle - begin,
        -1.0F,
        shared_.factor.Ut.data() + middle * n_ + begin,
        n_,
        at(errors_, begin),
        lanes_,
        1.0F,
        at(W_, middle),
        lanes_);
  }

  const Recursion& shared_;
  RowBlock& block_;
  std::int64_t n_;
  std::int64_t lanes_;
  std::int64_t width_;
  std::vector<float> W_;  // by position, corrected as the recursion goes
  std::vector<float> errors_;  // (w - q) / U_jj
  std::vector<std::uint8_t> codes_;
  std::vector<std::int32_t> group_of_;  // by position
};

// Recursion and descent once more with the scales that the descent fitted.
void restart(
    const Recursion& recursion,
    const Descent& descent,
    const MethodOptions& options,
    RowBlock& block) {
  Recursion with_given_ranges = recursion;
  with_given_ranges.dynamic_groups = false;
  RowBlock again = block;
  RecursionBlock(with_given_ranges, again).run();
  descent.run(again, options.descent_sweeps, options.refit_rounds);
  const std::vector<double> before = descent.errors(block);
  const std::vector<double> after = descent.errors(again);
  for (std::int64_t r = 0; r < block.lanes; ++r) {
    if (after[static_cast<std::size_t>(r)] < before[static_cast<std::size_t>(r)]) {
      block.take_row(again, r);
    }
  }
}

LinearResult fall_back(
    const Context& ctx,
    const LinearProblem& problem,
    const MethodOptions& options,
    std::string reason) {
  LinearResult result = quantize_rtn(ctx, problem, options);
  result.report.fallback = std::move(reason);
  return result;
}

// Between single texts of 512 rows the ratio of two errors varies by about a third.
constexpr double kHoldoutNoise = 8.0;

// The three matrices that come out of one pass over the rows.
struct Candidates {
  std::shared_ptr<QuantizedMatrix> rtn;
  std::shared_ptr<QuantizedMatrix> recursion;
  std::shared_ptr<QuantizedMatrix> descent;  // null without descent
};

Candidates solve(
    const Context& ctx,
    const LinearProblem& problem,
    const MethodOptions& options,
    const Curvature& curvature,
    const Factor& factor,
    const std::vector<std::int32_t>& order,
    std::span<const float> start) {
  const QuantScheme& scheme = problem.scheme;
  const GridRules rules = grid_rules(problem, options);
  // Blocks of a ggml type share super-scales: their ranges cannot follow the recursion.
  const bool dynamic_groups = options.order != ColumnOrder::kActivation && !scheme.ggml;
  const std::optional<GroupMoments> moments = group_moments(problem, options);
  const std::optional<GroupMoments> ordered_moments =
      dynamic_groups ? group_moments(problem, options, order) : std::nullopt;
  std::vector<float> importance(order.size());
  for (std::size_t p = 0; p < order.size(); ++p) {
    importance[p] = curvature.importance[static_cast<std::size_t>(order[p])];
  }
  const Recursion recursion = {
      ctx, scheme, rules, factor, order, importance, ordered_moments, dynamic_groups, start};
  // The descent has no use for damping: it inverts nothing, and what the damping stands for is in
  // the shrinkage.
  const bool descends = options.descent_sweeps > 0 || options.refit_rounds > 0;
  const std::vector<float> H = descends ? dense_curvature(ctx, curvature) : std::vector<float>();
  const Descent descent(ctx, scheme, options.storage.scale_dtype, H);

  Candidates made;
  made.rtn = make_matrix(problem, options.storage);
  made.recursion = make_matrix(problem, options.storage);
  if (descends) {
    made.descent = make_matrix(problem, options.storage);
  }
  ctx.pool.for_chunks(
      problem.out_features,
      rows_per_block(problem.out_features),
      [&](std::int64_t begin, std::int64_t end, int) {
        RowBlock block = RowBlock::load(problem, begin, end);
        block.find_all_ranges(ctx.kernels, scheme, rules, curvature.importance.data());
        if (moments) {
          block.fit_all_ranges_to_output(ctx, scheme, rules, *moments);
        }
        block.round_all(ctx.kernels, scheme);
        block.store(*made.rtn);
        RecursionBlock(recursion, block).run();
        block.store(*made.recursion);
        if (descends) {
          descent.run(block, options.descent_sweeps, options.refit_rounds);
          for (int i = 0; i < options.restarts; ++i) {
            restart(recursion, descent, options, block);
          }
          block.store(*made.descent);
        }
      });
  return made;
}

}  // namespace

double holdout_margin(const SiteStats& stats) {
  return 1 + kHoldoutNoise / std::sqrt(static_cast<double>(stats.holdout_rows));
}

LinearResult quantize_with_feedback(
    const Context& ctx,
    const LinearProblem& problem,
    const MethodOptions& options,
    std::string_view name,
    const FeedbackSetup& setup) {
  check_problem(problem, options);
  if (std::optional<std::string> reason = unusable(problem.stats, problem.in_features)) {
    return fall_back(ctx, problem, options, std::move(*reason));
  }
  if (problem.scheme.ggml && (!ggml_layout(*problem.scheme.ggml)->linear || setup)) {
    return fall_back(
        ctx,
        problem,
        options,
        fmt::format("{} does not round to {}", name, ggml_type_info(*problem.scheme.ggml).name));
  }
  const SiteStats& stats = *problem.stats;
  Curvature curvature = make_curvature(stats);
  curvature.shrink(options.shrinkage.value_or(estimate_kappa(stats)));
  const std::vector<std::int32_t> order = column_order(
      options.order, curvature.importance, problem.scheme.group_width(problem.in_features));
  std::optional<Factor> factor = factorise(ctx, curvature, order, options.damping);
  if (!factor) {
    return fall_back(
        ctx, problem, options, "H is not positive definite at any damping up to 1 x its mean");
  }
  const std::vector<float> start = setup ? setup(order, *factor) : std::vector<float>();
  Candidates made = solve(ctx, problem, options, curvature, *factor, order, start);

  LinearResult result;
  LinearReport& report = result.report;
  report.method = name;
  report.order = order_name(options.order);
  report.damping = factor->lambda;
  report.trust = curvature.rho;
  report.tokens = stats.rows;
  report.dead_columns = curvature.dead_columns;

  const std::array<std::shared_ptr<QuantizedMatrix>, 3> all = {
      made.rtn, made.recursion, made.descent ? made.descent : made.recursion};
  const auto measure = [&](std::span<const double> H,
                           std::span<const QuantizedMatrix* const> which) {
    return quadratic_errors(
        ctx, problem.goal(), problem.out_features, problem.in_features, H, which);
  };
  // The last candidate has the lowest error on H; the others are taken when the held-out rows say
  // so clearly.
  std::size_t chosen = 2;
  if (has_holdout(stats)) {
    const std::array<const QuantizedMatrix*, 3> judged = {all[0].get(), all[1].get(), all[2].get()};
    const QuadraticErrors holdout = measure(stats.H_holdout, judged);
    const double margin = holdout_margin(stats);
    if (holdout.errors[1] * margin < holdout.errors[chosen]) {
      chosen = 1;
    }
    if (holdout.errors[0] * margin < holdout.errors[chosen]) {
      report.fallback = fmt::format(
          "worse than rtn on {} held-out rows: {:.4g} against {:.4g}",
          stats.holdout_rows,
          holdout.relative(chosen),
          holdout.relative(0));
      report.method = "rtn";
      chosen = 0;
    }
    report.holdout_error = holdout.relative(chosen);
  }
  const std::array<const QuantizedMatrix*, 2> kept = {all[0].get(), all[chosen].get()};
  const QuadraticErrors errors =
      quadratic_errors(ctx, problem.W, problem.out_features, problem.in_features, stats.H, kept);
  report.rtn_error = errors.relative(0);
  report.relative_error = errors.relative(1);
  result.matrix = all[chosen];
  return result;
}

}  // namespace quern
