// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "nn/weights.h"
#include "nn/workspace.h"

namespace quern {

// Up to this many tokens a product is bound by reading the weights, and every row of the result is,
// bit for bit, what it is alone. The same holds for a block (block.h).
inline constexpr std::int64_t kFewTokens = 4;

// y[rows, out] = x[rows, in] W^T + b in float; x and y contiguous. Weights are widened (or
// dequantized) tile by tile, never as a whole. Same result for any thread count.
void linear_forward(
    const Context& ctx,
    Workspace& workspace,
    const LinearWeights& weights,
    const float* x,
    std::int64_t rows,
    float* y);

// Floats of workspace that it takes for each worker when weights are not floats.
[[nodiscard]] std::int64_t linear_tile_floats(std::int64_t in_features);

// Row `row` of W as floats: a pointer into the file for F32, else `buffer` [in], filled. `scratch`
// [in].
[[nodiscard]] const float* weight_row(
    const KernelTable& kernels,
    const LinearWeights& weights,
    std::int64_t row,
    std::uint8_t* scratch,
    float* buffer);

// The gradient at the input: dx[rows, in] = dy[rows, out] W, or += with `accumulate`. Weights are
// widened stripe by stripe; rounding of activations counts as the identity (straight-through). Same
// result for any thread count.
void linear_backward_input(
    const Context& ctx,
    Workspace& workspace,
    const LinearWeights& weights,
    const float* dy,
    std::int64_t rows,
    bool accumulate,
    float* dx);

// Floats of workspace that it takes for weights that are not floats.
[[nodiscard]] std::int64_t linear_stripe_floats(std::int64_t in_features);

}  // namespace quern
