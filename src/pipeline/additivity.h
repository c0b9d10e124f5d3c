// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/context.h"
#include "base/json.h"
#include "model/graph.h"
#include "nn/weights.h"
#include "tensor/checkpoint.h"

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

namespace quern {

// A plan adds up what its linears lose, each judged alone. Whether that is allowed is measured on
// allocations near the one that was chosen (methods.md 11.1: expect r > 0.95).
struct AdditivityCheck {
  std::vector<double> predicted;  // sums of losses; the chosen allocation first
  std::vector<double> measured;  // mean KL, nats per token

  // Pearson's r; 0 when either does not vary.
  [[nodiscard]] double correlation() const;
  // Of the line through the origin, by least squares: measured = slope x predicted.
  [[nodiscard]] double slope() const;
};
[[nodiscard]] Json additivity_json(const AdditivityCheck& check);

// The weights of a block in one variant of the model.
using VariantWeights =
    std::function<BlockWeights(const Block& block, const BlockWeights& original, int variant)>;

// Mean KL divergence of each variant from the model of `checkpoint` over all positions of
// `sequences`, block after block: one block in one variant is in memory at a time, besides the rows
// of all variants. Throws InterruptedError when ctx says so.
[[nodiscard]] std::vector<double> measure_variants(
    const Context& ctx,
    const ModelGraph& graph,
    const Checkpoint& checkpoint,
    std::span<const std::vector<std::int32_t>> sequences,
    int variants,
    const VariantWeights& weights_of,
    const std::function<void(double work)>& progress);

// Multiply-adds of that, without the making of the weights.
[[nodiscard]] double variants_work(
    const ModelGraph& graph, std::span<const std::vector<std::int32_t>> sequences, int variants);

// `original` with the errors that rounding to nearest makes in W times factors, scaled so that
// 1/2 sum_i row_weights_i sum_j variances_j d_ij^2 = loss.
struct LinearScore;
[[nodiscard]] LinearWeights with_rounding_errors(
    const Context& ctx,
    const LinearWeights& original,
    const QuantScheme& scheme,
    const LinearScore& score,
    double loss);

}  // namespace quern
