// SPDX-License-Identifier: Apache-2.0
#include "pipeline/block_quantizer.h"

#include "base/error.h"
#include "base/process.h"
#include "calib/statistics.h"
#include "pipeline/importance.h"
#include "plan/site_scaling.h"
#include "quant/activation.h"
#include "quant/clipping.h"
#include "quant/curvature.h"
#include "quant/mismatch.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <span>
#include <utility>

namespace quern {
namespace {

// The share of the rows that a linear of the block sees.
double share_of_rows(const Block& block, int index) {
  return block.is_expert(index) ? static_cast<double>(block.mixture->experts_per_token) /
                                      static_cast<double>(block.mixture->experts)
                                : 1.0;
}

double site_apply_work(
    const Block& block, const ModelConfig& config, int site, double tokens, double length) {
  double work = 0;
  for (const int index : block.sites[static_cast<std::size_t>(site)].linears) {
    const Linear& linear = block.linears[static_cast<std::size_t>(index)];
    work += tokens * share_of_rows(block, index) * static_cast<double>(linear.parameters());
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

// Tokens that judge factors between two linears: they have few degrees of freedom.
constexpr double kFactorTokens = 16384;

// W of a linear with its rows divided and its columns multiplied.
std::vector<float> scaled_weights(
    const LinearWeights& weights, std::span<const float> rows, std::span<const float> columns) {
  std::vector<float> W = to_float(weights.dense);
  const auto width = static_cast<std::size_t>(weights.in_features);
  for (std::size_t r = 0; r * width < W.size(); ++r) {
    float* row = W.data() + r * width;
    const float divisor = rows.empty() ? 1.0F : rows[r];
    for (std::size_t j = 0; j < width; ++j) {
      row[j] = row[j] / divisor * (columns.empty() ? 1.0F : columns[j]);
    }
  }
  return W;
}

// A tensor of the source with other values, rounded to its dtype.
ReplacedTensor replaced(
    const TensorStore& source, const std::string& name, std::span<const float> values) {
  const TensorView& view = source.require(name, {static_cast<std::int64_t>(values.size())});
  return {name, view.dtype, view.shape, from_float(values, view.dtype)};
}

// Sums of squares at the inputs of a site; `columns` are the factors that its inputs were divided
// by (empty: 1).
std::vector<float> input_squares(const SiteStats& stats, std::span<const float> columns) {
  const auto width = static_cast<std::size_t>(stats.width);
  std::vector<float> sums(width);
  for (std::size_t j = 0; j < width; ++j) {
    const std::size_t jj = j * (width + 1);
    const double sum =
        stats.H[jj] * static_cast<double>(stats.rows) +
        (stats.H_holdout.empty() ? 0.0
                                 : stats.H_holdout[jj] * static_cast<double>(stats.holdout_rows));
    const double factor = columns.empty() ? 1.0 : columns[j];
    sums[j] = static_cast<float>(sum * factor * factor);
  }
  return sums;
}

Json transform_json(const Block& block, int site, const ScalingResult& found) {
  return {
      {"layer", block.index},
      {"site", block.sites[static_cast<std::size_t>(site)].name},
      {"rule", found.rule},
      {"error_ratio", found.error_ratio}};
}

}  // namespace

PartTimer::PartTimer(PartTime& part)
    : part_(part), seconds_(steady_seconds()), cpu_(process_usage().cpu_seconds) {}

PartTimer::~PartTimer() {
  part_.seconds += steady_seconds() - seconds_;
  part_.cpu_seconds += process_usage().cpu_seconds - cpu_;
}

bool needs_reference(const QuantPlan& plan, const MethodOptions& options) {
  return std::any_of(plan.linears.begin(), plan.linears.end(), [&](const PlannedLinear& linear) {
    return !linear.keep() &&
           (options.mismatch_target || find_method(linear.method)->needs_reference);
  });
}

BlockWork block_work(
    const Block& block,
    const ModelConfig& config,
    double tokens,
    double length,
    const QuantPlan& plan,
    const MethodOptions& options) {
  BlockWork work;
  // H is half a product, G a whole one, and its stream another forward pass.
  const bool two_streams = needs_reference(plan, options);
  const double gathers = two_streams ? 3 : 1;
  const double passes = two_streams ? 2 : 1;
  const double before = plan.transform.empty() ? 0 : std::min(tokens, kFactorTokens);
  for (int site = 0; site < static_cast<int>(block.sites.size()); ++site) {
    work.gather += gathers * site_gather_work(block, site, tokens);
    work.apply += site_apply_work(block, config, site, passes * tokens + before, length);
  }
  for (const Linear& linear : block.linears) {
    work.round += rounding_work(linear, options);
  }
  if (block.mixture) {
    const Linear& gate = block.linears[static_cast<std::size_t>(block.mixture->first_expert)];
    const auto n = static_cast<double>(gate.in_features);
    const auto m = static_cast<double>(gate.out_features);
    work.gather += gathers * tokens * block.mixture->experts_per_token * (n * n + m * m) / 2;
  }
  return work;
}

BlockQuantizer::BlockQuantizer(
    const Context& ctx,
    const ModelGraph& graph,
    const TensorStore& source,
    const QuantPlan& plan,
    const MethodOptions& options,
    std::filesystem::path spill_directory)
    : ctx_(ctx),
      graph_(graph),
      source_(source),
      plan_(plan),
      options_(options),
      transform_(find_transform(plan.transform)),
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
  const Method& method = *find_method(planned.method);
  try {
    if (problem.stats == nullptr && method.needs_statistics) {
      LinearResult result = find_method("rtn")->quantize(ctx_, problem, options_);
      result.report.fallback = "no token of the calibration reached it";
      return result;
    }
    return method.quantize(ctx_, problem, options_);
  } catch (const Error& error) {
    // The methods know rows and columns, not whose.
    const std::string where = planned.name + (error.where().empty() ? "" : ", " + error.where());
    throw Error(error.kind(), error.failed(), where, error.reason(), error.hint());
  }
}

void BlockQuantizer::add_range_facts(
    const LinearProblem& problem, bool compared, QuantizedLinear& row) const {
  const auto* packed = dynamic_cast<const PackedLinear*>(row.matrix.get());
  if (packed == nullptr) {
    return;
  }
  row.report.clip_threshold = clip_threshold(problem.W, *packed);
  // The inputs of down_proj have the outliers that make the way to find ranges matter.
  if (compared && row.plan->role == Role::kDown) {
    row.report.range_errors = compare_ranges(ctx_, problem, options_);
  }
}

void BlockQuantizer::load_site_input(
    const Stream& stream,
    int site,
    std::int64_t sequence,
    std::vector<float>& x,
    std::vector<float>& X) const {
  const std::int64_t rows = stream.x.rows(sequence);
  const ModelConfig& config = graph_.config;
  x.resize(static_cast<std::size_t>(rows * config.hidden_size));
  stream.x.read(sequence, x.data());
  if (site_reads_residual(site)) {
    X.resize(x.size());
    site_input(ctx_, config, stream.weights, site, x.data(), rows, X.data());
  } else {
    X.resize(static_cast<std::size_t>(rows * stream.carried->width()));
    stream.carried->read(sequence, X.data());
  }
}

SiteStats BlockQuantizer::gather(
    const Block& block,
    int site,
    const CalibrationState& state,
    const Stream& quantized,
    const Stream* reference,
    Progress& progress) {
  const PartTimer timer(times_.gather);
  const CalibrationSite& place = block.sites[static_cast<std::size_t>(site)];
  // The unquantized stream knows nothing of the factors that the producer's rows were divided by.
  const std::vector<float>& factors =
      factors_[static_cast<std::size_t>(place.linears.front())].columns;
  SiteAccumulator accumulator(place.width);
  for (std::int64_t i = 0; i < static_cast<std::int64_t>(state.order.size()); ++i) {
    stop_if_interrupted();
    const std::int64_t sequence = state.order[static_cast<std::size_t>(i)];
    const std::int64_t rows = state.x.rows(sequence);
    load_site_input(quantized, site, sequence, x_, X_);
    float* beside = nullptr;
    if (reference != nullptr) {
      load_site_input(*reference, site, sequence, x_, reference_X_);
      beside = reference_X_.data();
      for (std::int64_t r = 0; r < rows && !factors.empty(); ++r) {
        for (std::int64_t j = 0; j < place.width; ++j) {
          beside[r * place.width + j] /= factors[static_cast<std::size_t>(j)];
        }
      }
    }
    accumulator.add(ctx_, X_.data(), beside, rows, state.is_holdout(i));
    const double work =
        (reference != nullptr ? 3 : 1) * site_gather_work(block, site, static_cast<double>(rows));
    times_.gather.work += work;
    progress.add(work);
  }
  SiteStats stats = accumulator.finish(ctx_);
  if (stats.rows + stats.holdout_rows == 0 && stats.dropped_rows > 0) {
    throw ParseError(
        "the model computes values that are not finite",
        fmt::format("layer {}, {}", block.index, place.name),
        fmt::format("all {} calibration tokens give infinity or NaN there", stats.dropped_rows),
        "check the checkpoint with quern verify: it may be damaged");
  }
  return stats;
}

bool BlockQuantizer::all_quantized(const Block& block, const std::vector<int>& linears) const {
  return std::all_of(linears.begin(), linears.end(), [&](int index) {
    const PlannedLinear* planned =
        plan_.find(block.linears[static_cast<std::size_t>(index)].module);
    return planned != nullptr && !planned->keep();
  });
}

ScalingProblem BlockQuantizer::site_scaling_problem(
    const Block& block,
    int site,
    const SiteStats& stats,
    const std::vector<std::vector<float>>& W) const {
  const CalibrationSite& place = block.sites[static_cast<std::size_t>(site)];
  std::vector<ScalingConsumer> consumers;
  for (std::size_t i = 0; i < place.linears.size(); ++i) {
    const Linear& linear = block.linears[static_cast<std::size_t>(place.linears[i])];
    const PlannedLinear& planned = *plan_.find(linear.module);
    consumers.push_back(
        {W[i], linear.out_features, planned.scheme, planned.range, planned.activation});
  }
  return scaling_problem(block, site, stats, std::move(consumers));
}

std::vector<SiteStats> BlockQuantizer::gather_before_rounding(
    const Block& block,
    const BlockWeights& weights,
    const CalibrationState& state,
    Progress& progress) {
  std::vector<SiteAccumulator> accumulators;
  for (const CalibrationSite& site : block.sites) {
    accumulators.emplace_back(site.width);
  }
  double tokens = 0;
  for (const std::int64_t sequence : state.order) {
    if (tokens >= kFactorTokens) {
      break;
    }
    stop_if_interrupted();
    const std::int64_t rows = state.x.rows(sequence);
    x_.resize(static_cast<std::size_t>(rows * graph_.config.hidden_size));
    state.x.read(sequence, x_.data());
    LayerCache cache;
    std::vector<float> next;
    for (int site = 0; site < static_cast<int>(block.sites.size()); ++site) {
      if (site_reads_residual(site)) {
        X_.resize(x_.size());
        site_input(ctx_, graph_.config, weights, site, x_.data(), rows, X_.data());
      } else {
        std::swap(X_, next);
        accumulators[static_cast<std::size_t>(site)].add(ctx_, X_.data(), nullptr, rows, false);
      }
      if (site + 1 == static_cast<int>(block.sites.size())) {
        break;  // nothing reads what the last site makes
      }
      next.resize(
          static_cast<std::size_t>(rows * block.sites[static_cast<std::size_t>(site) + 1].width));
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
          next.data());
      progress.add(site_apply_work(
          block, graph_.config, site, static_cast<double>(rows), static_cast<double>(rows)));
    }
    tokens += static_cast<double>(rows);
  }
  std::vector<SiteStats> stats;
  for (SiteAccumulator& accumulator : accumulators) {
    stats.push_back(accumulator.finish(ctx_));
  }
  return stats;
}

void BlockQuantizer::fold_between_linears(
    const Block& block,
    BlockWeights& weights,
    const CalibrationState& state,
    QuantizedBlock& done,
    Progress& progress) {
  const std::vector<SiteStats> stats = [&] {
    const PartTimer timer(times_.apply);
    return gather_before_rounding(block, weights, state, progress);
  }();
  const PartTimer timer(times_.round);
  for (int site = 0; site < static_cast<int>(block.sites.size()); ++site) {
    const CalibrationSite& place = block.sites[static_cast<std::size_t>(site)];
    if (place.producer < 0 || !all_quantized(block, place.linears) ||
        !all_quantized(block, {place.producer}) ||
        unusable(&stats[static_cast<std::size_t>(site)], place.width)) {
      continue;
    }
    std::vector<std::vector<float>> W;
    for (const int index : place.linears) {
      W.push_back(to_float(weights.linears[static_cast<std::size_t>(index)].dense));
    }
    const ScalingResult found = transform_->find(
        ctx_,
        site_scaling_problem(block, site, stats[static_cast<std::size_t>(site)], W),
        options_);
    done.transforms.push_back(transform_json(block, site, found));
    if (found.factors.empty()) {
      continue;
    }
    for (const int index : place.linears) {
      factors_[static_cast<std::size_t>(index)].columns = found.factors;
    }
    const Linear& producer = block.linears[static_cast<std::size_t>(place.producer)];
    std::vector<float>& rows = factors_[static_cast<std::size_t>(place.producer)].rows;
    rows.assign(static_cast<std::size_t>(producer.out_features), 1.0F);
    for (std::size_t c = 0; c < found.factors.size(); ++c) {
      const std::size_t row =
          place.producer_rows.empty() ? c : static_cast<std::size_t>(place.producer_rows[c]);
      rows[row] = found.factors[c];
    }
    if (producer.has_bias) {
      std::vector<float>& bias = weights.linears[static_cast<std::size_t>(place.producer)].bias;
      for (std::size_t r = 0; r < bias.size(); ++r) {
        bias[r] /= rows[r];  // by a power of two: exact
      }
      done.tensors.push_back(replaced(source_, producer.module + ".bias", bias));
    }
  }
}

void BlockQuantizer::fold_into_norm(
    const Block& block, BlockWeights& weights, int site, SiteStats& stats, QuantizedBlock& done) {
  const CalibrationSite& place = block.sites[static_cast<std::size_t>(site)];
  if (place.producer != kNormProduces || !all_quantized(block, place.linears) ||
      unusable(&stats, place.width)) {
    return;
  }
  const PartTimer timer(times_.round);
  std::vector<std::vector<float>> W;
  for (const int index : place.linears) {
    W.push_back(scaled_weights(
        weights.linears[static_cast<std::size_t>(index)],
        factors_[static_cast<std::size_t>(index)].rows,
        {}));
  }
  ScalingResult found =
      transform_->find(ctx_, site_scaling_problem(block, site, stats, W), options_);
  done.transforms.push_back(transform_json(block, site, found));
  if (found.factors.empty()) {
    return;
  }
  // The gain is stored in 16 bits: round it, and take as factor what it was really divided by.
  std::vector<float>& gain = site_norm_gain(weights, site);
  const std::string& name = site_norm(block, site).tensor;
  std::vector<float> divided(gain.size());
  for (std::size_t j = 0; j < gain.size(); ++j) {
    divided[j] = gain[j] / found.factors[j];
  }
  const float centre = site_norm(block, site).zero_centred ? 1.0F : 0.0F;
  for (float& value : divided) {
    value -= centre;
  }
  ReplacedTensor tensor = replaced(source_, name, divided);
  divided = to_float({tensor.dtype, tensor.shape, tensor.bytes});
  for (float& value : divided) {
    value += centre;
  }
  for (std::size_t j = 0; j < gain.size(); ++j) {
    found.factors[j] = divided[j] != 0.0F ? gain[j] / divided[j] : 1.0F;
  }
  gain = std::move(divided);
  done.tensors.push_back(std::move(tensor));
  divide_by_factors(stats, found.factors);
  for (const int index : place.linears) {
    factors_[static_cast<std::size_t>(index)].columns = found.factors;
  }
}

void BlockQuantizer::quantize_linears(
    const Block& block,
    BlockWeights& weights,
    std::span<const int> linears,
    const SiteStats* stats,
    QuantizedBlock& done,
    Progress& progress) {
  std::optional<MismatchCorrection> correction;
  if (stats != nullptr && options_.mismatch_target) {
    const PartTimer timer(times_.round);
    correction = MismatchCorrection::make(ctx_, *stats, options_);
  }
  for (const int index : linears) {
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
    const LinearFactors& factors = factors_[static_cast<std::size_t>(index)];
    const std::vector<float> W = scaled_weights(target, factors.rows, factors.columns);
    LinearProblem problem;
    problem.W = W;
    problem.out_features = linear.out_features;
    problem.in_features = linear.in_features;
    problem.stats = stats;
    problem.scheme = planned->scheme;
    problem.range = planned->range;
    MismatchCorrection::Target goal;
    if (correction && !find_method(planned->method)->needs_reference) {
      goal = correction->target(ctx_, W, linear.out_features);
      problem.target = goal.W;
    }
    LinearResult result = round_linear(*planned, problem);
    QuantizedLinear row;
    row.plan = planned;
    row.matrix = std::move(result.matrix);
    row.report = std::move(result.report);
    if (!problem.target.empty()) {
      row.report.mismatch_strength = goal.strength;
    }
    add_range_facts(problem, !block.is_expert(index), row);
    if (stats != nullptr) {
      row.activation = with_static_scale(planned->activation, stats->abs_max);
    } else {
      row.activation = planned->activation;
    }
    row.seconds = steady_seconds() - started;
    target.quantized = row.matrix;
    target.activation = row.activation;
    done.linears.push_back(std::move(row));
  }
}

void BlockQuantizer::apply_to_all(
    const Block& block,
    int site,
    const CalibrationState& state,
    Stream& stream,
    Progress& progress) {
  const PartTimer timer(times_.apply);
  std::optional<ActivationStore> next;
  if (site + 1 < static_cast<int>(block.sites.size()) && !site_reads_residual(site + 1)) {
    std::vector<std::int64_t> rows;
    for (std::int64_t i = 0; i < stream.x.count(); ++i) {
      rows.push_back(stream.x.rows(i));
    }
    next.emplace(
        block.sites[static_cast<std::size_t>(site) + 1].width, std::move(rows), spill_directory_);
  }
  for (const std::int64_t sequence : state.order) {
    stop_if_interrupted();
    const std::int64_t rows = stream.x.rows(sequence);
    load_site_input(stream, site, sequence, x_, X_);
    carried_.resize(next ? static_cast<std::size_t>(rows * next->width()) : 0);
    LayerCache cache;
    apply_site(
        ctx_,
        workspace_,
        graph_.config,
        block,
        stream.weights,
        site,
        X_.data(),
        rows,
        cache,
        x_.data(),
        carried_.data());
    if (next) {
      next->write(sequence, carried_.data());
    } else {
      stream.x.write(sequence, x_.data());
    }
    const double work = site_apply_work(
        block, graph_.config, site, static_cast<double>(rows), static_cast<double>(rows));
    times_.apply.work += work;
    progress.add(work);
  }
  stream.carried = std::move(next);
}

void BlockQuantizer::record_inputs(
    const Block& block,
    std::span<const int> linears,
    const SiteStats& stats,
    QuantizedBlock& done) const {
  for (const int index : linears) {
    const auto i = static_cast<std::size_t>(index);
    done.inputs.push_back(
        {block.linears[i].module,
         input_squares(stats, factors_[i].columns),
         stats.rows + stats.holdout_rows});
  }
}

QuantizedBlock BlockQuantizer::quantize_sites(
    const Block& block,
    BlockWeights& weights,
    CalibrationState& state,
    Stream& quantized,
    Stream* reference,
    Progress& progress) {
  QuantizedBlock done;
  const auto set_stage = [&](const std::string& stage) {
    progress.set_stage(
        fmt::format("layer {}/{}  {}", block.index + 1, graph_.blocks.size(), stage));
  };
  if (transform_ != nullptr) {
    set_stage("channel factors");
    fold_between_linears(block, weights, state, done, progress);
  }
  for (int site = 0; site < static_cast<int>(block.sites.size()); ++site) {
    const CalibrationSite& place = block.sites[static_cast<std::size_t>(site)];
    set_stage(place.name);
    if (site == kMlpInput && block.mixture) {
      quantize_shared_expert(block, weights, state, quantized, reference, done, progress);
      break;
    }
    SiteStats stats = gather(block, site, state, quantized, reference, progress);
    record_inputs(block, place.linears, stats, done);
    if (transform_ != nullptr) {
      fold_into_norm(block, weights, site, stats, done);
    }
    quantize_linears(block, weights, place.linears, &stats, done, progress);
    apply_to_all(block, site, state, quantized, progress);
    if (reference != nullptr) {
      apply_to_all(block, site, state, *reference, progress);
    }
  }
  return done;
}

void BlockQuantizer::run(
    const Block& block,
    BlockWeights& weights,
    CalibrationState& state,
    const BlockParts& parts,
    Progress& progress) {
  const BlockWeights original = weights;  // views of the mapped file
  factors_.assign(block.linears.size(), {});
  Stream quantized{state.x, weights, std::nullopt};
  std::optional<Stream> reference;
  if (state.reference) {
    reference.emplace(Stream{*state.reference, original, std::nullopt});
  }
  Stream* beside = reference ? &*reference : nullptr;
  const std::string part = block_part(block);
  if (const std::optional<QuantizedBlock> saved = parts.load(part)) {
    install(block, *saved, weights);
    if (!block.mixture) {
      advance(block, original, weights, state, progress);
      return;
    }
    for (int site = 0; site < kMlpInput; ++site) {
      apply_to_all(block, site, state, quantized, progress);
      if (beside != nullptr) {
        apply_to_all(block, site, state, *beside, progress);
      }
    }
  } else {
    parts.save(part, quantize_sites(block, weights, state, quantized, beside, progress));
  }
  if (block.mixture) {
    run_experts(block, weights, state, quantized, beside, parts, progress);
    if (beside != nullptr) {
      apply_to_all(block, kMlpInput, state, *beside, progress);
    }
  }
}

void BlockQuantizer::advance(
    const Block& block,
    const BlockWeights& original,
    const BlockWeights& weights,
    CalibrationState& state,
    Progress& progress) {
  progress.set_stage(fmt::format(
      "layer {}/{}  done before, running through it", block.index + 1, graph_.blocks.size()));
  const auto pass = [&](ActivationStore& store, const BlockWeights& with) {
    LayerCache cache;
    for (const std::int64_t sequence : state.order) {
      stop_if_interrupted();
      const std::int64_t rows = store.rows(sequence);
      x_.resize(static_cast<std::size_t>(rows * graph_.config.hidden_size));
      store.read(sequence, x_.data());
      cache.clear();
      block_forward(ctx_, workspace_, graph_.config, block, with, rows, cache, x_.data());
      store.write(sequence, x_.data());
      for (int site = 0; site < static_cast<int>(block.sites.size()); ++site) {
        progress.add(site_apply_work(
            block, graph_.config, site, static_cast<double>(rows), static_cast<double>(rows)));
      }
    }
  };
  pass(state.x, weights);
  if (state.reference) {
    pass(*state.reference, original);
  }
}

void BlockQuantizer::run_data_free(
    const Block& block,
    BlockWeights& weights,
    const Imatrix* imatrix,
    const BlockParts& parts,
    Progress& progress) {
  progress.set_stage(fmt::format("layer {}/{}", block.index + 1, graph_.blocks.size()));
  factors_.assign(block.linears.size(), {});
  const auto round_range = [&](const std::string& part, int first, int last, auto&& skip) {
    if (parts.load(part)) {
      return;
    }
    QuantizedBlock done;
    for (int index = first; index < last; ++index) {
      if (skip(index)) {
        continue;
      }
      const std::array linear = {index};
      const std::optional<SiteStats> stats =
          imatrix != nullptr
              ? diagonal_stats(*imatrix, block.linears[static_cast<std::size_t>(index)])
              : std::nullopt;
      quantize_linears(block, weights, linear, stats ? &*stats : nullptr, done, progress);
      weights.linears[static_cast<std::size_t>(index)].quantized.reset();
      source_.release(weights.linears[static_cast<std::size_t>(index)].dense);
    }
    parts.save(part, done);
  };
  round_range(block_part(block), 0, static_cast<int>(block.linears.size()), [&](int index) {
    return block.is_expert(index);
  });
  if (block.mixture) {
    for (const ExpertRange& experts : expert_parts(*block.mixture)) {
      round_range(
          expert_part(block, experts),
          block.mixture->expert(experts.first),
          block.mixture->expert(experts.last),
          [](int) { return false; });
    }
  }
}

void install(const Block& block, const QuantizedBlock& quantized, BlockWeights& weights) {
  for (const QuantizedLinear& linear : quantized.linears) {
    for (std::size_t k = 0; k < block.linears.size(); ++k) {
      if (block.linears[k].module == linear.plan->name) {
        weights.linears[k].quantized = linear.matrix;
        weights.linears[k].activation = linear.activation;
      }
    }
  }
  for (const ReplacedTensor& tensor : quantized.tensors) {
    const std::vector<float> values = to_float({tensor.dtype, tensor.shape, tensor.bytes});
    for (int site = 0; site < static_cast<int>(block.sites.size()); ++site) {
      if (site_reads_residual(site) && site_norm(block, site).tensor == tensor.name) {
        std::vector<float>& gain = site_norm_gain(weights, site);
        gain = values;
        for (float& value : gain) {
          value += site_norm(block, site).zero_centred ? 1.0F : 0.0F;
        }
      }
    }
    for (std::size_t k = 0; k < block.linears.size(); ++k) {
      if (block.linears[k].module + ".bias" == tensor.name) {
        weights.linears[k].bias = values;
      }
    }
  }
}

}  // namespace quern
