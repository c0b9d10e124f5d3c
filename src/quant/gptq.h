// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "quant/method.h"

namespace quern {

// GPTQ (arXiv 2210.17323; methods.md 2.3): error feedback towards problem.goal(), with what
// error_feedback.h does around it.
[[nodiscard]] LinearResult quantize_gptq(
    const Context& ctx, const LinearProblem& problem, const MethodOptions& options);

}  // namespace quern
