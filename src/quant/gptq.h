// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "quant/method.h"

namespace quern {

// GPTQ (arXiv 2210.17323; methods.md 2.2 to 2.6): error feedback in a chosen column order, then
// coordinate descent and scale refit. Falls back to RTN, and says why in the report, when the
// statistics cannot be used, when no damping makes them positive definite, or when the result is
// worse than RTN on the held-out rows.
[[nodiscard]] LinearResult quantize_gptq(
    const Context& ctx, const LinearProblem& problem, const MethodOptions& options);

}  // namespace quern
