// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "calib/statistics.h"
#include "kernels/kernels.h"
#include "nn/moe.h"
#include "pipeline/block_quantizer.h"
#include "pipeline/parts.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <utility>

// BlockQuantizer on mixtures of experts. The rows that enter the mixture are kept, with the experts
// that each goes to. Then one expert after the other: gate and up are rounded on the rows sent to
// it, down on what the rounded gate and up make of them, and its rounded output goes into the
// residual; after that nobody needs the expert any more. No more is in memory than the rows of some
// experts and the statistics of one, however many experts there are.
namespace quern {

// A row that enters the mixture: of the sequence at `position` of the walk, for an expert that
// counts it with `weight`.
struct RoutedRow {
  std::int32_t position = 0;
  std::int32_t row = 0;
  float weight = 0;
};

struct ExpertRows {
  std::vector<RoutedRow> own;  // sent to it, in the order of the walk: held-out ones last
  std::int64_t held_out = 0;  // of those
  bool is_rare = false;
  std::vector<RoutedRow> borrowed;  // sent elsewhere, for the statistics of a rare expert

  [[nodiscard]] std::int64_t training() const noexcept {
    return static_cast<std::int64_t>(own.size()) - held_out;
  }
};

struct MixtureRows {
  ActivationStore inputs;  // X of every sequence
  std::vector<ExpertRows> experts;
};

// The rows of one expert: its own, then the borrowed ones. Empty without a reference.
struct GatheredRows {
  std::vector<float> X;
  std::vector<float> reference;
};

namespace {

// An expert is rare that gets less than this share of the rows (GPTQModel's threshold), or fewer
// rows than a second moment can be told from.
constexpr double kRareShare = 0.005;
constexpr double kRareRows = 128;
// How many rows a rare expert borrows, and what one counts for beside one of its own.
constexpr std::size_t kBorrowedRows = 512;
constexpr float kBorrowedWeight = 0.25F;
// What is not known of a rare expert's inputs is taken to be alike in all channels: n / T times
// this of the mean of the diagonal is added to it. Without, 2 bits from 128 tokens lose more than
// plain rounding does (tiny-qwen3-moe: KL .352, .327 with it, .330 by plain rounding).
constexpr double kPrior = 0.5;
constexpr std::uint64_t kRowMemory = std::uint64_t{1} << 30U;  // without a --memory

std::uint64_t row_bytes(const ExpertRows& rows, std::int64_t width) {
  return (rows.own.size() + rows.borrowed.size()) * static_cast<std::uint64_t>(width) *
         sizeof(float);
}

// Makes the second moments of a rare expert those of rows of unequal weight, and adds the prior.
void add_prior(const ExpertRows& rows, SiteStats& stats) {
  if (stats.rows == 0) {
    return;
  }
  constexpr double kWeight = kBorrowedWeight;
  const auto own = static_cast<double>(rows.training());
  const auto borrowed = static_cast<double>(rows.borrowed.size());
  const double sum = own + kWeight * borrowed;
  const double effective = sum * sum / (own + kWeight * kWeight * borrowed);
  stats.rows = std::max<std::int64_t>(1, std::llround(effective));
  const auto width = static_cast<std::size_t>(stats.width);
  double trace = 0;
  for (std::size_t j = 0; j < width; ++j) {
    trace += stats.H[j * (width + 1)];
  }
  for (std::size_t j = 0; j < width; ++j) {
    stats.H[j * (width + 1)] += kPrior * trace / effective;  // trace: n times the mean
  }
}

// Second moments of values [own + borrowed, width] of an expert's rows.
SiteStats expert_stats(
    const Context& ctx,
    const ExpertRows& rows,
    std::int64_t width,
    std::vector<float>& values,
    std::vector<float>& reference) {
  SiteAccumulator accumulator(width);
  const auto add = [&](std::int64_t first, std::int64_t count, bool held_out) {
    if (count > 0) {
      float* beside = reference.empty() ? nullptr : reference.data() + first * width;
      accumulator.add(ctx, values.data() + first * width, beside, count, held_out);
    }
  };
  const auto own = static_cast<std::int64_t>(rows.own.size());
  const auto borrowed = static_cast<std::int64_t>(rows.borrowed.size());
  for (std::vector<float>* each : {&values, &reference}) {
    for (std::size_t i = static_cast<std::size_t>(own * width); i < each->size(); ++i) {
      (*each)[i] *= std::sqrt(kBorrowedWeight);
    }
  }
  add(0, rows.training(), false);
  add(own, borrowed, false);
  add(rows.training(), rows.held_out, true);
  SiteStats stats = accumulator.finish(ctx);
  if (rows.is_rare) {
    add_prior(rows, stats);
  }
  return stats;
}

}  // namespace

MixtureRows BlockQuantizer::route_all(
    const Block& block, const CalibrationState& state, const Stream& quantized) {
  const PartTimer timer(times_.apply);
  const Mixture& mixture = *block.mixture;
  const auto experts = static_cast<std::size_t>(mixture.experts);
  std::vector<std::int64_t> lengths;
  for (std::int64_t i = 0; i < quantized.x.count(); ++i) {
    lengths.push_back(quantized.x.rows(i));
  }
  MixtureRows all{
      ActivationStore(graph_.config.hidden_size, std::move(lengths), spill_directory_),
      std::vector<ExpertRows>(experts)};
  std::vector<float> probabilities;  // [training rows, experts]
  std::vector<RoutedRow> training;
  for (std::int64_t i = 0; i < static_cast<std::int64_t>(state.order.size()); ++i) {
    stop_if_interrupted();
    const std::int64_t sequence = state.order[static_cast<std::size_t>(i)];
    const std::int64_t rows = state.x.rows(sequence);
    load_site_input(quantized, kMlpInput, sequence, x_, X_);
    all.inputs.write(sequence, X_.data());
    const bool held_out = state.is_holdout(i);
    const std::size_t known = probabilities.size();
    probabilities.resize(known + static_cast<std::size_t>(rows) * experts);
    const Routing routing = route_rows(
        ctx_,
        workspace_,
        mixture,
        quantized.weights,
        X_.data(),
        rows,
        probabilities.data() + known);
    if (held_out) {
      probabilities.resize(known);
    }
    for (std::int32_t row = 0; row < rows && !held_out; ++row) {
      training.push_back({static_cast<std::int32_t>(i), row, 0});
    }
    for (std::size_t e = 0; e < experts; ++e) {
      const auto begin = static_cast<std::size_t>(routing.begin[e]);
      const auto end = static_cast<std::size_t>(routing.begin[e + 1]);
      for (std::size_t k = begin; k < end; ++k) {
        const auto row = static_cast<std::int32_t>(routing.rows[k]);
        all.experts[e].own.push_back({static_cast<std::int32_t>(i), row, routing.weights[k]});
        if (!held_out) {
          probabilities[known + static_cast<std::size_t>(row) * experts + e] = -1;  // not to borrow
        }
      }
      all.experts[e].held_out += held_out ? static_cast<std::int64_t>(end - begin) : 0;
    }
  }
  const double few = std::max(kRareShare * static_cast<double>(training.size()), kRareRows);
  for (ExpertRows& rows : all.experts) {
    rows.is_rare = static_cast<double>(rows.training()) < few;
  }
  if (options_.rare_experts == RareExperts::kRtn) {
    return all;
  }
  // The rows that came closest to being sent to a rare expert resemble its own.
  std::vector<std::size_t> order(training.size());
  for (std::size_t e = 0; e < experts; ++e) {
    ExpertRows& rows = all.experts[e];
    if (!rows.is_rare) {
      continue;
    }
    const auto nearer = [&](std::size_t a, std::size_t b) {
      const float p = probabilities[a * experts + e];
      const float q = probabilities[b * experts + e];
      return p != q ? p > q : a < b;
    };
    std::iota(order.begin(), order.end(), std::size_t{0});
    const std::size_t others = training.size() - static_cast<std::size_t>(rows.training());
    const std::size_t taken = std::min(others, kBorrowedRows);
    std::partial_sort(
        order.begin(), order.begin() + static_cast<std::ptrdiff_t>(taken), order.end(), nearer);
    std::sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(taken));
    for (std::size_t k = 0; k < taken; ++k) {
      rows.borrowed.push_back(training[order[k]]);
    }
  }
  return all;
}

