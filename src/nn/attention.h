// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "nn/weights.h"
#include "nn/workspace.h"

#include <cstdint>
#include <vector>

namespace quern {

// Keys and values of one layer for the tokens seen so far, after norm and rotation.
struct LayerCache {
  std::vector<float> keys;  // [tokens, kv_heads * head_dim]
  std::vector<float> values;  // [tokens, kv_heads * head_dim]
  std::int64_t tokens = 0;

  void clear() {
    keys.clear();
    values.clear();
    tokens = 0;
  }
};

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

}  // namespace quern
