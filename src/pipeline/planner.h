// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "pipeline/quantize.h"

namespace quern {

// GASQ: gradient-aware sensitivities, allocation under a budget. Changes run.plan, in which
// all linears are alike, and fills run.planning; source, graph and format are there already. One
// backward pass over a few calibration sequences scores every option of every linear
// (plan/sensitivity.h), allocate() chooses, and a forward pass of allocations near the chosen one
// checks that losses add up.
//
// Throws UsageError, naming the smallest possible one, for a budget below what the fewest bits
// take; the errors of its parts.
void plan_for_budget(const Context& ctx, const QuantizeOptions& options, PreparedRun& run);

}  // namespace quern
