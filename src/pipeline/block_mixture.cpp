// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "calib/statistics.h"
#include "kernels/kernels.h"
#include "nn/moe.h"
#include "pipeline/block_quantizer.h"

#include <algorithm>
#include <array>
#include <memory>
#include <utility>

// BlockQuantizer on mixtures of experts. Each expert is rounded on the tokens that the router sends
// to it: gate and up on the second moments of those, down on what its rounded gate and up make of
// them. Experts are done some at a time, as many as the memory holds; each group costs two passes
// over the inputs of the site.
namespace quern {
namespace {

// An expert that fewer tokens reach borrows the second moments of all tokens.
constexpr double kRareShare = 0.005;
// What the borrowed moments count for, in rows for each input channel.
constexpr double kPooledRows = 0.5;
constexpr std::uint64_t kGroupMemory = std::uint64_t{2} << 30U;  // without a --memory

// Own moments joined by those of all tokens, as if kPooledRows * width of them had come along.
SiteStats pooled(SiteStats own, const SiteStats& all) {
  const double borrowed = kPooledRows * static_cast<double>(own.width);
  const double rows = static_cast<double>(own.rows);
  const auto join = [&](std::vector<double>& to, const std::vector<double>& from) {
    if (from.empty()) {
      return;
    }
    to.resize(from.size());
    for (std::size_t i = 0; i < to.size(); ++i) {
      to[i] = (rows * to[i] + borrowed * from[i]) / (rows + borrowed);
    }
  };
  join(own.H, all.H);
  join(own.G, all.G);
  if (own.H_holdout.empty()) {
    own.H_holdout = all.H_holdout;
    own.G_holdout = all.G_holdout;
    own.holdout_rows = all.holdout_rows;
  }
  if (own.abs_max.empty() || own.rows == 0) {
    own.abs_max = all.abs_max;
  }
  if (own.sample.empty()) {
    own.sample = all.sample;
  }
  own.rows = std::max<std::int64_t>(own.rows, 1);
  return own;
}

// silu(gate(X)) * up(X) of the expert whose gate_proj is linear `first`.
std::vector<float> hidden_of(
    const Context& ctx,
    Workspace& workspace,
    const BlockWeights& weights,
    int first,
    const float* X,
    std::int64_t rows) {
  const LinearWeights& gate = weights.linears[static_cast<std::size_t>(first)];
  const LinearWeights& up = weights.linears[static_cast<std::size_t>(first) + 1];
  std::vector<float> a(static_cast<std::size_t>(rows * gate.out_features));
  std::vector<float> b(a.size());
  linear_forward(ctx, workspace, gate, X, rows, a.data());
  linear_forward(ctx, workspace, up, X, rows, b.data());
  ctx.kernels.swiglu(a.data(), b.data(), a.data(), static_cast<std::int64_t>(a.size()));
  return a;
}

}  // namespace

void BlockQuantizer::for_routed_rows(
    const Block& block,
    const CalibrationState& state,
    const Stream& quantized,
    const Stream* reference,
    int first,
    int last,
    const RoutedVisitor& visit) {
  const Mixture& mixture = *block.mixture;
  const std::int64_t hidden = graph_.config.hidden_size;
  const auto width = static_cast<std::size_t>(hidden);
  std::vector<float> scores;
  std::vector<float> gathered;
  std::vector<float> gathered_reference;
  const auto gather_rows = [&](const std::vector<float>& from,
                               std::span<const std::int64_t> rows,
                               std::vector<float>& to) {
    to.resize(rows.size() * width);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      std::copy_n(from.data() + rows[i] * hidden, hidden, to.data() + i * width);
    }
  };
  for (std::int64_t i = 0; i < static_cast<std::int64_t>(state.order.size()); ++i) {
    stop_if_interrupted();
    const std::int64_t sequence = state.order[static_cast<std::size_t>(i)];
    const std::int64_t rows = state.x.rows(sequence);
    load_site_input(quantized, kMlpInput, sequence, x_, X_);
    if (reference != nullptr) {
      load_site_input(*reference, kMlpInput, sequence, x_, reference_X_);
    }
    scores.resize(static_cast<std::size_t>(rows * mixture.experts));
    linear_forward(
        ctx_,
        workspace_,
        quantized.weights.linears[static_cast<std::size_t>(mixture.router)],
        X_.data(),
        rows,
        scores.data());
    const Routing routing = route(mixture, scores.data(), rows);
    for (int expert = first; expert < last; ++expert) {
      const auto begin = static_cast<std::size_t>(routing.begin[static_cast<std::size_t>(expert)]);
      const auto end =
          static_cast<std::size_t>(routing.begin[static_cast<std::size_t>(expert) + 1]);
      if (begin == end) {
        continue;
      }
      const std::span<const std::int64_t> taken(routing.rows.data() + begin, end - begin);
      gather_rows(X_, taken, gathered);
      if (reference != nullptr) {
        gather_rows(reference_X_, taken, gathered_reference);
      }
      visit(
          expert,
          static_cast<std::int64_t>(taken.size()),
          gathered.data(),
          reference != nullptr ? gathered_reference.data() : nullptr,
          state.is_holdout(i));
    }
  }
}

