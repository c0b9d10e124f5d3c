// SPDX-License-Identifier: Apache-2.0
#include "base/checked.h"
#include "kernels/blas.h"
#include "nn/attention_tile.h"
#include "nn/backward_ops.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

namespace quern {
namespace {

// Where one query head reads and writes; strides are the widths of the matrices.
template <class T>
struct HeadGradient {
  const T* queries;
  const T* keys;
  const T* values;
  const T* dout;
  T* dq;
  T* dk;  // [rows, head_dim], of this head alone
  T* dv;
};

// Adds what the queries of one tile give; p and dp are scratch of tile.rows * tile.seen() values.
template <class T>
void add_tile(
    const Context& ctx,
    const AttentionShape& shape,
    const AttentionTile& tile,
    const HeadGradient<T>& head,
    T* p,
    T* dp) {
  const std::int64_t n = tile.rows;
  const std::int64_t seen = tile.seen();
  const std::int64_t dim = shape.head_dim;
  const std::int64_t q_width = shape.q_width();
  const std::int64_t kv_width = shape.kv_width();
  const T scale = T{1} / std::sqrt(static_cast<T>(dim));
  const T* Q = head.queries + tile.first * q_width;
  const T* K = head.keys + tile.begin * kv_width;
  const T* V = head.values + tile.begin * kv_width;
  const T* dout = head.dout + tile.first * q_width;
  T* dq = head.dq + tile.first * q_width;
  T* dk = head.dk + tile.begin * dim;
  T* dv = head.dv + tile.begin * dim;
  const Blas& blas = ctx.blas;

  blas.gemm(false, true, n, seen, dim, scale, Q, q_width, K, kv_width, T{0}, p, seen);
  causal_softmax(ctx, tile, p);
  blas.gemm(true, false, seen, dim, n, T{1}, p, seen, dout, q_width, T{1}, dv, dim);
  blas.gemm(false, true, n, seen, dim, T{1}, dout, q_width, V, kv_width, T{0}, dp, seen);
  for (std::int64_t r = 0; r < n; ++r) {
    softmax_backward(ctx, p + r * seen, seen, dp + r * seen);
  }
  blas.gemm(false, false, n, dim, seen, scale, dp, seen, K, kv_width, T{0}, dq, q_width);
  blas.gemm(true, false, seen, dim, n, scale, dp, seen, Q, q_width, T{1}, dk, dim);
}

// out [rows, kv_heads * head_dim]: the query heads of each group summed, in their order.
template <class T>
void sum_groups(
    const Context& ctx,
    const AttentionShape& shape,
    std::int64_t rows,
    const T* heads,  // [heads][rows, head_dim]
    T* out) {
  const std::int64_t dim = shape.head_dim;
  ctx.pool.for_chunks(rows, 64, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t t = begin; t < end; ++t) {
      for (std::int64_t h = 0; h < shape.heads; ++h) {
        const T* source = heads + (h * rows + t) * dim;
        T* target = out + t * shape.kv_width() + h / shape.group() * dim;
        for (std::int64_t i = 0; i < dim; ++i) {
          target[i] = h % shape.group() == 0 ? source[i] : target[i] + source[i];
        }
      }
    }
  });
}

}  // namespace

template <class T>
void attend_backward(
    const Context& ctx,
    const AttentionShape& shape,
    std::int64_t rows,
    const T* queries,
    const T* keys,
    const T* values,
    const T* dout,
    T* dq,
    T* dk,
    T* dv) {
  const std::int64_t dim = shape.head_dim;
  std::vector<T> dk_heads(static_cast<std::size_t>(rows * shape.q_width()));
  std::vector<T> dv_heads(dk_heads.size());
  ctx.pool.for_chunks(shape.heads, 1, [&](std::int64_t h, std::int64_t, int) {
    const std::int64_t kv = h / shape.group() * dim;
    const HeadGradient<T> head = {
        queries + h * dim,
        keys + kv,
        values + kv,
        dout + h * dim,
        dq + h * dim,
        dk_heads.data() + h * rows * dim,
        dv_heads.data() + h * rows * dim};
    const auto tile_values = static_cast<std::size_t>(std::min(kQueryRows, rows) * rows);
    const auto p = std::make_unique_for_overwrite<T[]>(tile_values);
    const auto dp = std::make_unique_for_overwrite<T[]>(tile_values);
    for (std::int64_t t = 0; t < rows; t += kQueryRows) {
      const AttentionTile tile = attention_tile(t, std::min(kQueryRows, rows - t), shape.window);
      add_tile(ctx, shape, tile, head, p.get(), dp.get());
    }
  });
  sum_groups(ctx, shape, rows, dk_heads.data(), dk);
  sum_groups(ctx, shape, rows, dv_heads.data(), dv);
}

template void attend_backward(
    const Context&,
    const AttentionShape&,
    std::int64_t,
    const float*,
    const float*,
    const float*,
    const float*,
    float*,
    float*,
    float*);
template void attend_backward(
    const Context&,
    const AttentionShape&,
    std::int64_t,
    const double*,
    const double*,
    const double*,
    const double*,
    double*,
    double*,
    double*);

}  // namespace quern
