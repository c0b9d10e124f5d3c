// SPDX-License-Identifier: Apache-2.0
#include "quant/rtn.h"

#include "base/error.h"
#include "quant/clipping.h"
#include "quant/curvature.h"
#include "quant/ggml_quantize.h"
#include "quant/quadratic_error.h"
#include "quant/row_block.h"

#include <fmt/format.h>

#include <array>
#include <cmath>
#include <optional>

namespace quern {
namespace {

void check_finite(const LinearProblem& problem) {
  for (std::size_t i = 0; i < problem.W.size(); ++i) {
    if (!std::isfinite(problem.W[i])) {
      const auto width = static_cast<std::size_t>(problem.in_features);
      throw ParseError(
          "a weight is not a finite number",
          fmt::format("row {}, column {}", i / width, i % width),
          fmt::format("found {}", problem.W[i]),
          "check the checkpoint: it may be damaged or overflowed in half precision");
    }
  }
}

// Rows of ggml blocks, each by the search of ggml_quantize.h.
void round_blocks(
    const Context& ctx,
    const LinearProblem& problem,
    const std::vector<float>& importance,
    GgmlMatrix& matrix) {
  const GgmlLayout& layout = *ggml_layout(matrix.type);
  const auto width = static_cast<std::size_t>(problem.in_features);
  constexpr std::int64_t kRows = 16;
  ctx.pool.for_chunks(problem.out_features, kRows, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t r = begin; r < end; ++r) {
      const auto row = static_cast<std::size_t>(r);
      pack_row(
          matrix.type,
          quantize_row(ctx.kernels, layout, problem.goal().subspan(row * width, width), importance),
          std::span(*matrix.owner).subspan(row * matrix.row_bytes(), matrix.row_bytes()));
    }
  });
}

}  // namespace

void check_problem(
    const LinearProblem& problem, const MethodOptions& options, int min_bits, int max_bits) {
  const QuantScheme& scheme = problem.scheme;
  if (problem.out_features <= 0 || problem.in_features <= 0 ||
      problem.W.size() != static_cast<std::size_t>(problem.out_features * problem.in_features)) {
    throw Error(
        ErrorKind::kFailed,
        "the weights do not have the shape of the linear",
        "",
        fmt::format(
            "expected {} x {}, found {} values",
            problem.out_features,
            problem.in_features,
            problem.W.size()),
        "report this as a bug");
  }
  if (scheme.bits < min_bits || scheme.bits > max_bits) {
    throw UsageError(
        "bits out of range",
        "bits",
        fmt::format("expected {} to {}, found {}", min_bits, max_bits, scheme.bits),
        std::to_string(min_bits == max_bits ? min_bits : 4));
  }
  if (scheme.group_size < 0) {
    throw UsageError(
        "group size out of range",
        "group size",
        fmt::format("expected 0 (a whole row) or more, found {}", scheme.group_size),
        "128");
  }
  if (!(options.damping >= 0) || !std::isfinite(options.damping)) {
    throw UsageError(
        "damping out of range",
        "damping",
        fmt::format("expected 0 or more, found {}", options.damping),
        "0.01");
  }
  if (options.shrinkage && (!(*options.shrinkage >= 0) || !std::isfinite(*options.shrinkage))) {
    throw UsageError(
        "shrinkage out of range",
        "shrinkage",
        fmt::format("expected 0 or more, found {}", *options.shrinkage),
        "2");
  }
  if (!(options.asymmetry >= 0 && options.asymmetry <= 1)) {
    throw UsageError(
        "alpha of gptaq out of range",
        "alpha",
        fmt::format("expected 0 to 1, found {}", options.asymmetry),
        "0.25");
  }
  check_finite(problem);
}

std::shared_ptr<const QuantizedMatrix> round_to_nearest(
    const Context& ctx,
    const LinearProblem& problem,
    const MethodOptions& options,
    const std::vector<float>& importance) {
  const std::shared_ptr<QuantizedMatrix> matrix = make_matrix(problem, options.storage);
  if (problem.scheme.ggml) {
    round_blocks(ctx, problem, importance, static_cast<GgmlMatrix&>(*matrix));
    return matrix;
  }
  const GridRules rules = grid_rules(problem, options);
  const std::optional<GroupMoments> moments = group_moments(problem, options);
  ctx.pool.for_chunks(
      problem.out_features,
      rows_per_block(problem.out_features),
      [&](std::int64_t begin, std::int64_t end, int) {
        RowBlock block = RowBlock::load(problem, begin, end);
        block.find_all_ranges(ctx.kernels, problem.scheme, rules, importance.data());
        if (moments) {
          block.fit_all_ranges_to_output(ctx, problem.scheme, rules, *moments);
        }
        block.round_all(ctx.kernels, problem.scheme);
        block.store(*matrix);
      });
  return matrix;
}

LinearResult quantize_rtn(
    const Context& ctx, const LinearProblem& problem, const MethodOptions& options) {
  check_problem(problem, options);
  LinearResult result;
  result.report.method = "rtn";
  result.report.order = order_name(ColumnOrder::kNatural);
  std::span<const double> H;
  std::vector<float> importance(static_cast<std::size_t>(problem.in_features), 1.0F);
  if (!unusable(problem.stats, problem.in_features)) {
    Curvature curvature = make_curvature(*problem.stats);
    importance = std::move(curvature.importance);
    H = problem.stats->H;
    result.report.tokens = problem.stats->rows;
    result.report.dead_columns = curvature.dead_columns;
  }
  result.matrix = round_to_nearest(ctx, problem, options, importance);
  const std::array<const QuantizedMatrix*, 1> candidates = {result.matrix.get()};
  const auto measure = [&](std::span<const double> matrix) {
    return quadratic_errors(
               ctx, problem.W, problem.out_features, problem.in_features, matrix, candidates)
        .relative(0);
  };
  result.report.relative_error = measure(H);
  result.report.rtn_error = result.report.relative_error;
  if (!H.empty() && has_holdout(*problem.stats)) {
    result.report.holdout_error = measure(problem.stats->H_holdout);
  }
  return result;
}

}  // namespace quern
