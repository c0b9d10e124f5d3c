// SPDX-License-Identifier: Apache-2.0
#include "nn/linear.h"

#include "kernels/blas.h"
#include "kernels/kernels.h"
#include "nn/activation.h"

#include <algorithm>

namespace quern {
namespace {

// Rows of W widened at a time: 256 rows of 3072 floats are 3 MB, and packing x again for each tile
// costs 1/256 of the product.
constexpr std::int64_t kWeightRows = 256;
constexpr std::int64_t kTokenRows = 1024;
// Up to this many tokens a product is bound by reading the weights: dot products, no widened copy.
constexpr std::int64_t kFewTokens = 4;

void few_tokens(
    const Context& ctx,
    Workspace& workspace,
    const LinearWeights& weights,
    const float* x,
    std::int64_t rows,
    float* y) {
  const std::int64_t n = weights.in_features;
  const std::int64_t out = weights.out_features;
  const bool bf16 = !weights.quantized && weights.dense.dtype == DType::kBF16;
  ctx.pool.for_chunks(out, 64, [&](std::int64_t begin, std::int64_t end, int worker) {
    float* buffer = workspace.worker_floats(worker, 0, n);
    for (std::int64_t o = begin; o < end; ++o) {
      const float bias = weights.bias.empty() ? 0.0F : weights.bias[static_cast<std::size_t>(o)];
      if (bf16) {
        const auto* row =
            reinterpret_cast<const std::uint16_t*>(weights.dense.bytes.data()) + o * n;
        for (std::int64_t t = 0; t < rows; ++t) {
          y[t * out + o] = ctx.kernels.dot_bf16(x + t * n, row, n) + bias;
        }
        continue;
      }
      const float* row =
          weight_row(ctx.kernels, weights, o, workspace.worker_bytes(worker, n), buffer);
      for (std::int64_t t = 0; t < rows; ++t) {
        y[t * out + o] = ctx.kernels.dot_f32(x + t * n, row, n) + bias;
      }
    }
  });
}

}  // namespace

const float* weight_row(
    const KernelTable& kernels,
    const LinearWeights& weights,
    std::int64_t row,
    std::uint8_t* scratch,
    float* buffer) {
  const std::int64_t n = weights.in_features;
  if (weights.quantized) {
    const auto size = static_cast<std::size_t>(n);
    weights.quantized->dequantize_row(kernels, row, {scratch, size}, {buffer, size});
    return buffer;
  }
  const std::byte* bytes = weights.dense.bytes.data();
  const std::int64_t offset = row * n;
  switch (weights.dense.dtype) {
    case DType::kBF16:
      kernels.bf16_to_f32(reinterpret_cast<const std::uint16_t*>(bytes) + offset, buffer, n);
      return buffer;
    case DType::kF16:
      kernels.f16_to_f32(reinterpret_cast<const std::uint16_t*>(bytes) + offset, buffer, n);
      return buffer;
    default: return reinterpret_cast<const float*>(bytes) + offset;
  }
}

void linear_forward(
    const Context& ctx,
    Workspace& workspace,
    const LinearWeights& weights,
    const float* x,
    std::int64_t rows,
    float* y) {
  if (weights.activation.active()) {
    std::vector<float> rounded(x, x + rows * weights.in_features);
    round_activations(ctx, weights.activation, rounded.data(), rows, weights.in_features);
    LinearWeights plain = weights;
    plain.activation = {};
    linear_forward(ctx, workspace, plain, rounded.data(), rows, y);
    return;
  }
  if (rows <= kFewTokens) {
    few_tokens(ctx, workspace, weights, x, rows, y);
    return;
  }
  const std::int64_t n = weights.in_features;
  const std::int64_t out = weights.out_features;
  const std::int64_t token_tiles = (rows + kTokenRows - 1) / kTokenRows;
  const std::int64_t weight_tiles = (out + kWeightRows - 1) / kWeightRows;
  ctx.pool.for_chunks(
      token_tiles * weight_tiles, 1, [&](std::int64_t tile, std::int64_t, int worker) {
        const std::int64_t o = tile / token_tiles * kWeightRows;
        const std::int64_t t = tile % token_tiles * kTokenRows;
        const std::int64_t tile_out = std::min(kWeightRows, out - o);
        const std::int64_t tile_rows = std::min(kTokenRows, rows - t);
        float* buffer = workspace.worker_floats(worker, 0, tile_out * n);
        const float* W = buffer;
        if (!weights.quantized && weights.dense.dtype == DType::kF32) {
          W = reinterpret_cast<const float*>(weights.dense.bytes.data()) + o * n;
        } else {
          std::uint8_t* scratch = workspace.worker_bytes(worker, n);
          for (std::int64_t r = 0; r < tile_out; ++r) {
            (void)weight_row(ctx.kernels, weights, o + r, scratch, buffer + r * n);
          }
        }
        float* target = y + t * out + o;
        ctx.blas.gemm(
            false, true, tile_rows, tile_out, n, 1.0F, x + t * n, n, W, n, 0.0F, target, out);
        if (!weights.bias.empty()) {
          for (std::int64_t r = 0; r < tile_rows; ++r) {
            for (std::int64_t c = 0; c < tile_out; ++c) {
              target[r * out + c] += weights.bias[static_cast<std::size_t>(o + c)];
            }
          }
        }
      });
}

}  // namespace quern
