// SPDX-License-Identifier: Apache-2.0
#include "nn/moe.h"

#include "kernels/kernels.h"
#include "nn/block.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>
#include <span>
#include <utility>

namespace quern {
Routing route(
    const Mixture& mixture, const float* scores, std::int64_t rows, float* probabilities) {
  const auto experts = static_cast<std::size_t>(mixture.experts);
  const auto taken = static_cast<std::size_t>(mixture.experts_per_token);
  std::vector<std::vector<std::pair<std::int64_t, float>>> by_expert(experts);
  std::vector<float> p(experts);
  std::vector<std::size_t> order(experts);
  Routing routing;
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::span<const float> s(scores + row * mixture.experts, experts);
    const float largest = *std::max_element(s.begin(), s.end());
    float sum = 0;
    for (std::size_t e = 0; e < experts; ++e) {
      p[e] = std::exp(s[e] - largest);
      sum += p[e];
    }
    for (float& value : p) {
      value /= sum;
    }
    if (probabilities != nullptr) {
      std::copy(p.begin(), p.end(), probabilities + row * mixture.experts);
    }
    std::iota(order.begin(), order.end(), std::size_t{0});
    const std::size_t sorted = std::min(taken + 1, experts);
    std::partial_sort(
        order.begin(),
        order.begin() + static_cast<std::ptrdiff_t>(sorted),
        order.end(),
        [&](std::size_t a, std::size_t b) { return p[a] != p[b] ? p[a] > p[b] : a < b; });
    if (taken < sorted && p[order[taken - 1]] - p[order[taken]] <= kRouterTie) {
      routing.ties.push_back(row);
    }
    float total = 0;
    for (std::size_t k = 0; k < taken; ++k) {
      total += p[order[k]];
    }
    for (std::size_t k = 0; k < taken; ++k) {
      const float weight = mixture.normalize ? p[order[k]] / total : p[order[k]];
      by_expert[order[k]].emplace_back(row, weight);
    }
  }
  routing.begin.push_back(0);
  for (const auto& entries : by_expert) {
    for (const auto& [row, weight] : entries) {
      routing.rows.push_back(row);
      routing.weights.push_back(weight);
    }
    routing.begin.push_back(static_cast<std::int64_t>(routing.rows.size()));
  }
  return routing;
}

Routing route_rows(
    const Context& ctx,
    Workspace& workspace,
    const Mixture& mixture,
    const BlockWeights& weights,
    const float* X,
    std::int64_t rows,
    float* probabilities) {
  std::vector<float> scores(static_cast<std::size_t>(rows * mixture.experts));
  linear_forward(
      ctx,
      workspace,
      weights.linears[static_cast<std::size_t>(mixture.router)],
      X,
      rows,
      scores.data());
  return route(mixture, scores.data(), rows, probabilities);
}

std::vector<float> expert_output(
    const Context& ctx,
    Workspace& workspace,
    const BlockWeights& weights,
    int first,
    const float* X,
    std::int64_t rows) {
  const LinearWeights& down = weights.linears[static_cast<std::size_t>(first) + 2];
  std::vector<float> hidden(static_cast<std::size_t>(rows * down.in_features));
  std::vector<float> up(hidden.size());
  mlp_hidden(ctx, workspace, weights, first, X, rows, hidden.data(), up.data(), hidden.data());
  std::vector<float> y(static_cast<std::size_t>(rows * down.out_features));
  linear_forward(ctx, workspace, down, hidden.data(), rows, y.data());
  return y;
}

void add_expert(
    const Context& ctx,
    Workspace& workspace,
    const Mixture& mixture,
    const BlockWeights& weights,
    int expert,
    const Routing& routing,
    const float* X,
    float* x) {
  if (!routing.takes(expert)) {
    return;
  }
  const auto begin = static_cast<std::size_t>(routing.begin[static_cast<std::size_t>(expert)]);
  const auto end = static_cast<std::size_t>(routing.begin[static_cast<std::size_t>(expert) + 1]);
  const int first = mixture.expert(expert);
  const std::int64_t hidden = weights.linears[static_cast<std::size_t>(first)].in_features;
  std::vector<float> gathered((end - begin) * static_cast<std::size_t>(hidden));
  for (std::size_t i = begin; i < end; ++i) {
    std::copy_n(
        X + routing.rows[i] * hidden,
        hidden,
        gathered.data() + (i - begin) * static_cast<std::size_t>(hidden));
  }
  const std::vector<float> y = expert_output(
      ctx, workspace, weights, first, gathered.data(), static_cast<std::int64_t>(end - begin));
  for (std::size_t i = begin; i < end; ++i) {
    ctx.kernels.axpy_f32(
        routing.weights[i],
        y.data() + (i - begin) * static_cast<std::size_t>(hidden),
        x + routing.rows[i] * hidden,
        hidden);
  }
}

void add_shared_expert(
    const Context& ctx,
    Workspace& workspace,
    const Mixture& mixture,
    const BlockWeights& weights,
    const float* X,
    std::int64_t rows,
    float* x) {
  if (mixture.shared_expert < 0) {
    return;
  }
  std::vector<float> share(static_cast<std::size_t>(rows));
  const LinearWeights& gate = weights.linears[static_cast<std::size_t>(mixture.shared_gate)];
  const std::int64_t hidden = gate.in_features;
  linear_forward(ctx, workspace, gate, X, rows, share.data());
  const std::vector<float> y =
      expert_output(ctx, workspace, weights, mixture.shared_expert, X, rows);
  for (std::int64_t row = 0; row < rows; ++row) {
    const float sigmoid = 1.0F / (1.0F + std::exp(-share[static_cast<std::size_t>(row)]));
    ctx.kernels.axpy_f32(sigmoid, y.data() + row * hidden, x + row * hidden, hidden);
  }
}

std::vector<std::int64_t> mixture_forward(
    const Context& ctx,
    Workspace& workspace,
    const Mixture& mixture,
    const BlockWeights& weights,
    const float* X,
    std::int64_t rows,
    float* x) {
  Routing routing = route_rows(ctx, workspace, mixture, weights, X, rows);
  for (int expert = 0; expert < mixture.experts; ++expert) {
    add_expert(ctx, workspace, mixture, weights, expert, routing, X, x);
  }
  add_shared_expert(ctx, workspace, mixture, weights, X, rows, x);
  return std::move(routing.ties);
}

}  // namespace quern
