// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "model/graph.h"
#include "quant/scaling.h"

#include <vector>

namespace quern {

// The channels of a site as the transforms of quant/scaling.h take them: which of them must have
// one factor, and what their producer can be divided by. `consumers` are the linears of the site.
[[nodiscard]] ScalingProblem scaling_problem(
    const Block& block, int site, const SiteStats& stats, std::vector<ScalingConsumer> consumers);

}  // namespace quern
