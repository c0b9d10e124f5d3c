// SPDX-License-Identifier: Apache-2.0
#include "nn/attention.h"

#include "kernels/blas.h"
#include "kernels/kernels.h"
#include "nn/linear.h"

#include <algorithm>
#include <cmath>

namespace quern {
namespace {

// Queries that share one product with the keys; their scores are one tile of scratch.
constexpr std::int64_t kQueryRows = 256;

// cos and sin of position * frequency, [rows, head_dim / 2] each. The angle is rounded to float
// before the cosine, as the reference does.
void fill_rotation(
    const Rope& rope, std::int64_t first, std::int64_t rows, float* cosines, float* sines) {
  const std::size_t half = rope.inverse_frequencies.size();
  for (std::int64_t t = 0; t < rows; ++t) {
    for (std::size_t m = 0; m < half; ++m) {
      const float angle = static_cast<float>(first + t) * rope.inverse_frequencies[m];
      const std::size_t at = static_cast<std::size_t>(t) * half + m;
      cosines[at] =
          static_cast<float>(std::cos(static_cast<double>(angle))) * rope.attention_factor;
      sines[at] = static_cast<float>(std::sin(static_cast<double>(angle))) * rope.attention_factor;
    }
  }
}

// Norm (if any) and rotation of every head of one row, in place.
void finish_heads(
    const Context& ctx,
    const ModelConfig& config,
    const std::vector<float>& gain,
    const float* cosines,
    const float* sines,
    std::int64_t heads,
    float* row) {
  const std::int64_t dim = config.head_dim;
  const std::int64_t half = dim / 2;
  for (std::int64_t h = 0; h < heads; ++h) {
    float* head = row + h * dim;
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

}  // namespace

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
  const std::int64_t dim = config.head_dim;
  const std::int64_t q_width = config.heads * dim;
  const std::int64_t kv_width = config.kv_heads * dim;
  const std::int64_t first = cache.tokens;
  const std::int64_t total = first + rows;
  cache.keys.resize(static_cast<std::size_t>(total * kv_width));
  cache.values.resize(static_cast<std::size_t>(total * kv_width));
  std::vector<float> queries(static_cast<std::size_t>(rows * q_width));
  float* keys = cache.keys.data() + first * kv_width;
  linear_forward(ctx, workspace, weights.linears[kQ], x, rows, queries.data());
  linear_forward(ctx, workspace, weights.linears[kK], x, rows, keys);
  linear_forward(
      ctx, workspace, weights.linears[kV], x, rows, cache.values.data() + first * kv_width);

  const std::int64_t half = dim / 2;
  std::vector<float> rotation(static_cast<std::size_t>(2 * rows * half));
  float* cosines = rotation.data();
  float* sines = cosines + rows * half;
  ctx.pool.for_chunks(rows, 64, [&](std::int64_t begin, std::int64_t end, int) {
    fill_rotation(
        config.rope, first + begin, end - begin, cosines + begin * half, sines + begin * half);
    for (std::int64_t t = begin; t < end; ++t) {
      const float* c = cosines + t * half;
      const float* s = sines + t * half;
      finish_heads(ctx, config, weights.q_norm, c, s, config.heads, queries.data() + t * q_width);
      finish_heads(ctx, config, weights.k_norm, c, s, config.kv_heads, keys + t * kv_width);
    }
  });

  const float scale = 1.0F / std::sqrt(static_cast<float>(dim));
  const std::int64_t tiles = (rows + kQueryRows - 1) / kQueryRows;
  const std::int64_t group = config.heads / config.kv_heads;
  ctx.pool.for_chunks(tiles * config.heads, 1, [&](std::int64_t item, std::int64_t, int worker) {
    const std::int64_t head = item % config.heads;
    // The longest tiles first, so that the workers end together.
    const std::int64_t t0 = (tiles - 1 - item / config.heads) * kQueryRows;
    const std::int64_t n = std::min(kQueryRows, rows - t0);
    const std::int64_t end = first + t0 + n;  // keys that the last query of the tile sees
    const std::int64_t window = block.sliding_window;
    const std::int64_t begin = window == 0 ? 0 : std::max<std::int64_t>(0, first + t0 - window + 1);
    const std::int64_t seen = end - begin;
    const float* K = cache.keys.data() + begin * kv_width + head / group * dim;
    const float* V = cache.values.data() + begin * kv_width + head / group * dim;
    const float* Q = queries.data() + t0 * q_width + head * dim;
    float* scores = workspace.worker_floats(worker, 1, n * seen);
    ctx.blas.gemm(false, true, n, seen, dim, scale, Q, q_width, K, kv_width, 0.0F, scores, seen);
    for (std::int64_t r = 0; r < n; ++r) {
      float* row = scores + r * seen;
      const std::int64_t position = first + t0 + r;
      const std::int64_t low =
          window == 0 ? 0 : std::max<std::int64_t>(0, position - window + 1 - begin);
      const std::int64_t high = position + 1 - begin;
      std::fill(row, row + low, 0.0F);
      ctx.kernels.softmax(row + low, high - low);
      std::fill(row + high, row + seen, 0.0F);
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
  cache.tokens = total;
}

}  // namespace quern
