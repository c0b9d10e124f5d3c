// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "calib/linear_gradients.h"
#include "model/graph.h"
#include "tensor/checkpoint.h"

#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <vector>

namespace quern {

// What the loss compares the model's predictions with.
enum class Labels {
  // Tokens drawn from the model's own softmax, one at each position; the loss is the sum of their
  // -log p. The squares of its gradients are the Fisher information (methods.md 12): the divergence
  // from the unquantized model has no gradient at its own weights, but this curvature.
  kSampled,
  // The next token of the text; the loss is the mean -log p over all predictions of all sequences,
  // as training has it. The last position of a sequence predicts nothing.
  kText,
};

struct GradientOptions {
  Labels labels = Labels::kSampled;
  // What to gather for a linear, the head included; null: the vectors only. A pure
  // function: it may be called more than once.
  std::function<GradientParts(const Linear&)> parts;
  // Where block inputs of all sequences wait for the way back; empty: in memory.
  std::filesystem::path spill_directory;
  DType stored_as = DType::kF32;  // or kBF16: half the room, rounded between blocks
  // Called from the calling thread with work done since the last call, in the unit of
  // gradient_work.
  std::function<void(double)> progress;
};

// Takes what was gathered for one linear as soon as it is complete: the head first, then the blocks
// from the last to the first. `block` is null for the head.
using GradientSink =
    std::function<void(const Block* block, const Linear& linear, LinearGradients&& gradients)>;

struct GradientSummary {
  double loss = 0;  // mean -log p of the labels, nats; for kSampled that is about the entropy
  std::int64_t labels = 0;
  std::int64_t tokens = 0;
  // [hidden] sum over all tokens of the squared gradients at the looked-up embeddings.
  std::vector<double> embedding_square;
};

// One backward pass through the whole model over `sequences`, block after block: all sequences go
// forward through a block before the next one is loaded, and backward likewise, so that one block's
// weights and statistics are in memory at a time, with the block inputs of all sequences (or those
// on disk). Dense and packed checkpoints alike. Labels are a function of ctx.seed, the index of the
// sequence and the position; the result is the same for any thread count.
//
// Throws UsageError when there is nothing to predict, ParseError when the model's values are not
// finite, InterruptedError when ctx says so, ResourceError when the disk has no room.
GradientSummary gather_gradients(
    const Context& ctx,
    const ModelGraph& graph,
    const Checkpoint& checkpoint,
    std::span<const std::vector<std::int32_t>> sequences,
    const GradientOptions& options,
    const GradientSink& sink);

// Multiply-adds of that pass.
[[nodiscard]] double gradient_work(
    const ModelGraph& graph,
    std::span<const std::vector<std::int32_t>> sequences,
    const GradientOptions& options);

// Bytes that it holds at its peak besides the mapped weights, at most: `stored` for block inputs
// and gradients of all sequences, in memory or spilled, and `working` for the statistics of one
// block and the rows of one sequence.
struct GradientMemory {
  std::uint64_t stored = 0;
  std::uint64_t working = 0;
};
[[nodiscard]] GradientMemory gradient_memory(
    const Context& ctx,
    const ModelGraph& graph,
    std::span<const std::vector<std::int32_t>> sequences,
    const GradientOptions& options);

// The token that `uniform` in [0, 1) draws from `probabilities`: the first whose cumulative
// probability exceeds it; when rounding left their sum below it, the last that is possible at all.
[[nodiscard]] std::int32_t sample_label(std::span<const float> probabilities, double uniform);

}  // namespace quern
