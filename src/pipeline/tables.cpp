// SPDX-License-Identifier: Apache-2.0
#include "pipeline/tables.h"

#include "base/process.h"
#include "calib/statistics.h"
#include "kernels/kernels.h"
#include "nn/linear.h"
#include "quant/ggml_matrix.h"
#include "quant/mixed_rows.h"
#include "quant/packed_linear.h"
#include "tokenizer/tokenizer.h"

#include <algorithm>
#include <iterator>
#include <numeric>
#include <utility>

namespace quern {
namespace {

constexpr std::int64_t kSliceRows = 8192;

// Appends the rows of a slice to a table of the same scheme.
void append(PackedLinear& table, const PackedLinear& slice) {
  table.out_features += slice.out_features;
  table.codes.insert(table.codes.end(), slice.codes.begin(), slice.codes.end());
  table.scales.insert(table.scales.end(), slice.scales.begin(), slice.scales.end());
  table.zeros.insert(table.zeros.end(), slice.zeros.begin(), slice.zeros.end());
}

// The slices of a table, one below the other.
std::shared_ptr<const QuantizedMatrix> join(
    const std::vector<std::shared_ptr<const QuantizedMatrix>>& slices) {
  if (slices.size() == 1) {
    return slices.front();
  }
  if (const auto* blocks = dynamic_cast<const GgmlMatrix*>(slices.front().get())) {
    std::vector<std::byte> bytes;
    std::int64_t rows = 0;
    for (const auto& slice : slices) {
      const auto& part = dynamic_cast<const GgmlMatrix&>(*slice);
      bytes.insert(bytes.end(), part.bytes.begin(), part.bytes.end());
      rows += part.out_features;
    }
    return std::make_shared<const GgmlMatrix>(
        GgmlMatrix::make(blocks->type, rows, blocks->in_features, std::move(bytes)));
  }
  auto table = std::make_shared<PackedLinear>(as_packed(*slices.front(), "table"));
  for (std::size_t i = 1; i < slices.size(); ++i) {
    append(*table, as_packed(*slices[i], "table"));
  }
  return table;
}

// Rounds the given rows of a dense table with one method. The reports of the slices are joined.
std::shared_ptr<const QuantizedMatrix> round_rows(
    const Context& ctx,
    const LinearWeights& weights,
    std::span<const std::int64_t> rows,
    const std::string& method,
    const QuantScheme& scheme,
    const SiteStats* stats,
    const MethodOptions& options,
    LinearReport& report) {
  const std::int64_t width = weights.in_features;
  std::vector<std::shared_ptr<const QuantizedMatrix>> slices;
  std::vector<float> W;
  std::vector<std::uint8_t> scratch(static_cast<std::size_t>(width));
  for (std::size_t begin = 0; begin < rows.size(); begin += kSliceRows) {
    const std::size_t end = std::min(begin + kSliceRows, rows.size());
    W.resize((end - begin) * static_cast<std::size_t>(width));
    for (std::size_t i = begin; i < end; ++i) {
      float* row = W.data() + (i - begin) * static_cast<std::size_t>(width);
      const float* from = weight_row(ctx.kernels, weights, rows[i], scratch.data(), row);
      if (from != row) {
        std::copy(from, from + width, row);
      }
    }
    LinearProblem problem;
    problem.W = W;
    problem.out_features = static_cast<std::int64_t>(end - begin);
    problem.in_features = width;
    problem.stats = stats;
    problem.scheme = scheme;
    const LinearResult result = find_method(method)->quantize(ctx, problem, options);
    slices.push_back(result.matrix);
    const double share = static_cast<double>(end - begin) / static_cast<double>(rows.size());
    const double error = report.relative_error + share * result.report.relative_error;
    const std::optional<std::string> fallback =
        report.fallback ? report.fallback : result.report.fallback;
    report = result.report;
    report.relative_error = error;
    report.fallback = fallback;
    report.holdout_error.reset();  // of the last slice only
    report.rtn_error.reset();
  }
  return join(slices);
}

std::vector<std::int64_t> all_rows(std::int64_t count) {
  std::vector<std::int64_t> rows(static_cast<std::size_t>(count));
  std::iota(rows.begin(), rows.end(), std::int64_t{0});
  return rows;
}

// Whether each row must have 8 bits.
std::vector<bool> forced_rows(const std::filesystem::path& model, std::int64_t vocab) {
  const Tokenizer tokenizer = load_tokenizer(model);
  std::vector<bool> forced(static_cast<std::size_t>(vocab), false);
  const auto known =
      static_cast<std::int32_t>(std::min(vocab, static_cast<std::int64_t>(tokenizer.vocab_size())));
  for (std::int32_t id = 0; id < known; ++id) {
    forced[static_cast<std::size_t>(id)] =
        tokenizer.is_special(id) || tokenizer.is_added(id) || tokenizer.token_bytes(id).size() == 1;
  }
  return forced;
}

// Whether each row is among the `count` hot ones.
std::vector<bool> hot_rows(
    const PreparedRun& run, const CalibrationSet& calibration, std::int64_t count) {
  const std::int64_t vocab = run.graph.config.vocab_size;
  std::vector<std::int64_t> seen(static_cast<std::size_t>(vocab), 0);
  for (const auto& sequence : calibration.sequences) {
    for (const std::int32_t id : sequence) {
      ++seen[static_cast<std::size_t>(id)];
    }
  }
  std::vector<bool> hot = forced_rows(run.source->directory(), vocab);
  const std::vector<std::int64_t> ids = all_rows(vocab);
  std::vector<std::int64_t> others;
  std::copy_if(ids.begin(), ids.end(), std::back_inserter(others), [&](std::int64_t id) {
    return !hot[static_cast<std::size_t>(id)];
  });
  std::stable_sort(others.begin(), others.end(), [&](std::int64_t a, std::int64_t b) {
    return seen[static_cast<std::size_t>(a)] > seen[static_cast<std::size_t>(b)];
  });
  const auto left =
      static_cast<std::size_t>(count - (vocab - static_cast<std::int64_t>(others.size())));
  for (std::size_t i = 0; i < std::min(left, others.size()); ++i) {
    hot[static_cast<std::size_t>(others[i])] = true;
  }
  return hot;
}

std::shared_ptr<const QuantizedMatrix> round_mixed(
    const Context& ctx,
    const LinearWeights& weights,
    const PlannedLinear& planned,
    const std::vector<bool>& hot,
    const MethodOptions& options,
    LinearReport& report) {
  auto mixed = std::make_shared<MixedRows>();
  mixed->out_features = weights.out_features;
  mixed->in_features = weights.in_features;
  std::vector<std::int64_t> hot_list;
  std::vector<std::int64_t> cold_list;
  for (std::int64_t row = 0; row < weights.out_features; ++row) {
    const bool is_hot = hot[static_cast<std::size_t>(row)];
    std::vector<std::int64_t>& list = is_hot ? hot_list : cold_list;
    mixed->row_map.push_back(
        static_cast<std::uint32_t>(list.size()) | (is_hot ? MixedRows::kHotBit : 0U));
    list.push_back(row);
  }
  QuantScheme hot_scheme = planned.scheme;
  hot_scheme.bits = MixedRows::kHotBits;
  const auto round = [&](const std::vector<std::int64_t>& rows, const QuantScheme& scheme) {
    return as_packed(
        *round_rows(ctx, weights, rows, planned.method, scheme, nullptr, options, report),
        planned.name);
  };
  mixed->hot = round(hot_list, hot_scheme);
  mixed->cold = round(cold_list, planned.scheme);
  return mixed;
}

QuantizedBlock one_linear(
    const PlannedLinear* planned,
    std::shared_ptr<const QuantizedMatrix> matrix,
    LinearReport report,
    double seconds) {
  QuantizedBlock done;
  QuantizedLinear linear;
  linear.plan = planned;
  linear.matrix = std::move(matrix);
  linear.report = std::move(report);
  linear.seconds = seconds;
  done.linears.push_back(std::move(linear));
  return done;
}

SiteStats head_statistics(
    const Context& ctx, const PreparedRun& run, const CalibrationState& state) {
  const std::int64_t width = run.graph.config.hidden_size;
  const std::vector<float> gain =
      to_float(run.source->tensors().require(run.graph.final_norm.tensor, {width}));
  SiteAccumulator accumulator(width);
  std::vector<float> x;
  for (std::size_t i = 0; i < state.order.size(); ++i) {
    const std::int64_t rows = state.x.rows(state.order[i]);
    x.resize(static_cast<std::size_t>(rows * width));
    state.x.read(state.order[i], x.data());
    for (std::int64_t t = 0; t < rows; ++t) {
      float* row = x.data() + t * width;
      ctx.kernels.rms_norm(row, gain.data(), run.graph.config.norm_eps, row, width);
    }
    accumulator.add(ctx, x.data(), nullptr, rows, state.is_holdout(static_cast<std::int64_t>(i)));
  }
  return accumulator.finish(ctx);
}

}  // namespace

void resolve_hot_rows(const std::filesystem::path& model, bool fresh, QuantPlan& plan) {
  for (PlannedLinear& linear : plan.linears) {
    if (linear.hot_rows == 0 || linear.keep()) {
      continue;
    }
    const std::vector<bool> forced = forced_rows(model, linear.out_features);
    const std::int64_t least = std::count(forced.begin(), forced.end(), true);
    linear.hot_rows = fresh ? linear.hot_rows + least : std::max(linear.hot_rows, least);
    if (linear.hot_rows >= linear.out_features) {
      linear.hot_rows = 0;
      linear.scheme.bits = MixedRows::kHotBits;
    }
  }
}

QuantizedBlock quantize_embedding(
    const Context& ctx,
    const PreparedRun& run,
    const CalibrationSet& calibration,
    const MethodOptions& options) {
  const PlannedLinear* planned = run.plan.find(run.graph.embedding.module);
  if (planned == nullptr || planned->keep()) {
    return {};
  }
  const double started = steady_seconds();
  const LinearWeights weights = load_linear_weights(run.graph.embedding, *run.source);
  LinearReport report;
  std::shared_ptr<const QuantizedMatrix> matrix;
  if (planned->hot_rows > 0) {
    const std::vector<bool> hot = hot_rows(run, calibration, planned->hot_rows);
    matrix = round_mixed(ctx, weights, *planned, hot, options, report);
  } else {
    const std::vector<std::int64_t> rows = all_rows(weights.out_features);
    matrix =
        round_rows(ctx, weights, rows, planned->method, planned->scheme, nullptr, options, report);
  }
  run.source->tensors().release(weights.dense);
  return one_linear(planned, std::move(matrix), std::move(report), steady_seconds() - started);
}

QuantizedBlock quantize_head(
    const Context& ctx,
    const PreparedRun& run,
    const CalibrationState* state,
    const MethodOptions& options) {
  const PlannedLinear* planned = run.plan.find(run.graph.head.module);
  if (run.graph.head_tied || planned == nullptr || planned->keep()) {
    return {};
  }
  const double started = steady_seconds();
  const LinearWeights weights = load_linear_weights(run.graph.head, *run.source);
  std::optional<SiteStats> stats;
  if (state != nullptr) {
    stats = head_statistics(ctx, run, *state);
  }
  LinearReport report;
  const std::vector<std::int64_t> rows = all_rows(weights.out_features);
  std::shared_ptr<const QuantizedMatrix> matrix = round_rows(
      ctx,
      weights,
      rows,
      planned->method,
      planned->scheme,
      stats ? &*stats : nullptr,
      options,
      report);
  run.source->tensors().release(weights.dense);
  return one_linear(planned, std::move(matrix), std::move(report), steady_seconds() - started);
}

}  // namespace quern
