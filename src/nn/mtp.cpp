// SPDX-License-Identifier: Apache-2.0
#include "nn/mtp.h"

#include "kernels/kernels.h"
#include "model/mtp.h"
#include "nn/linear.h"

namespace quern {

Drafter::Drafter(const Context& ctx, const Model& model)
    : ctx_(ctx), model_(model), workspace_(ctx) {
  const Checkpoint& checkpoint = *model.checkpoint;
  const MtpLayer& layer = require_mtp(model.graph, checkpoint);
  projection_ = load_linear_weights(layer.projection, checkpoint);
  embedding_norm_ = load_norm(layer.embedding_norm, checkpoint);
  hidden_norm_ = load_norm(layer.hidden_norm, checkpoint);
  block_ = load_block_weights(layer.block, checkpoint);
  norm_ = load_norm(layer.norm, checkpoint);
}

std::vector<float> Drafter::forward(
    std::span<const float> hidden, std::span<const std::int32_t> next, LayerCache& cache) {
  const ModelConfig& config = model_.graph.config;
  const std::int64_t width = config.hidden_size;
  const auto rows = static_cast<std::int64_t>(next.size());
  const std::vector<float> embedded = embed_tokens(ctx_.kernels, model_.embedding, next);
  std::vector<float> joined(2 * embedded.size());
  for (std::int64_t t = 0; t < rows; ++t) {
    float* row = joined.data() + 2 * t * width;
    const auto norm = [&](const float* from, const std::vector<float>& gain, float* to) {
      ctx_.kernels.rms_norm(from + t * width, gain.data(), config.norm_eps, to, width);
    };
    norm(embedded.data(), embedding_norm_, row);
    norm(hidden.data(), hidden_norm_, row + width);
  }
  std::vector<float> x(embedded.size());
  linear_forward(ctx_, workspace_, projection_, joined.data(), rows, x.data());
  block_forward(ctx_, workspace_, config, model_.graph.mtp->block, block_, rows, cache, x.data());
  for (std::int64_t t = 0; t < rows; ++t) {
    float* row = x.data() + t * width;
    ctx_.kernels.rms_norm(row, norm_.data(), config.norm_eps, row, width);
  }
  return x;
}

void Drafter::rewind(LayerCache& cache, std::int64_t slots) const {
  block_rewind(model_.graph.config, model_.graph.mtp->block, slots, cache);
}

}  // namespace quern
