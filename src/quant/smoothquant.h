// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "quant/scaling.h"

namespace quern {

// SmoothQuant (arXiv 2211.10438; methods.md 5): factors s_j = max(a_j^alpha / w_j^(1-alpha), 1e-5)
// with a_j the largest |x_j| of the calibration and w_j the largest |W_ij| of all consumers (both
// the largest of a unit). alpha is chosen for the site, out of 0.3 … 0.9 and "no factors", by the
// error that the sampled rows show behind the consumers: activations and weights both rounded as
// they will be, relative to each consumer's output.
[[nodiscard]] ScalingResult find_smoothquant(
    const Context& ctx, const ScalingProblem& problem, const MethodOptions& options);

}  // namespace quern
