// SPDX-License-Identifier: Apache-2.0
#include "nn/block.h"

#include "kernels/kernels.h"
#include "nn/delta_net.h"
#include "nn/linear.h"
#include "nn/moe.h"

#include <utility>
#include <vector>

namespace quern {
namespace {

constexpr std::int64_t kRowChunk = 32;

void add_linear(
    const Context& ctx,
    Workspace& workspace,
    const LinearWeights& weights,
    const float* X,
    std::int64_t rows,
    float* x) {
  std::vector<float> y(static_cast<std::size_t>(rows * weights.out_features));
  linear_forward(ctx, workspace, weights, X, rows, y.data());
  ctx.pool.for_chunks(rows, kRowChunk, [&](std::int64_t begin, std::int64_t end, int) {
    const std::int64_t offset = begin * weights.out_features;
    ctx.kernels.axpy_f32(1.0F, y.data() + offset, x + offset, (end - begin) * weights.out_features);
  });
}

}  // namespace

bool site_reads_residual(int site) {
  return site == kAttentionInput || site == kMlpInput;
}

const Norm& site_norm(const Block& block, int site) {
  return site == kAttentionInput ? block.attention_norm : block.mlp_norm;
}

std::vector<float>& site_norm_gain(BlockWeights& weights, int site) {
  return site == kAttentionInput ? weights.attention_norm : weights.mlp_norm;
}

void site_input(
    const Context& ctx,
    const ModelConfig& config,
    const BlockWeights& weights,
    int site,
    const float* x,
    std::int64_t rows,
    float* X) {
  const std::vector<float>& gain =
      site == kAttentionInput ? weights.attention_norm : weights.mlp_norm;
  const std::int64_t width = config.hidden_size;
  ctx.pool.for_chunks(rows, kRowChunk, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t t = begin; t < end; ++t) {
      ctx.kernels.rms_norm(x + t * width, gain.data(), config.norm_eps, X + t * width, width);
    }
  });
}

void mlp_hidden(
    const Context& ctx,
    Workspace& workspace,
    const BlockWeights& weights,
    int first,
    const float* X,
    std::int64_t rows,
    float* gate,
    float* up,
    float* hidden) {
  const LinearWeights& gate_proj = weights.linears[static_cast<std::size_t>(first)];
  const std::int64_t width = gate_proj.out_features;
  linear_forward(ctx, workspace, gate_proj, X, rows, gate);
  linear_forward(ctx, workspace, weights.linears[static_cast<std::size_t>(first) + 1], X, rows, up);
  ctx.pool.for_chunks(rows, kRowChunk, [&](std::int64_t begin, std::int64_t end, int) {
    const std::int64_t offset = begin * width;
    ctx.kernels.swiglu(gate + offset, up + offset, hidden + offset, (end - begin) * width);
  });
}

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
    float* carried) {
  const auto linear = [&](int index) -> const LinearWeights& {
    return weights.linears[static_cast<std::size_t>(index)];
  };
  switch (site) {
    case kAttentionInput:
      if (block.delta_net) {
        delta_net_forward(ctx, workspace, config, block, weights, X, rows, cache, carried);
      } else {
        attention_forward(ctx, workspace, config, block, weights, X, rows, cache, carried);
      }
      return;
    case kAttentionOutput: add_linear(ctx, workspace, linear(block.output), X, rows, x); return;
    case kMlpInput: {
      if (block.mixture) {
        for (const std::int64_t row :
             mixture_forward(ctx, workspace, *block.mixture, weights, X, rows, x)) {
          cache.router_ties.push_back(cache.tokens - rows + row);
        }
        return;
      }
      std::vector<float> gate(static_cast<std::size_t>(rows * linear(block.mlp).out_features));
      std::vector<float> up(gate.size());
      mlp_hidden(ctx, workspace, weights, block.mlp, X, rows, gate.data(), up.data(), carried);
      return;
    }
    default: add_linear(ctx, workspace, linear(block.mlp + 2), X, rows, x); return;
  }
}

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
    std::vector<float>& X) {
  std::vector<float> carried;
  for (int site = 0; site < static_cast<int>(block.sites.size()); ++site) {
    if (site_reads_residual(site)) {
      X.resize(static_cast<std::size_t>(rows * block.sites[static_cast<std::size_t>(site)].width));
      site_input(ctx, config, weights, site, x, rows, X.data());
    } else {
      std::swap(X, carried);
    }
    if (site == last) {
      return;
    }
    if (static_cast<std::size_t>(site) + 1 < block.sites.size()) {
      carried.resize(
          static_cast<std::size_t>(rows * block.sites[static_cast<std::size_t>(site) + 1].width));
    }
    apply_site(
        ctx, workspace, config, block, weights, site, X.data(), rows, cache, x, carried.data());
  }
}

void block_forward(
    const Context& ctx,
    Workspace& workspace,
    const ModelConfig& config,
    const Block& block,
    const BlockWeights& weights,
    std::int64_t rows,
    LayerCache& cache,
    float* x) {
  std::vector<float> X;
  forward_to_site(
      ctx,
      workspace,
      config,
      block,
      weights,
      static_cast<int>(block.sites.size()),
      rows,
      cache,
      x,
      X);
}

void block_rewind(
    const ModelConfig& config, const Block& block, std::int64_t tokens, LayerCache& cache) {
  if (block.delta_net) {
    delta_net_rewind(*config.delta_net, tokens, cache);
  } else {
    attention_rewind(attention_shape(config, block), tokens, cache);
  }
}

}  // namespace quern
