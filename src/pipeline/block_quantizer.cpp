// SPDX-License-Identifier: Apache-2.0
#include "pipeline/block_quantizer.h"

#include "base/error.h"
#include "base/process.h"
#include "calib/statistics.h"

#include <fmt/format.h>

#include <optional>
#include <utility>

namespace quern {
namespace {

double site_apply_work(
    const Block& block, const ModelConfig& config, int site, double tokens, double length) {
  double work = 0;
  for (const int index : block.sites[static_cast<std::size_t>(site)].linears) {
    work +=
        tokens * static_cast<double>(block.linears[static_cast<std::size_t>(index)].parameters());
  }
  if (site == kAttentionInput) {
    work += tokens * length * static_cast<double>(config.heads * config.head_dim);
  }
  return work;
}

double site_gather_work(const Block& block, int site, double tokens) {
  const auto width = static_cast<double>(block.sites[static_cast<std::size_t>(site)].width);
  return tokens * width * width / 2;
}

// methods.md 13: factorisation 2/3 n^3, recursion and each sweep m n^2 to 2 m n^2.
double rounding_work(const Linear& linear, const MethodOptions& options) {
  const auto m = static_cast<double>(linear.out_features);
  const auto n = static_cast<double>(linear.in_features);
  const double sweeps = options.descent_sweeps + 2.0 * options.refit_rounds;
  return n * n * n / 3 + m * n * n * (0.5 + sweeps + 0.5 * options.refit_rounds);
}

// Adds what passes between its making and its end to a part.
class PartTimer {
 public:
  explicit PartTimer(PartTime& part)
      : part_(part), seconds_(steady_seconds()), cpu_(process_usage().cpu_seconds) {}
  PartTimer(const PartTimer&) = delete;
  PartTimer& operator=(const PartTimer&) = delete;
  ~PartTimer() {
    part_.seconds += steady_seconds() - seconds_;
    part_.cpu_seconds += process_usage().cpu_seconds - cpu_;
  }