void BlockQuantizer::quantize_shared_expert(
    const Block& block,
    BlockWeights& weights,
    const CalibrationState& state,
    const Stream& quantized,
    const Stream* reference,
    QuantizedBlock& done,
    Progress& progress) {
  const int first = block.mixture->shared_expert;
  if (first < 0) {
    return;
  }
  const std::array inputs = {first, first + 1};
  const std::array output = {first + 2};
  const SiteStats stats = gather(block, kMlpInput, state, quantized, reference, progress);
  record_inputs(block, inputs, stats, done);
  quantize_linears(block, weights, inputs, &stats, done, progress);
  const std::int64_t width = block.linears[static_cast<std::size_t>(first) + 2].in_features;
  SiteAccumulator accumulator(width);
  for (std::int64_t i = 0; i < static_cast<std::int64_t>(state.order.size()); ++i) {
    stop_if_interrupted();
    const std::int64_t sequence = state.order[static_cast<std::size_t>(i)];
    const std::int64_t rows = state.x.rows(sequence);
    load_site_input(quantized, kMlpInput, sequence, x_, X_);
    std::vector<float> made = hidden_of(weights, first, X_.data(), rows);
    std::vector<float> exact;
    if (reference != nullptr) {
      load_site_input(*reference, kMlpInput, sequence, x_, reference_X_);
      exact = hidden_of(reference->weights, first, reference_X_.data(), rows);
    }
    accumulator.add(
        ctx_, made.data(), exact.empty() ? nullptr : exact.data(), rows, state.is_holdout(i));
  }
  const SiteStats hidden = accumulator.finish(ctx_);
  record_inputs(block, output, hidden, done);
  quantize_linears(block, weights, output, &hidden, done, progress);
}

