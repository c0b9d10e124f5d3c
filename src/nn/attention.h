// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "nn/layer_cache.h"
#include "nn/weights.h"
#include "nn/workspace.h"

#include <cstdint>
#include <vector>

namespace quern {

// cos and sin of the angles of the tokens first … first + rows - 1, times the attention factor;
// [rows, rotary / 2]. Without `positions` a token's index is its position.
struct Rotation {
  std::vector<float> cosines;
  std::vector<float> sines;
};
[[nodiscard]] Rotation make_rotation(
    const Context& ctx,
    const Rope& rope,
    std::int64_t first,
    std::int64_t rows,
    const TokenPositions* positions = nullptr);

// Norm over each head (when there is a gain), then rotation of the first values of each, in place:
// x [rows, heads * head_dim].
void finish_heads(
    const Context& ctx,
    const ModelConfig& config,
    const std::vector<float>& gain,
    const Rotation& rotation,
    std::int64_t heads,
    std::int64_t rows,
    float* x);

struct AttentionShape {
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;  // query head h reads key/value head h / (heads / kv_heads)
  std::int64_t head_dim = 0;
  std::int64_t window = 0;  // tokens seen, the query's own included; 0: all
  bool causal = true;  // false: a query sees the keys after its own too; without a window

  [[nodiscard]] std::int64_t q_width() const noexcept { return heads * head_dim; }
  [[nodiscard]] std::int64_t kv_width() const noexcept { return kv_heads * head_dim; }
  [[nodiscard]] std::int64_t group() const noexcept { return heads / kv_heads; }
};
[[nodiscard]] AttentionShape attention_shape(const ModelConfig& config, const Block& block);

// out [rows, q_width] = softmax(Q K^T / sqrt(head_dim)) V for the queries [rows, q_width]
// of positions first … first + rows - 1 over the keys and values [first + rows, kv_width] of
// positions 0 ….
void attend(
    const Context& ctx,
    Workspace& workspace,
    const AttentionShape& shape,
    const float* queries,
    std::int64_t first,
    std::int64_t rows,
    const float* keys,
    const float* values,
    float* out);

// Causal grouped-query attention of `rows` new tokens at positions cache.tokens … + rows - 1.
// x [rows, hidden] is the normed input; out [rows, heads * head_dim] is what o_proj takes. Appends
// the new keys and values to the cache.
void attention_forward(
    const Context& ctx,
    Workspace& workspace,
    const ModelConfig& config,
    const Block& block,
    const BlockWeights& weights,
    const float* x,
    std::int64_t rows,
    LayerCache& cache,
    float* out);

// Takes back the tokens from `tokens` on.
void attention_rewind(const AttentionShape& shape, std::int64_t tokens, LayerCache& cache);

}  // namespace quern
