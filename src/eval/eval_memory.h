// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/context.h"
#include "model/graph.h"
#include "tensor/checkpoint.h"

#include <cstdint>
#include <span>

namespace quern {

// Whether models are loaded as a whole or read block by block.
enum class Streaming {
  kAuto,  // block by block when the models, mapped pages included, exceed the memory budget
  kOn,
  kOff,
};

struct EvalSide {
  const ModelGraph& graph;
  const Checkpoint& checkpoint;
};

// How an evaluation keeps within its memory.
struct EvalMemory {
  bool streamed = false;
  bool spilled = false;  // rows of all windows wait on disk
  std::int64_t group = 1;  // windows that pass the experts of a block together
  std::uint64_t spilled_bytes = 0;
  std::uint64_t peak = 0;  // anonymous memory, estimated from shapes
};

// Decides for `windows` windows of `context` tokens through all `sides` (the model, and its
// reference). Counts what the process holds by now. Throws ResourceError, naming the smallest
// budget, when ctx.memory_budget (0: no limit) does not suffice.
[[nodiscard]] EvalMemory plan_eval_memory(
    const Context& ctx,
    std::span<const EvalSide> sides,
    std::int64_t windows,
    std::int64_t context,
    Streaming streaming);

}  // namespace quern
