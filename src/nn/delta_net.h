// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "nn/attention.h"

#include <cstdint>

namespace quern {

// One value head's part of a sequence, in order of tokens; queries and keys are normalised, queries
// scaled.
struct DeltaHead {
  std::vector<float> queries;  // [rows, key_dim]
  std::vector<float> keys;  // [rows, key_dim]
  std::vector<float> values;  // [rows, value_dim]
  std::vector<float> strengths;  // [rows] beta
  std::vector<float> log_decays;  // [rows] g <= 0
  std::int64_t rows = 0;
  std::int64_t key_dim = 0;
  std::int64_t value_dim = 0;
};

// The gated delta rule (arXiv 2412.06464): for each token
//   S = exp(g) S;  S = S + k (beta (v - S^T k))^T;  o = S^T q,
// S [key_dim, value_dim] the state before and after, o [rows, value_dim]. Token by token.
void delta_rule(const DeltaHead& head, float* state, float* out);
// The same by chunks of 64 tokens, in matrix products: what a long input takes.
void delta_rule_chunked(const Context& ctx, const DeltaHead& head, float* state, float* out);

// Gated DeltaNet of `rows` new tokens after those of the cache. x [rows, hidden] is the normed
// input; out [rows, value heads * value dim] is what out_proj takes. Moves the cache on.
void delta_net_forward(
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
