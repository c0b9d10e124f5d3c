// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "nn/decoder.h"

#include <cstdint>
#include <span>
#include <vector>

namespace quern {

// Runs the draft layer of a model (model/mtp.h). Slot p joins the final-normed hidden state of
// token p and the embedding of token p + 1; its row, given to Decoder::for_logits(), says what
// token p + 2 may be. Such a row in the place of a hidden state drafts a token further.
class Drafter {
 public:
  // Throws what require_mtp() throws.
  Drafter(const Context& ctx, const Model& model);

  // Rows [next.size(), hidden] of the slots after those of `cache`: `hidden` [next.size(), hidden],
  // `next` the tokens after those that it is of.
  [[nodiscard]] std::vector<float> forward(
      std::span<const float> hidden, std::span<const std::int32_t> next, LayerCache& cache);
  // Takes back the slots from `slots` on.
  void rewind(LayerCache& cache, std::int64_t slots) const;

 private:
  const Context& ctx_;
  const Model& model_;
  Workspace workspace_;
  LinearWeights projection_;
  std::vector<float> embedding_norm_;
  std::vector<float> hidden_norm_;
  BlockWeights block_;
  std::vector<float> norm_;
};

}  // namespace quern