void BlockQuantizer::quantize_mixture(
    const Block& block,
    BlockWeights& weights,
    const CalibrationState& state,
    const Stream& quantized,
    const Stream* reference,
    QuantizedBlock& done,
    Progress& progress) {
  const Mixture& mixture = *block.mixture;
  const std::int64_t hidden = graph_.config.hidden_size;
  // What all tokens look like: the shared expert's input, and what rare experts borrow.
  const SiteStats all = gather(block, kMlpInput, state, quantized, reference, progress);
  const double tokens = static_cast<double>(all.rows);
  if (mixture.shared_expert >= 0) {
    const int first = mixture.shared_expert;
    const std::array inputs = {first, first + 1};
    record_inputs(block, inputs, all, done);
    quantize_linears(block, weights, inputs, &all, done, progress);
    SiteAccumulator accumulator(weights.linears[static_cast<std::size_t>(first) + 2].in_features);
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(state.order.size()); ++i) {
      const std::int64_t sequence = state.order[static_cast<std::size_t>(i)];
      const std::int64_t rows = state.x.rows(sequence);
      load_site_input(quantized, kMlpInput, sequence, x_, X_);
      std::vector<float> made = hidden_of(ctx_, workspace_, weights, first, X_.data(), rows);
      std::vector<float> exact;
      if (reference != nullptr) {
        load_site_input(*reference, kMlpInput, sequence, x_, reference_X_);
        exact = hidden_of(ctx_, workspace_, reference->weights, first, reference_X_.data(), rows);
      }
      accumulator.add(
          ctx_,
          made.data(),
          reference != nullptr ? exact.data() : nullptr,
          rows,
          state.is_holdout(i));
    }
    const SiteStats stats = accumulator.finish(ctx_);
    const std::array output = {first + 2};
    record_inputs(block, output, stats, done);
    quantize_linears(block, weights, output, &stats, done, progress);
  }

  const std::int64_t width =
      weights.linears[static_cast<std::size_t>(mixture.first_expert)].out_features;
  const std::uint64_t each =
      SiteAccumulator::memory(std::max(hidden, width), true, reference != nullptr);
  const std::uint64_t budget = ctx_.memory_budget != 0 ? ctx_.memory_budget / 4 : kGroupMemory;
  const int group = static_cast<int>(
      std::clamp<std::uint64_t>(budget / each, 1, static_cast<std::uint64_t>(mixture.experts)));
  for (int first = 0; first < mixture.experts; first += group) {
    const int last = std::min(first + group, mixture.experts);
    // One accumulator an expert of the group, filled by a pass over the inputs of the site.
    using Rows = std::function<void(SiteAccumulator&, int, std::int64_t, float*, float*, bool)>;
    const auto gather_group = [&](std::int64_t site_width, const Rows& add) {
      std::vector<SiteAccumulator> accumulators(
          static_cast<std::size_t>(last - first), SiteAccumulator(site_width));
      for_routed_rows(
          block,
          state,
          quantized,
          reference,
          first,
          last,
          [&](int expert, std::int64_t rows, float* X, float* beside, bool held) {
            add(accumulators[static_cast<std::size_t>(expert - first)],
                expert,
                rows,
                X,
                beside,
                held);
          });
      std::vector<SiteStats> stats;
      for (SiteAccumulator& accumulator : accumulators) {
        stats.push_back(accumulator.finish(ctx_));
      }
      return stats;
    };
    const std::vector<SiteStats> inputs = gather_group(
        hidden,
        [&](SiteAccumulator& to, int, std::int64_t rows, float* X, float* beside, bool held) {
          to.add(ctx_, X, beside, rows, held);
        });
    for (int expert = first; expert < last; ++expert) {
      const SiteStats& own = inputs[static_cast<std::size_t>(expert - first)];
      const std::array linears = {mixture.expert(expert), mixture.expert(expert) + 1};
      record_inputs(block, linears, own, done);
      if (static_cast<double>(own.rows) < kRareShare * tokens) {
        const SiteStats joined = pooled(own, all);
        quantize_linears(block, weights, linears, &joined, done, progress);
      } else {
        quantize_linears(block, weights, linears, &own, done, progress);
      }
    }
    const std::vector<SiteStats> made = gather_group(
        width,
        [&](SiteAccumulator& to,
            int expert,
            std::int64_t rows,
            const float* X,
            const float* beside,
            bool held) {
          const int gate = mixture.expert(expert);
          std::vector<float> found = hidden_of(ctx_, workspace_, weights, gate, X, rows);
          std::vector<float> exact;
          if (beside != nullptr) {
            exact = hidden_of(ctx_, workspace_, reference->weights, gate, beside, rows);
          }
          to.add(ctx_, found.data(), beside != nullptr ? exact.data() : nullptr, rows, held);
        });
    for (int expert = first; expert < last; ++expert) {
      const SiteStats& own = made[static_cast<std::size_t>(expert - first)];
      const std::array linears = {mixture.expert(expert) + 2};
      record_inputs(block, linears, own, done);
      // Nobody's outputs resemble those of this expert: what no token reached is rounded plainly.
      quantize_linears(block, weights, linears, own.rows > 0 ? &own : nullptr, done, progress);
    }
  }
}

}  // namespace quern
