// SPDX-License-Identifier: Apache-2.0
#include "nn/forward_memory.h"

#include "nn/attention_tile.h"
#include "nn/decoder.h"
#include "nn/linear.h"

#include <algorithm>
#include <map>
#include <string>

namespace quern {
namespace {

constexpr std::uint64_t kFloat = sizeof(float);

std::uint64_t floats(std::int64_t count) {
  return static_cast<std::uint64_t>(count) * kFloat;
}

// Values a row of what the mixer of a block holds besides its input and output.
std::int64_t mixer_width(const ModelConfig& config, const Block& block) {
  if (block.delta_net) {
    const DeltaNetConfig& shape = *config.delta_net;
    // What was projected, padded and convolved; the fused form is parted before that.
    const std::int64_t projected = shape.channels() + shape.value_width() + 2 * shape.value_heads;
    return std::max(projected + 2 * shape.channels(), 2 * projected);
  }
  const std::int64_t q_width = config.heads * config.head_dim;
  const std::int64_t kv_width = config.kv_heads * config.head_dim;
  const std::int64_t rotation =
      2 * static_cast<std::int64_t>(config.rope.inverse_frequencies.size());
  return q_width * (config.output_gate ? 4 : 1) + 2 * kv_width + rotation;
}

// The same of the feed-forward part. Every row may take the same expert.
std::int64_t feed_forward_width(const ModelConfig& config, const Block& block) {
  if (!block.mixture) {
    return 2 * config.intermediate_size + config.hidden_size;
  }
  const MixtureConfig& mixture = *config.mixture;
  const std::int64_t routing = mixture.experts + 8 * mixture.experts_per_token;
  return routing + 2 * std::max(mixture.expert_width, mixture.shared_width) +
         2 * config.hidden_size;
}

}  // namespace

std::uint64_t block_forward_memory(
    const Context& ctx, const ModelConfig& config, const Block& block, std::int64_t rows) {
  std::int64_t site_width = 0;
  for (const CalibrationSite& site : block.sites) {
    site_width = std::max(site_width, site.width);
  }
  std::int64_t inputs = 0;
  for (const Linear& linear : block.linears) {
    inputs = std::max(inputs, linear.in_features);
  }
  // X and what a site carries; inputs that are rounded to few bits.
  const std::int64_t per_row =
      2 * site_width + inputs +
      std::max(mixer_width(config, block), feed_forward_width(config, block));
  std::int64_t per_worker = linear_tile_floats(inputs) + std::min(kQueryRows, rows) * rows;
  std::int64_t state = 0;
  if (block.delta_net) {
    const DeltaNetConfig& shape = *config.delta_net;
    per_worker += 2 * rows * (shape.key_dim + shape.value_dim);
    state = shape.value_heads * shape.key_dim * shape.value_dim;
  }
  return floats(rows * per_row + ctx.pool.size() * per_worker + state);
}

std::uint64_t logits_memory(const Context& ctx, const ModelConfig& config, std::int64_t rows) {
  const std::int64_t chunk = std::min(rows, logit_rows_per_chunk(config.vocab_size));
  return floats(
      chunk * config.vocab_size + ctx.pool.size() * linear_tile_floats(config.hidden_size));
}

std::uint64_t loaded_linear_memory(const Linear& linear, const Checkpoint& checkpoint) {
  const std::string prefix = linear.module + ".";
  const std::map<std::string, TensorView>& tensors = checkpoint.tensors().tensors();
  std::uint64_t all = 0;
  std::uint64_t largest = 0;
  bool aligned = true;
  for (auto at = tensors.lower_bound(prefix); at != tensors.end() && at->first.starts_with(prefix);
       ++at) {
    const TensorView& view = at->second;
    all += view.bytes.size();
    largest = std::max<std::uint64_t>(largest, view.bytes.size());
    const auto address = reinterpret_cast<std::uintptr_t>(view.bytes.data());
    aligned = aligned && address % dtype_size(view.dtype) == 0;
  }
  if (!checkpoint.is_quantized(linear.module)) {
    return aligned ? 0 : largest;
  }
  if (checkpoint.format() == "gguf") {  // blocks are used where they stand
    return static_cast<std::uint64_t>(linear.out_features) * sizeof(std::int64_t);
  }
  // Codes keep their size; scales widen to floats and packed zero points to bytes.
  return largest + 4 * (all - largest);
}

}  // namespace quern