 private:
  PartTime& part_;
  double seconds_;
  double cpu_;
};

}  // namespace

BlockWork block_work(
    const Block& block,
    const ModelConfig& config,
    double tokens,
    double length,
    const MethodOptions& options) {
  BlockWork work;
  for (int site = 0; site < static_cast<int>(block.sites.size()); ++site) {
    work.gather += site_gather_work(block, site, tokens);
    work.apply += site_apply_work(block, config, site, tokens, length);
  }
  for (const Linear& linear : block.linears) {
    work.round += rounding_work(linear, options);
  }
  return work;
}

BlockQuantizer::BlockQuantizer(
    const Context& ctx,
    const ModelGraph& graph,
    const QuantPlan& plan,
    const MethodOptions& options,
    std::filesystem::path spill_directory)
    : ctx_(ctx),
      graph_(graph),
      plan_(plan),
      options_(options),
      spill_directory_(std::move(spill_directory)),
      workspace_(ctx) {}

void BlockQuantizer::stop_if_interrupted() const {
  if (ctx_.interrupted()) {
    throw InterruptedError(
        "interrupted",
        "",
        "the finished blocks are saved",
        "run the same command again: it goes on from there");
  }
}

LinearResult BlockQuantizer::round_linear(
    const PlannedLinear& planned, const LinearProblem& problem) const {
  try {
    return find_method(planned.method)->quantize(ctx_, problem, options_);
  } catch (const Error& error) {
    // The methods know rows and columns, not whose.
    const std::string where = planned.name + (error.where().empty() ? "" : ", " + error.where());
    throw Error(error.kind(), error.failed(), where, error.reason(), error.hint());
  }
}

void BlockQuantizer::load_site_input(
    const BlockWeights& weights,
    int site,
    const CalibrationState& state,
    const ActivationStore* carried,
    std::int64_t sequence) {
  const std::int64_t rows = state.x.rows(sequence);
  const ModelConfig& config = graph_.config;
  x_.resize(static_cast<std::size_t>(rows * config.hidden_size));
  state.x.read(sequence, x_.data());
  if (site_reads_residual(site)) {
    X_.resize(x_.size());
    site_input(ctx_, config, weights, site, x_.data(), rows, X_.data());
  } else {
    X_.resize(static_cast<std::size_t>(rows * carried->width()));
    carried->read(sequence, X_.data());
  }
}

SiteStats BlockQuantizer::gather(
    const Block& block,
    const BlockWeights& weights,
    int site,
    const CalibrationState& state,
    const ActivationStore* carried,
    Progress& progress) {
  const PartTimer timer(times_.gather);
  SiteAccumulator accumulator(block.sites[static_cast<std::size_t>(site)].width);
  for (std::int64_t i = 0; i < static_cast<std::int64_t>(state.order.size()); ++i) {
    stop_if_interrupted();
    const std::int64_t sequence = state.order[static_cast<std::size_t>(i)];
    const std::int64_t rows = state.x.rows(sequence);
    load_site_input(weights, site, state, carried, sequence);
    accumulator.add(ctx_, X_.data(), rows, state.is_holdout(i));
    const double work = site_gather_work(block, site, static_cast<double>(rows));
    times_.gather.work += work;
    progress.add(work);
  }
  SiteStats stats = accumulator.finish(ctx_);
  if (stats.rows + stats.holdout_rows == 0 && stats.dropped_rows > 0) {
    throw ParseError(
        "the model computes values that are not finite",
        fmt::format("layer {}, {}", block.index, block.sites[static_cast<std::size_t>(site)].name),
        fmt::format("all {} calibration tokens give infinity or NaN there", stats.dropped_rows),
        "check the checkpoint with quern verify: it may be damaged");
  }
  return stats;
}

void BlockQuantizer::quantize_site(
    const Block& block,
    BlockWeights& weights,
    int site,
    const SiteStats* stats,
    std::vector<QuantizedLinear>& done,
    Progress& progress) {
  for (const int index : block.sites[static_cast<std::size_t>(site)].linears) {
    const Linear& linear = block.linears[static_cast<std::size_t>(index)];
    const PlannedLinear* planned = plan_.find(linear.module);
    LinearWeights& target = weights.linears[static_cast<std::size_t>(index)];
    const PartTimer timer(times_.round);
    times_.round.work += rounding_work(linear, options_);
    progress.add(rounding_work(linear, options_));
    if (planned == nullptr || planned->keep()) {
      continue;
    }
    stop_if_interrupted();
    const double started = steady_seconds();
    const std::vector<float> W = to_float(target.dense);
    const LinearProblem problem{W, linear.out_features, linear.in_features, stats, planned->scheme};
    LinearResult result = round_linear(*planned, problem);
    QuantizedLinear row;
    row.plan = planned;
    row.matrix = std::move(result.matrix);
    row.report = std::move(result.report);
    row.seconds = steady_seconds() - started;
    target.quantized = row.matrix;
    done.push_back(std::move(row));
  }
}

std::optional<ActivationStore> BlockQuantizer::apply_to_all(
    const Block& block,
    const BlockWeights& weights,
    int site,
    CalibrationState& state,
    const ActivationStore* carried,
    Progress& progress) {
  const PartTimer timer(times_.apply);
  std::optional<ActivationStore> next;
  if (site + 1 < static_cast<int>(block.sites.size()) && !site_reads_residual(site + 1)) {
    std::vector<std::int64_t> rows;
    for (std::int64_t i = 0; i < state.x.count(); ++i) {
      rows.push_back(state.x.rows(i));
    }
    next.emplace(
        block.sites[static_cast<std::size_t>(site) + 1].width, std::move(rows), spill_directory_);
  }
  for (const std::int64_t sequence : state.order) {
    stop_if_interrupted();
    const std::int64_t rows = state.x.rows(sequence);
    load_site_input(weights, site, state, carried, sequence);
    carried_.resize(next ? static_cast<std::size_t>(rows * next->width()) : 0);
    LayerCache cache;
    apply_site(
        ctx_,
        workspace_,
        graph_.config,
        block,
        weights,
        site,
        X_.data(),
        rows,
        cache,
        x_.data(),
        carried_.data());
    if (next) {
      next->write(sequence, carried_.data());
    } else {
      state.x.write(sequence, x_.data());
    }
    const double work = site_apply_work(
        block, graph_.config, site, static_cast<double>(rows), static_cast<double>(rows));
    times_.apply.work += work;
    progress.add(work);
  }
  return next;
}

std::vector<QuantizedLinear> BlockQuantizer::run(
    const Block& block, BlockWeights& weights, CalibrationState& state, Progress& progress) {
  std::vector<QuantizedLinear> done;
  std::optional<ActivationStore> carried;
  const auto sites = static_cast<int>(block.sites.size());
  for (int site = 0; site < sites; ++site) {
    progress.set_stage(fmt::format(
        "layer {}/{}  {}",
        block.index + 1,
        graph_.blocks.size(),
        block.sites[static_cast<std::size_t>(site)].name));
    {
      const SiteStats stats =
          gather(block, weights, site, state, carried ? &*carried : nullptr, progress);
      quantize_site(block, weights, site, &stats, done, progress);
    }
    carried = apply_to_all(block, weights, site, state, carried ? &*carried : nullptr, progress);
  }
  return done;
}

void BlockQuantizer::advance(
    const Block& block, const BlockWeights& weights, CalibrationState& state, Progress& progress) {
  progress.set_stage(fmt::format(
      "layer {}/{}  done before, running through it", block.index + 1, graph_.blocks.size()));
  LayerCache cache;
  for (const std::int64_t sequence : state.order) {
    stop_if_interrupted();
    const std::int64_t rows = state.x.rows(sequence);
    x_.resize(static_cast<std::size_t>(rows * graph_.config.hidden_size));
    state.x.read(sequence, x_.data());
    cache.clear();
    block_forward(ctx_, workspace_, graph_.config, block, weights, rows, cache, x_.data());
    state.x.write(sequence, x_.data());
    for (int site = 0; site < static_cast<int>(block.sites.size()); ++site) {
      progress.add(site_apply_work(
          block, graph_.config, site, static_cast<double>(rows), static_cast<double>(rows)));
    }
  }
}

std::vector<QuantizedLinear> BlockQuantizer::run_data_free(
    const Block& block, BlockWeights& weights, Progress& progress) {
  progress.set_stage(fmt::format("layer {}/{}", block.index + 1, graph_.blocks.size()));
  std::vector<QuantizedLinear> done;
  for (int site = 0; site < static_cast<int>(block.sites.size()); ++site) {
    quantize_site(block, weights, site, nullptr, done, progress);
  }
  return done;
}

}  // namespace quern
