// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "nn/weights.h"
#include "nn/workspace.h"

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

namespace quern {

// Called with the inputs X [rows, in] of a linear and delta [rows, out], the gradient of the loss
// at its outputs. The gradient of its weights would be delta^T X; nobody makes it unasked.
using DeltaObserver = std::function<void(std::int64_t rows, const float* X, const float* delta)>;
// The same for linear `linear` of a block (DenseLinear).
using LinearObserver =
    std::function<void(int linear, std::int64_t rows, const float* X, const float* delta)>;

// The gradient at the input of a block, dx [rows, hidden], from that at its output, dy, for one
// sequence x [rows, hidden] from position 0. The forward pass inside the block is made again, so
// that x is all a caller keeps of it; down_proj is left out of it, and the multiply-adds of linears
// are twice those of a forward pass. Calls `observer` once for each linear, from the last to the
// first. dx may be dy or x. Same result for any thread count.
void block_backward(
    const Context& ctx,
    Workspace& workspace,
    const ModelConfig& config,
    const Block& block,
    const BlockWeights& weights,
    std::int64_t rows,
    const float* x,
    const float* dy,
    float* dx,
    const LinearObserver& observer);

// Bytes of its buffers, at most.
[[nodiscard]] std::uint64_t block_backward_memory(
    const Context& ctx, const ModelConfig& config, const Block& block, std::int64_t rows);

// The label of row `row` given the model's probabilities [vocab] there; below 0: none, the row adds
// nothing. Called from all threads.
using LabelFunction =
    std::function<std::int32_t(std::int64_t row, std::span<const float> probabilities)>;

struct LabelLoss {
  double sum = 0;  // of -log(probability of the label), nats
  std::int64_t labels = 0;
};

// Final norm, head and softmax for x [rows, hidden], the residual stream after the last block, and
// back: dx [rows, hidden] is the gradient of scale * sum of -log(probability of the label). Logits
// exist for some rows at a time, and `observer` is called for those: X the normed rows, delta
// [rows, vocab]. dx may be x. Same result for any thread count.
LabelLoss head_backward(
    const Context& ctx,
    Workspace& workspace,
    const ModelConfig& config,
    const std::vector<float>& final_norm,
    const LinearWeights& head,
    std::int64_t rows,
    const float* x,
    const LabelFunction& label,
    float scale,
    float* dx,
    const DeltaObserver& observer);

// Bytes of its buffers, at most.
[[nodiscard]] std::uint64_t head_backward_memory(const ModelConfig& config, std::int64_t rows);

}  // namespace quern
