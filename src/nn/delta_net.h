// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "nn/attention.h"

#include <cstdint>

namespace quern {

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

// Takes back the tokens from `tokens` on, which delta_net_forward() took last, keeping a journal.
// That is used up.
void delta_net_rewind(const DeltaNetConfig& shape, std::int64_t tokens, LayerCache& cache);

}  // namespace quern
