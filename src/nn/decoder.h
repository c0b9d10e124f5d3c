// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "nn/block.h"
#include "nn/image_prompt.h"

#include <functional>
#include <memory>
#include <span>
#include <vector>

namespace quern {

// State of one sequence while it is decoded: the caches of all layers.
struct Sequence {
  std::vector<LayerCache> layers;
  std::shared_ptr<const ImagePrompt> images;  // what it begins with, when that has images
  [[nodiscard]] std::int64_t tokens() const { return layers.empty() ? 0 : layers.front().tokens; }
};

// Where a router left an expert out that is about as likely as the last that it took.
struct RouterTie {
  int layer = 0;
  std::int64_t position = 0;
};

// Rows whose logits are held at once.
[[nodiscard]] std::int64_t logit_rows_per_chunk(std::int64_t vocab_size);

// Runs a loaded model; the forward pass of evaluation and generation.
class Decoder {
 public:
  Decoder(const Context& ctx, const Model& model) : ctx_(ctx), model_(model), workspace_(ctx) {}

  // Called with the residual stream before each block, and once more after the last.
  using HiddenObserver = std::function<void(int layer, std::span<const float> x)>;

  // Final-normed hidden rows [ids.size(), hidden] of `ids` after what `sequence` has seen. Throws
  // UsageError for ids outside the vocabulary.
  [[nodiscard]] std::vector<float> forward(
      std::span<const std::int32_t> ids,
      Sequence& sequence,
      const HiddenObserver& observer = nullptr);
  // The same for a sequence of its own, keeping no cache beyond one layer.
  [[nodiscard]] std::vector<float> forward(
      std::span<const std::int32_t> ids, const HiddenObserver& observer = nullptr);

  // The same for at most kFewTokens tokens (linear.h) that may turn out wrong. The rows are, bit
  // for bit, those of the tokens one at a time.
  [[nodiscard]] std::vector<float> forward_tentative(
      std::span<const std::int32_t> ids, Sequence& sequence);
  // Takes back the tokens from `tokens` on, which forward_tentative() saw last.
  void rewind(Sequence& sequence, std::int64_t tokens) const;

  // Of the last forward().
  [[nodiscard]] const std::vector<RouterTie>& router_ties() const { return router_ties_; }

  // Logits [rows, vocab] of final-normed rows, in chunks of at most `rows_per_chunk`, so that a
  // large vocabulary never needs rows x vocab floats at once.
  using LogitsFunction =
      std::function<void(std::int64_t begin, std::int64_t rows, const float* logits)>;
  void for_logits(std::span<const float> hidden, const LogitsFunction& function);
  [[nodiscard]] std::int64_t rows_per_chunk() const {
    return logit_rows_per_chunk(model_.graph.config.vocab_size);
  }

  // The norm after the last block, over the rows of x [rows, hidden] in place.
  void final_norm(std::span<float> x) const;

  [[nodiscard]] const Model& model() const { return model_; }

 private:
  [[nodiscard]] std::vector<float> run(
      std::span<const std::int32_t> ids,
      Sequence& sequence,
      const HiddenObserver& observer,
      bool is_tentative);
  void run_block(std::size_t index, LayerCache& cache, std::vector<float>& x);

  const Context& ctx_;
  const Model& model_;
  Workspace workspace_;
  std::vector<float> logits_;
  std::vector<RouterTie> router_ties_;
};

// Rows of the embedding table for `ids`, as floats [ids.size(), hidden].
[[nodiscard]] std::vector<float> embed_tokens(
    const KernelTable& kernels, const LinearWeights& embedding, std::span<const std::int32_t> ids);

}  // namespace quern