// silu(gate(X)) * up(X) [rows, width] of the expert whose gate_proj is linear `first`.
std::vector<float> BlockQuantizer::hidden_of(
    const BlockWeights& weights, int first, const float* X, std::int64_t rows) {
  const std::int64_t width = weights.linears[static_cast<std::size_t>(first)].out_features;
  std::vector<float> hidden(static_cast<std::size_t>(rows * width));
  std::vector<float> up(hidden.size());
  mlp_hidden(ctx_, workspace_, weights, first, X, rows, hidden.data(), up.data(), hidden.data());
  return hidden;
}

std::vector<GatheredRows> BlockQuantizer::gather_rows(
    const MixtureRows& all,
    const ExpertRange& experts,
    bool with_borrowed,
    const CalibrationState& state,
    const Stream* reference) {
  const auto hidden = static_cast<std::size_t>(graph_.config.hidden_size);
  std::vector<GatheredRows> gathered(static_cast<std::size_t>(experts.last - experts.first));
  // The rows wanted of each sequence: where they go.
  struct Wanted {
    std::int32_t row;
    std::size_t expert;
    std::size_t place;
  };
  std::vector<std::vector<Wanted>> wanted(state.order.size());
  for (std::size_t k = 0; k < gathered.size(); ++k) {
    const ExpertRows& rows = all.experts[static_cast<std::size_t>(experts.first) + k];
    std::size_t place = 0;
    for (const RoutedRow& row : rows.own) {
      wanted[static_cast<std::size_t>(row.position)].push_back({row.row, k, place++});
    }
    for (std::size_t i = 0; with_borrowed && i < rows.borrowed.size(); ++i) {
      const RoutedRow& row = rows.borrowed[i];
      wanted[static_cast<std::size_t>(row.position)].push_back({row.row, k, place++});
    }
    gathered[k].X.resize(place * hidden);
    gathered[k].reference.resize(reference != nullptr ? place * hidden : 0);
  }
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    if (wanted[i].empty()) {
      continue;
    }
    stop_if_interrupted();
    const std::int64_t sequence = state.order[i];
    X_.resize(static_cast<std::size_t>(state.x.rows(sequence)) * hidden);
    all.inputs.read(sequence, X_.data());
    if (reference != nullptr) {
      load_site_input(*reference, kMlpInput, sequence, x_, reference_X_);
    }
    for (const Wanted& each : wanted[i]) {
      const std::size_t from = static_cast<std::size_t>(each.row) * hidden;
      GatheredRows& to = gathered[each.expert];
      std::copy_n(X_.data() + from, hidden, to.X.data() + each.place * hidden);
      if (reference != nullptr) {
        std::copy_n(reference_X_.data() + from, hidden, to.reference.data() + each.place * hidden);
      }
    }
  }
  return gathered;
}

