// SPDX-License-Identifier: Apache-2.0
#include "plan/site_scaling.h"

#include <cstddef>
#include <utility>

namespace quern {

ScalingProblem scaling_problem(
    const Block& block, int site, const SiteStats& stats, std::vector<ScalingConsumer> consumers) {
  const CalibrationSite& place = block.sites[static_cast<std::size_t>(site)];
  ScalingProblem problem;
  problem.stats = &stats;
  problem.consumers = std::move(consumers);
  problem.unit_of = place.producer_rows;
  problem.powers_of_two =
      place.producer >= 0 && block.linears[static_cast<std::size_t>(place.producer)].has_bias;
  return problem;
}

}  // namespace quern
