// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "quant/method.h"

#include <memory>
#include <vector>

namespace quern {

// Round to nearest, methods.md 1.4. With kWeighted and usable statistics the range is weighted by
// diag(H), without statistics by 1; kOutput without statistics is kWeighted. The report's errors
// are on H when there is a usable one.
[[nodiscard]] LinearResult quantize_rtn(
    const Context& ctx, const LinearProblem& problem, const MethodOptions& options);

// Throws what is wrong with the problem or the options: sizes that disagree (Error), a grid or
// damping out of range (UsageError), weights that are not finite (ParseError).
void check_problem(
    const LinearProblem& problem, const MethodOptions& options, int min_bits = 2, int max_bits = 8);

// The matrix alone, ranges weighted by `importance` [in_features].
[[nodiscard]] std::shared_ptr<const QuantizedMatrix> round_to_nearest(
    const Context& ctx,
    const LinearProblem& problem,
    const MethodOptions& options,
    const std::vector<float>& importance);

}  // namespace quern
