// SPDX-License-Identifier: Apache-2.0
#include "nn/attention.h"

#include "base/checked.h"
#include "kernels/blas.h"
#include "kernels/kernels.h"
#include "nn/attention_tile.h"
#include "nn/linear.h"

#include <algorithm>
#include <cmath>

namespace quern {
namespace {

constexpr std::int64_t kRowChunk = 64;

// Parts rows of [query | gate] a head: `both` [rows, heads * 2 * dim].
void part_gates(
    const Context& ctx,
    const AttentionShape& shape,
    const std::vector<float>& both,
    std::int64_t rows,
    float* queries,
    float* gates) {
  const std::int64_t dim = shape.head_dim;
  ctx.pool.for_chunks(
      rows * shape.heads, kRowChunk, [&](std::int64_t begin, std::int64_t end, int) {
        for (std::int64_t i = begin; i < end; ++i) {
          const float* from = both.data() + 2 * i * dim;
          std::copy_n(from, dim, queries + i * dim);
          std::copy_n(from + dim, dim, gates + i * dim);
        }
      });
}

// out *= sigmoid(gates)
void apply_gates(const Context& ctx, const std::vector<float>& gates, float* out) {
  constexpr std::int64_t kChunk = 4096;
  ctx.pool.for_chunks(
      static_cast<std::int64_t>(gates.size()),
      kChunk,
      [&](std::int64_t begin, std::int64_t end, int) {
        for (std::int64_t i = begin; i < end; ++i) {
          out[i] /= 1.0F + std::exp(-gates[static_cast<std::size_t>(i)]);
        }
      });
}

}  // namespace

// The angle is rounded to float before the cosine, as the reference does.
Rotation make_rotation(
    const Context& ctx,
    const Rope& rope,
    std::int64_t first,
    std::int64_t rows,
    const TokenPositions* positions) {
  const std::size_t half = rope.inverse_frequencies.size();
  Rotation rotation;
  rotation.cosines.resize(static_cast<std::size_t>(rows) * half);
  rotation.sines.resize(rotation.cosines.size());
  ctx.pool.for_chunks(rows, kRowChunk, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t t = begin; t < end; ++t) {
      for (std::size_t m = 0; m < half; ++m) {
        const std::int64_t position =
            positions == nullptr ? first + t : positions->at(first + t, m);
        const float angle = static_cast<float>(position) * rope.inverse_frequencies[m];
        const std::size_t at = static_cast<std::size_t>(t) * half + m;
        rotation.cosines[at] =
            static_cast<float>(std::cos(static_cast<double>(angle))) * rope.attention_factor;
        rotation.sines[at] =
            static_cast<float>(std::sin(static_cast<double>(angle))) * rope.attention_factor;
      }
    }
  });
  return rotation;
}

void finish_heads(
    const Context& ctx,
    const ModelConfig& config,
    const std::vector<float>& gain,
    const Rotation& rotation,
    std::int64_t heads,
    std::int64_t rows,
    float* x) {
  const std::int64_t dim = config.head_dim;
  const auto half = static_cast<std::int64_t>(config.rope.inverse_frequencies.size());
  ctx.pool.for_chunks(rows, kRowChunk, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t t = begin; t < end; ++t) {
      const float* cosines = rotation.cosines.data() + t * half;
      const float* sines = rotation.sines.data() + t * half;
      for (std::int64_t h = 0; h < heads; ++h) {
        float* head = x + (t * heads + h) * dim;
        if (!gain.empty()) {
          ctx.kernels.rms_norm(head, gain.data(), config.norm_eps, head, dim);
        }
        for (std::int64_t m = 0; m < half; ++m) {
          const float low = head[m];
          const float high = head[m + half];
          head[m] = low * cosines[m] - high * sines[m];
          head[m + half] = high * cosines[m] + low * sines[m];
        }
      }
    }
  });
}

AttentionShape attention_shape(const ModelConfig& config, const Block& block) {
  return {config.heads, config.kv_heads, config.head_dim, block.sliding_window};
}

