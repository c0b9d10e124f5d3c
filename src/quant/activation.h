// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/context.h"
#include "base/json.h"
#include "quant/scheme.h"

#include <cstdint>
#include <span>

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

// The scheme with the static scale that holds all of `abs_max` [width], the largest |x| of each
// input over the calibration; dynamic schemes as they are.
[[nodiscard]] ActivationScheme with_static_scale(
    ActivationScheme scheme, std::span<const float> abs_max);

// {"bits", "dynamic", "scale"?}; a static scale that is not known yet is left out.
[[nodiscard]] Json activation_json(const ActivationScheme& scheme);
// Throws ParseError for widths other than 2 to 8 and scales that are no positive number; with
// `needs_scale`, also for static schemes without a scale.
[[nodiscard]] ActivationScheme read_activation(const JsonReader& reader, bool needs_scale = false);

}  // namespace quern
