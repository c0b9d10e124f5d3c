// SPDX-License-Identifier: Apache-2.0
#include "nn/linear.h"

#include "base/checked.h"
#include "kernels/blas.h"
#include "kernels/kernels.h"
#include "quant/activation.h"

#include <algorithm>

namespace quern {
namespace {

// Rows of W widened at a time: 256 rows of 3072 floats are 3 MB, and packing x again for each tile
// costs 1/256 of the product.
constexpr std::int64_t kWeightRows = 256;
constexpr std::int64_t kTokenRows = 1024;
// Rows of W, which is the inner size of the product, widened at a time for all workers.
constexpr std::int64_t kStripeRows = 512;
constexpr std::int64_t kStripeColumns = 256;

// W as the file holds it, when that is floats already; else null.
const float* mapped_floats(const LinearWeights& weights) {
  return !weights.quantized && weights.dense.dtype == DType::kF32
             ? reinterpret_cast<const float*>(weights.dense.bytes.data())
             : nullptr;
}

// Rows [first, first + count) of W as floats, for all workers; valid until the next call.
const float* weight_stripe(
    const Context& ctx,
    Workspace& workspace,
    const LinearWeights& weights,
    std::int64_t first,
    std::int64_t count) {
  const std::int64_t n = weights.in_features;
  if (const float* mapped = mapped_floats(weights); mapped != nullptr) {
    return mapped + first * n;
  }
  float* stripe = workspace.shared_floats(count * n);
  ctx.pool.for_chunks(count, 16, [&](std::int64_t begin, std::int64_t end, int worker) {
    std::uint8_t* scratch = workspace.worker_bytes(worker, n);
    for (std::int64_t r = begin; r < end; ++r) {
      (void)weight_row(ctx.kernels, weights, first + r, scratch, stripe + r * n);
    }
  });
  return stripe;
}

// Dot products, and no widened copy of the weights.
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
  const std::int64_t token_tiles = ceil_div(rows, kTokenRows);
  const std::int64_t weight_tiles = ceil_div(out, kWeightRows);
  ctx.pool.for_chunks(
      token_tiles * weight_tiles, 1, [&](std::int64_t tile, std::int64_t, int worker) {
        const std::int64_t o = tile / token_tiles * kWeightRows;
        const std::int64_t t = tile % token_tiles * kTokenRows;
        const std::int64_t tile_out = std::min(kWeightRows, out - o);
        const std::int64_t tile_rows = std::min(kTokenRows, rows - t);
        const float* W = mapped_floats(weights);
        if (W != nullptr) {
          W += o * n;
        } else {
          float* buffer = workspace.worker_floats(worker, 0, tile_out * n);
          W = buffer;
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

std::int64_t linear_tile_floats(std::int64_t in_features) {
  return kWeightRows * in_features;
}

std::int64_t linear_stripe_floats(std::int64_t in_features) {
  return kStripeRows * in_features;
}

void linear_backward_input(
    const Context& ctx,
    Workspace& workspace,
    const LinearWeights& weights,
    const float* dy,
    std::int64_t rows,
    bool accumulate,
    float* dx) {
  const std::int64_t n = weights.in_features;
  const std::int64_t out = weights.out_features;
  const std::int64_t token_tiles = ceil_div(rows, kTokenRows);
  const std::int64_t column_tiles = ceil_div(n, kStripeColumns);
  for (std::int64_t o = 0; o < out; o += kStripeRows) {
    const std::int64_t stripe = std::min(kStripeRows, out - o);
    const float* W = weight_stripe(ctx, workspace, weights, o, stripe);
    const float keep = accumulate || o > 0 ? 1.0F : 0.0F;
    ctx.pool.for_chunks(token_tiles * column_tiles, 1, [&](std::int64_t tile, std::int64_t, int) {
      const std::int64_t t = tile % token_tiles * kTokenRows;
      const std::int64_t c = tile / token_tiles * kStripeColumns;
      ctx.blas.gemm(
          false,
          false,
          std::min(kTokenRows, rows - t),
          std::min(kStripeColumns, n - c),
          stripe,
          1.0F,
          dy + t * out + o,
          out,
          W + c,
          n,
          keep,
          dx + t * n + c,
          n);
    });
  }
}

}  // namespace quern
