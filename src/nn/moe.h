// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "nn/linear.h"
#include "nn/weights.h"

#include <cstdint>
#include <vector>

namespace quern {

// Which experts each row takes. Entries are sorted by expert, rows of one expert rising.
struct Routing {
  std::vector<std::int64_t> begin;  // [experts + 1] where the entries of an expert begin
  std::vector<std::int64_t> rows;  // [rows * experts_per_token]
  std::vector<float> weights;  // what an expert's output is multiplied by
  // Rows whose last chosen and first left-out expert are within kRouterTie of each other: rounding
  // decides, and another engine may decide otherwise.
  std::vector<std::int64_t> ties;
};
inline constexpr float kRouterTie = 1e-6F;  // of a probability

// The experts with the largest probabilities, softmax over all of `scores` [rows, experts]; the
// first of equals. `probabilities`, if not null, receives the softmax [rows, experts].
[[nodiscard]] Routing route(
    const Mixture& mixture, const float* scores, std::int64_t rows, float* probabilities = nullptr);

// x [rows, hidden] += the mixture's output for X [rows, hidden]: experts in their order, each on
// the rows that take it, then the shared expert. Gives the routing's ties.
std::vector<std::int64_t> mixture_forward(
    const Context& ctx,
    Workspace& workspace,
    const Mixture& mixture,
    const BlockWeights& weights,
    const float* X,
    std::int64_t rows,
    float* x);

}  // namespace quern
