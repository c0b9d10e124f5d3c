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

  [[nodiscard]] bool takes(int expert) const {
    return begin[static_cast<std::size_t>(expert)] < begin[static_cast<std::size_t>(expert) + 1];
  }
};
inline constexpr float kRouterTie = 1e-6F;  // of a probability

// The experts with the largest probabilities, softmax over all of `scores` [rows, experts]; the
// first of equals. `probabilities`, if not null, receives the softmax [rows, experts].
[[nodiscard]] Routing route(
    const Mixture& mixture, const float* scores, std::int64_t rows, float* probabilities = nullptr);

// The parts of mixture_forward, for callers that take experts one after the other: where the rows
// of X [rows, hidden] go; y [rows, hidden] of the expert whose gate_proj is linear `first`;
// x [rows, hidden] += what one expert makes of the rows that it takes, and += what the shared
// expert, if there is one, makes of all.
[[nodiscard]] Routing route_rows(
    const Context& ctx,
    Workspace& workspace,
    const Mixture& mixture,
    const BlockWeights& weights,
    const float* X,
    std::int64_t rows,
    float* probabilities = nullptr);
[[nodiscard]] std::vector<float> expert_output(
    const Context& ctx,
    Workspace& workspace,
    const BlockWeights& weights,
    int first,
    const float* X,
    std::int64_t rows);
void add_expert(
    const Context& ctx,
    Workspace& workspace,
    const Mixture& mixture,
    const BlockWeights& weights,
    int expert,
    const Routing& routing,
    const float* X,
    float* x);
void add_shared_expert(
    const Context& ctx,
    Workspace& workspace,
    const Mixture& mixture,
    const BlockWeights& weights,
    const float* X,
    std::int64_t rows,
    float* x);

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