void BlockQuantizer::quantize_expert(
    const Block& block,
    BlockWeights& weights,
    int expert,
    const ExpertRows& rows,
    const GatheredRows& gathered,
    const BlockWeights* reference,
    QuantizedBlock& done,
    Progress& progress) {
  const int gate = block.mixture->expert(expert);
  const std::array inputs = {gate, gate + 1};
  const std::array output = {gate + 2};
  const bool plain = options_.rare_experts == RareExperts::kRtn && rows.is_rare;
  const auto quantize_on = [&](std::span<const int> linears, const SiteStats& stats) {
    const std::size_t before = done.linears.size();
    quantize_linears(
        block, weights, linears, plain || stats.rows == 0 ? nullptr : &stats, done, progress);
    for (std::size_t i = before; i < done.linears.size(); ++i) {
      LinearReport& report = done.linears[i].report;
      report.tokens = rows.training();
      report.borrowed_tokens = static_cast<std::int64_t>(rows.borrowed.size());
      if (report.fallback) {
        report.fallback = fmt::format("{} tokens of the calibration reach it", report.tokens);
      }
    }
  };
  const auto count = static_cast<std::int64_t>(rows.own.size() + rows.borrowed.size());
  const auto stats_of = [&](std::int64_t width, std::vector<float>& X, std::vector<float>& exact) {
    const PartTimer timer(times_.gather);
    SiteStats stats = expert_stats(ctx_, rows, width, X, exact);
    const double work = static_cast<double>(count * width) * static_cast<double>(width) / 2;
    times_.gather.work += work;
    progress.add(work);
    return stats;
  };
  // Statistics overwrite the borrowed rows with scaled ones, so the hidden values come first.
  std::vector<float> exact;
  if (reference != nullptr) {
    exact = hidden_of(*reference, gate, gathered.reference.data(), count);
  }
  SiteStats stats = [&] {
    std::vector<float> X = gathered.X;
    std::vector<float> beside = gathered.reference;
    return stats_of(graph_.config.hidden_size, X, beside);
  }();
  record_inputs(block, inputs, stats, done);
  quantize_on(inputs, stats);
  std::vector<float> hidden = hidden_of(weights, gate, gathered.X.data(), count);
  stats = stats_of(block.linears[static_cast<std::size_t>(gate)].out_features, hidden, exact);
  record_inputs(block, output, stats, done);
  quantize_on(output, stats);
}

