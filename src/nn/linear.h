// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "nn/weights.h"
#include "nn/workspace.h"

namespace quern {

// y[rows, out] = x[rows, in] W^T + b in float; x and y contiguous. Weights are widened (or
// dequantized) tile by tile, never as a whole. Same result for any thread count.
void linear_forward(
    const Context& ctx,
    Workspace& workspace,
    const LinearWeights& weights,
    const float* x,
    std::int64_t rows,
    float* y);

}  // namespace quern
