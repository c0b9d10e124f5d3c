// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/context.h"
#include "model/graph.h"
#include "plan/quant_plan.h"
#include "quant/method.h"

#include <cstdint>

namespace quern {

// What a run will take, from shapes alone.
struct Estimate {
  // Bytes of anonymous memory, by purpose; methods.md 13 and style-anchors "Memory".
  std::uint64_t weights = 0;  // one linear in float, with the solver's copies
  std::uint64_t statistics = 0;  // second moments of the widest site, and their factors
  std::uint64_t residual = 0;  // residual stream of all sequences; 0 when spilled
  std::uint64_t experts = 0;  // rows of some experts of a mixture
  std::uint64_t carried = 0;  // what a block carries between sites; 0 when spilled
  std::uint64_t scratch = 0;  // one sequence in flight, tiles, program
  bool spill_residual = false;
  bool spill_carried = false;
  std::uint64_t spilled = 0;  // bytes on disk instead
  double work = 0;  // multiply-adds
  double seconds = 0;  // work over the measured rate

  [[nodiscard]] std::uint64_t peak() const {
    return weights + statistics + residual + carried + experts + scratch;
  }
};

// Decides what is spilled so that the peak fits ctx.memory_budget (0: no budget). Throws
// ResourceError, naming the smallest budget, when even spilling everything does not fit.
[[nodiscard]] Estimate estimate_run(
    const Context& ctx,
    const ModelGraph& graph,
    const QuantPlan& plan,
    const MethodOptions& options,
    std::int64_t samples,
    std::int64_t length,
    bool calibrated);

// Multiply-adds per second of dense products on this pool, measured for about a fifth of a second.
[[nodiscard]] double measure_rate(const Context& ctx);
// The same of one core, per CPU second: what other jobs on the machine take does not count.
[[nodiscard]] double measure_core_rate(const Context& ctx);

}  // namespace quern
