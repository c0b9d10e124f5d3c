// SPDX-License-Identifier: Apache-2.0
#include "eval/eval_memory.h"

#include "base/error.h"
#include "base/process.h"
#include "base/units.h"
#include "nn/forward_memory.h"

#include <fmt/format.h>

#include <algorithm>
#include <string>

namespace quern {
namespace {

// What the first products bring along: BLAS buffers, stacks of the pool.
constexpr std::uint64_t kProgramBytes = std::uint64_t{24} << 20U;

// Bytes that one model takes.
struct SideMemory {
  std::uint64_t window = 0;  // rows of the residual stream
  std::uint64_t waiting = 0;  // of a window before experts, beside those rows
  std::uint64_t loaded = 0;  // the whole model
  std::uint64_t mapped = 0;  // pages of the files
  std::uint64_t forward = 0;  // a window in flight
  std::uint64_t stream = 0;  // that and the weights of the block that it is in
  std::uint64_t embedding = 0;
  std::uint64_t head = 0;
  std::uint64_t logits = 0;
};

SideMemory side_memory(const Context& ctx, const EvalSide& side, std::int64_t context) {
  const ModelConfig& config = side.graph.config;
  const auto u = [](std::int64_t value) { return static_cast<std::uint64_t>(value); };
  SideMemory memory;
  memory.window = u(context * config.hidden_size) * sizeof(float);
  for (const Block& block : side.graph.blocks) {
    const int routed_from =
        block.mixture ? block.mixture->first_expert : static_cast<int>(block.linears.size());
    std::uint64_t together = 0;
    std::uint64_t routed = 0;
    std::uint64_t largest = 0;
    for (std::size_t i = 0; i < block.linears.size(); ++i) {
      const std::uint64_t bytes = loaded_linear_memory(block.linears[i], side.checkpoint);
      if (static_cast<int>(i) < routed_from) {
        together += bytes;
      } else {
        routed += bytes;
        largest = std::max(largest, bytes);
      }
    }
    const std::uint64_t forward = block_forward_memory(ctx, config, block, context);
    memory.loaded += together + routed;
    memory.forward = std::max(memory.forward, forward);
    memory.stream = std::max(memory.stream, forward + together + 3 * largest);
    if (block.mixture) {
      const std::uint64_t entry = sizeof(std::int64_t) + sizeof(float);
      memory.waiting = memory.window + u(context) * u(config.mixture->experts_per_token) * entry +
                       u(config.mixture->experts) * sizeof(std::int64_t);
    }
  }
  memory.embedding = loaded_linear_memory(side.graph.embedding, side.checkpoint);
  memory.head = loaded_linear_memory(side.graph.head, side.checkpoint);
  memory.loaded += memory.embedding + (side.graph.head_tied ? 0 : memory.head);
  memory.logits = logits_memory(ctx, config, context);
  for (const auto& [name, view] : side.checkpoint.tensors().tensors()) {
    memory.mapped += view.bytes.size();
  }
  return memory;
}

// Of all sides together.
struct Needs {
  std::uint64_t base = 0;  // what is there, and what comes with the first product
  std::uint64_t resident = 0;
  std::uint64_t mapped = 0;
  std::uint64_t streamed = 0;  // without any rows of windows
  std::uint64_t all_windows = 0;  // rows of one window, all sides
  std::uint64_t window = 0;  // the largest of one side
  std::uint64_t waiting = 0;

  [[nodiscard]] std::uint64_t in_memory(std::int64_t windows, std::int64_t group) const {
    return base + streamed + static_cast<std::uint64_t>(windows) * all_windows +
           static_cast<std::uint64_t>(group) * waiting;
  }
  // Rows of a window stand in a buffer of their own while they are worked on.
  [[nodiscard]] std::uint64_t spilled(std::int64_t group) const {
    const auto waits = static_cast<std::uint64_t>(group);
    return base + streamed + std::max(waiting > 0 ? waits * (window + waiting) : 0, all_windows);
  }
};

Needs needs_of(const Context& ctx, std::span<const EvalSide> sides, std::int64_t context) {
  Needs needs;
  needs.base = process_usage().anonymous_bytes + kProgramBytes;
  std::uint64_t head_phase = 0;
  std::int64_t vocabulary = 0;
  for (const EvalSide& side : sides) {
    const SideMemory memory = side_memory(ctx, side, context);
    needs.resident += memory.loaded + memory.forward + memory.window + memory.logits;
    needs.mapped += memory.mapped;
    needs.all_windows += memory.window;
    needs.window = std::max(needs.window, memory.window);
    needs.waiting = std::max(needs.waiting, memory.waiting);
    needs.streamed = std::max({needs.streamed, memory.stream, memory.embedding + memory.window});
    head_phase += memory.head + memory.logits;
    vocabulary = side.graph.config.vocab_size;
  }
  const std::uint64_t probabilities =
      sides.size() > 1 ? static_cast<std::uint64_t>(ctx.pool.size() * vocabulary) * sizeof(float)
                       : 0;
  needs.resident += needs.base + probabilities;
  needs.streamed = std::max(needs.streamed, head_phase + probabilities);
  return needs;
}

[[noreturn]] void throw_too_little(
    std::uint64_t budget, std::uint64_t needed, const std::string& how, const std::string& other) {
  // What the process holds differs a little from run to run.
  constexpr std::uint64_t kMargin = std::uint64_t{4} << 20U;
  throw ResourceError(
      "not enough memory for this evaluation",
      "--memory " + human_bytes(static_cast<double>(budget)),
      fmt::format("at least {} are needed {}", human_bytes(static_cast<double>(needed)), how),
      fmt::format("--memory {}MiB, {}", (needed + kMargin) >> 20U, other));
}

}  // namespace

EvalMemory plan_eval_memory(
    const Context& ctx,
    std::span<const EvalSide> sides,
    std::int64_t windows,
    std::int64_t context,
    Streaming streaming) {
  const Needs needs = needs_of(ctx, sides, context);
  const std::uint64_t budget = ctx.memory_budget == 0 ? UINT64_MAX : ctx.memory_budget;
  const std::uint64_t whole = needs.resident + needs.mapped;
  EvalMemory memory;
  memory.streamed =
      streaming == Streaming::kOn || (streaming == Streaming::kAuto && whole > budget);
  if (!memory.streamed) {
    memory.peak = needs.resident;
    if (memory.peak > budget) {
      throw_too_little(budget, memory.peak, "with the model in memory", "or --stream on");
    }
    return memory;
  }
  memory.group = windows;
  memory.peak = needs.in_memory(windows, windows);
  if (memory.peak <= budget) {
    return memory;
  }
  memory.spilled = needs.spilled(1) <= needs.in_memory(windows, 1);
  const auto peak = [&] {
    return memory.spilled ? needs.spilled(memory.group) : needs.in_memory(windows, memory.group);
  };
  while (memory.group > 1 && peak() > budget) {
    --memory.group;
  }
  memory.peak = peak();
  if (memory.peak > budget) {
    // A small model may need less as a whole than the rows that wait for its experts.
    const bool whole_is_less = streaming == Streaming::kAuto && whole < memory.peak;
    throw_too_little(
        budget,
        whole_is_less ? whole : memory.peak,
        whole_is_less ? "with the model in memory" : "with everything else on disk",
        "or a smaller --context");
  }
  memory.spilled_bytes =
      memory.spilled ? static_cast<std::uint64_t>(windows) * needs.all_windows : 0;
  return memory;
}

}  // namespace quern