void BlockQuantizer::add_experts(
    const Block& block,
    const BlockWeights& weights,
    const MixtureRows& all,
    const ExpertRange& experts,
    std::vector<GatheredRows> gathered,
    const CalibrationState& state,
    Stream& stream) {
  const PartTimer timer(times_.apply);
  const std::int64_t hidden = graph_.config.hidden_size;
  for (std::size_t k = 0; k < gathered.size(); ++k) {
    const int expert = experts.first + static_cast<int>(k);
    const auto rows =
        static_cast<std::int64_t>(all.experts[static_cast<std::size_t>(expert)].own.size());
    gathered[k].X = expert_output(
        ctx_, workspace_, weights, block.mixture->expert(expert), gathered[k].X.data(), rows);
  }
  // In the order of mixture_forward: row by row, experts rising.
  std::vector<std::size_t> next(gathered.size(), 0);
  for (std::size_t i = 0; i < state.order.size(); ++i) {
    const auto is_here = [&](std::size_t k) {
      const auto& own = all.experts[static_cast<std::size_t>(experts.first) + k].own;
      return next[k] < own.size() && own[next[k]].position == static_cast<std::int32_t>(i);
    };
    bool touched = false;
    for (std::size_t k = 0; k < gathered.size(); ++k) {
      touched = touched || is_here(k);
    }
    if (!touched) {
      continue;
    }
    const std::int64_t sequence = state.order[i];
    x_.resize(static_cast<std::size_t>(stream.x.rows(sequence) * hidden));
    stream.x.read(sequence, x_.data());
    for (std::size_t k = 0; k < gathered.size(); ++k) {
      for (; is_here(k); ++next[k]) {
        const RoutedRow& row =
            all.experts[static_cast<std::size_t>(experts.first) + k].own[next[k]];
        ctx_.kernels.axpy_f32(
            row.weight,
            gathered[k].X.data() + static_cast<std::int64_t>(next[k]) * hidden,
            x_.data() + row.row * hidden,
            hidden);
      }
    }
    stream.x.write(sequence, x_.data());
  }
}

void BlockQuantizer::run_experts(
    const Block& block,
    BlockWeights& weights,
    const CalibrationState& state,
    Stream& quantized,
    const Stream* reference,
    const BlockParts& parts,
    Progress& progress) {
  const Mixture& mixture = *block.mixture;
  const std::int64_t hidden = graph_.config.hidden_size;
  const MixtureRows all = route_all(block, state, quantized);
  const std::uint64_t memory = ctx_.memory_budget != 0 ? ctx_.memory_budget / 8 : kRowMemory;
  for (const ExpertRange& part : expert_parts(mixture)) {
    progress.set_stage(fmt::format(
        "layer {}/{}  experts {}/{}",
        block.index + 1,
        graph_.blocks.size(),
        part.last,
        mixture.experts));
    const std::string name = expert_part(block, part);
    const std::optional<QuantizedBlock> saved = parts.load(name);
    if (saved) {
      install(block, *saved, weights);
    }
    QuantizedBlock done;
    for (int first = part.first; first < part.last;) {
      // As many experts at a time as the memory holds rows of: their inputs, twice while they are
      // counted, with a reference three times.
      ExpertRange batch{first, first};
      std::uint64_t bytes = 0;
      do {
        bytes += row_bytes(all.experts[static_cast<std::size_t>(batch.last)], hidden) *
                 (reference != nullptr ? 2 : 1);
        ++batch.last;
      } while (batch.last < part.last && bytes < memory);
      std::vector<GatheredRows> rows =
          gather_rows(all, batch, !saved, state, saved ? nullptr : reference);
      for (int expert = batch.first; expert < batch.last && !saved; ++expert) {
        quantize_expert(
            block,
            weights,
            expert,
            all.experts[static_cast<std::size_t>(expert)],
            rows[static_cast<std::size_t>(expert - batch.first)],
            reference != nullptr ? &reference->weights : nullptr,
            done,
            progress);
      }
      add_experts(block, weights, all, batch, std::move(rows), state, quantized);
      first = batch.last;
    }
    if (!saved) {
      parts.save(name, done);
    }
    // The rounded matrices are on disk and have done their work.
    for (int index = mixture.expert(part.first); index < mixture.expert(part.last); ++index) {
      LinearWeights& linear = weights.linears[static_cast<std::size_t>(index)];
      linear.quantized.reset();
      if (reference == nullptr && linear.dense.count() > 0) {
        source_.release(linear.dense);
      }
    }
  }
  for (const std::int64_t sequence : state.order) {
    stop_if_interrupted();
    const std::int64_t rows = state.x.rows(sequence);
    x_.resize(static_cast<std::size_t>(rows * hidden));
    X_.resize(x_.size());
    quantized.x.read(sequence, x_.data());
    all.inputs.read(sequence, X_.data());
    add_shared_expert(ctx_, workspace_, mixture, weights, X_.data(), rows, x_.data());
    quantized.x.write(sequence, x_.data());
  }
}

}  // namespace quern