void attend(
    const Context& ctx,
    Workspace& workspace,
    const AttentionShape& shape,
    const float* queries,
    std::int64_t first,
    std::int64_t rows,
    const float* keys,
    const float* values,
    float* out) {
  const std::int64_t dim = shape.head_dim;
  const std::int64_t q_width = shape.q_width();
  const std::int64_t kv_width = shape.kv_width();
  const float scale = 1.0F / std::sqrt(static_cast<float>(dim));
  // A product of several queries sums in another order than that of one.
  const std::int64_t tile_rows = rows <= kFewTokens ? 1 : kQueryRows;
  const std::int64_t tiles = ceil_div(rows, tile_rows);
  ctx.pool.for_chunks(tiles * shape.heads, 1, [&](std::int64_t item, std::int64_t, int worker) {
    const std::int64_t head = item % shape.heads;
    // The longest tiles first, so that the workers end together.
    const std::int64_t t0 = (tiles - 1 - item / shape.heads) * tile_rows;
    const AttentionTile tile =
        attention_tile(first + t0, std::min(tile_rows, rows - t0), shape.window);
    const std::int64_t column = tile.begin * kv_width + head / shape.group() * dim;
    const float* K = keys + column;
    const float* V = values + column;
    const float* Q = queries + t0 * q_width + head * dim;
    const std::int64_t n = tile.rows;
    const std::int64_t seen = shape.causal ? tile.seen() : first + rows;
    float* scores = workspace.worker_floats(worker, 1, n * seen);
    ctx.blas.gemm(false, true, n, seen, dim, scale, Q, q_width, K, kv_width, 0.0F, scores, seen);
    if (shape.causal) {
      causal_softmax(ctx, tile, scores);
    } else {
      for (std::int64_t r = 0; r < n; ++r) {
        ctx.kernels.softmax(scores + r * seen, seen);
      }
    }
    ctx.blas.gemm(
        false,
        false,
        n,
        dim,
        seen,
        1.0F,
        scores,
        seen,
        V,
        kv_width,
        0.0F,
        out + t0 * q_width + head * dim,
        q_width);
  });
}

void attention_forward(
    const Context& ctx,
    Workspace& workspace,
    const ModelConfig& config,
    const Block& block,
    const BlockWeights& weights,
    const float* x,
    std::int64_t rows,
    LayerCache& cache,
    float* out) {
  const AttentionShape shape = attention_shape(config, block);
  const std::int64_t first = cache.tokens;
  const std::int64_t total = first + rows;
  cache.keys.resize(static_cast<std::size_t>(total * shape.kv_width()));
  cache.values.resize(static_cast<std::size_t>(total * shape.kv_width()));
  std::vector<float> queries(static_cast<std::size_t>(rows * shape.q_width()));
  float* keys = cache.keys.data() + first * shape.kv_width();
  float* values = cache.values.data() + first * shape.kv_width();
  std::vector<float> gates;
  if (config.output_gate) {
    std::vector<float> both(2 * queries.size());
    gates.resize(queries.size());
    linear_forward(ctx, workspace, weights.linears[kQ], x, rows, both.data());
    part_gates(ctx, shape, both, rows, queries.data(), gates.data());
  } else {
    linear_forward(ctx, workspace, weights.linears[kQ], x, rows, queries.data());
  }
  linear_forward(ctx, workspace, weights.linears[kK], x, rows, keys);
  linear_forward(ctx, workspace, weights.linears[kV], x, rows, values);
  const Rotation rotation = make_rotation(ctx, config.rope, first, rows, cache.positions);
  finish_heads(ctx, config, weights.q_norm, rotation, shape.heads, rows, queries.data());
  finish_heads(ctx, config, weights.k_norm, rotation, shape.kv_heads, rows, keys);
  attend(
      ctx,
      workspace,
      shape,
      queries.data(),
      first,
      rows,
      cache.keys.data(),
      cache.values.data(),
      out);
  apply_gates(ctx, gates, out);
  cache.tokens = total;
}

void attention_rewind(const AttentionShape& shape, std::int64_t tokens, LayerCache& cache) {
  cache.keys.resize(static_cast<std::size_t>(tokens * shape.kv_width()));
  cache.values.resize(cache.keys.size());
  cache.tokens = tokens;
}

}  // namespace quern
