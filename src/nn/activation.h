// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/context.h"
#include "quant/scheme.h"

#include <cstdint>

namespace quern {

// Rounds X [rows, width] in place to the integers of `scheme` times their scale: what an engine
// with integer products computes, up to the rounding of its sums. Dynamic scales are max(|x|, 1e-5)
// / (2^(bits-1)-1) of each row (SmoothQuant's absmax; methods.md 5).
void round_activations(
    const Context& ctx,
    const ActivationScheme& scheme,
    float* X,
    std::int64_t rows,
    std::int64_t width);

}  // namespace quern
