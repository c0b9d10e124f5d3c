// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "nn/attention.h"

namespace quern {

// One decoder block, cut at its calibration sites: for site 0, 1, …, site_input gives the rows X
// that enter the linears of the site, apply_site runs those linears. Calibration stops between the
// two to gather X and between sites to quantize; evaluation and generation run straight through
// (block_forward). There is no second forward pass.
//
// x [rows, hidden] is the residual stream. What passes from one site to the next besides x (the
// attention output, the MLP's hidden values) is `carried` [rows, width of the next site].

// True when X of the site is recomputed from x; false when it is what the previous site carried.
[[nodiscard]] bool site_reads_residual(int site);

// The norm that makes X of such a site, and its gain.
[[nodiscard]] const Norm& site_norm(const Block& block, int site);
[[nodiscard]] std::vector<float>& site_norm_gain(BlockWeights& weights, int site);

// X [rows, sites[site].width] of a site that reads the residual.
void site_input(
    const Context& ctx,
    const ModelConfig& config,
    const BlockWeights& weights,
    int site,
    const float* x,
    std::int64_t rows,
    float* X);

// Runs the linears of `site` on X: updates x for sites that end a branch, else fills `carried`
// (rows x width of site + 1). `cache` is used by the attention site, and takes a router's ties.
void apply_site(
    const Context& ctx,
    Workspace& workspace,
    const ModelConfig& config,
    const Block& block,
    const BlockWeights& weights,
    int site,
    const float* X,
    std::int64_t rows,
    LayerCache& cache,
    float* x,
    float* carried);

// The hidden values silu(gate) * up [rows, width] of an MLP or expert whose gate_proj is linear
// `first` and whose up_proj is the next, for X [rows, hidden], with the values that they were made
// of; `hidden` may be `gate`.
void mlp_hidden(
    const Context& ctx,
    Workspace& workspace,
    const BlockWeights& weights,
    int first,
    const float* X,
    std::int64_t rows,
    float* gate,
    float* up,
    float* hidden);

// The block as far as X [rows, width] of site `last`, which is only made: x in place, new keys and
// values appended to `cache`. `last` beyond the sites: all of it, X is scratch.
void forward_to_site(
    const Context& ctx,
    Workspace& workspace,
    const ModelConfig& config,
    const Block& block,
    const BlockWeights& weights,
    int last,
    std::int64_t rows,
    LayerCache& cache,
    float* x,
    std::vector<float>& X);

// The whole block: x [rows, hidden] in place, new keys and values appended to `cache`.
void block_forward(
    const Context& ctx,
    Workspace& workspace,
    const ModelConfig& config,
    const Block& block,
    const BlockWeights& weights,
    std::int64_t rows,
    LayerCache& cache,
    float* x);

// Takes back the tokens from `tokens` on; of DeltaNet, only of the last block_forward() and when
// the cache kept a journal in it.
void block_rewind(
    const ModelConfig& config, const Block& block, std::int64_t tokens, LayerCache& cache);

}  // namespace quern
