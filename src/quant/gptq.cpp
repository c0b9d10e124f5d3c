// SPDX-License-Identifier: Apache-2.0
#include "quant/gptq.h"

#include "quant/error_feedback.h"

namespace quern {

LinearResult quantize_gptq(
    const Context& ctx, const LinearProblem& problem, const MethodOptions& options) {
  return quantize_with_feedback(ctx, problem, options, "gptq");
}

}  // namespace quern
