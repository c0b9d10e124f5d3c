// SPDX-License-Identifier: Apache-2.0
#include "nn/block_stream.h"

#include <algorithm>
#include <cstddef>
#include <span>
#include <utility>

namespace quern {
namespace {

// Multiply-adds of a token in the linears of a mixture, over those of the whole block.
double mixture_share(const Block& block) {
  const Mixture& mixture = *block.mixture;
  double mixer = 0;
  double experts = 0;
  for (std::size_t i = 0; i < block.linears.size(); ++i) {
    const auto work = static_cast<double>(block.linears[i].parameters());
    const auto index = static_cast<int>(i);
    if (index < mixture.router) {
      mixer += work;
    } else {
      const bool routed = index >= mixture.first_expert;
      experts += routed ? work * mixture.experts_per_token / mixture.experts : work;
    }
  }
  return experts / (mixer + experts);
}

}  // namespace

void advance_sequences(
    const Context& ctx,
    Workspace& workspace,
    const ModelConfig& config,
    const Block& block,
    const BlockWeights& weights,
    ActivationStore& from,
    ActivationStore& to,
    const std::function<void(std::int64_t sequence)>& passed) {
  std::vector<float> buffer;
  for (std::int64_t i = 0; i < from.count(); ++i) {
    float* x = nullptr;
    if (&from == &to) {
      x = to.values(i, buffer);
    } else {
      buffer.resize(static_cast<std::size_t>(from.rows(i) * from.width()));
      from.read(i, buffer.data());
      x = buffer.data();
    }
    LayerCache cache;
    block_forward(ctx, workspace, config, block, weights, from.rows(i), cache, x);
    to.write(i, x);
    passed(i);
  }
}

BlockStream::BlockStream(
    const Context& ctx,
    const ModelGraph& graph,
    const Checkpoint& checkpoint,
    std::int64_t group,
    std::function<void(double part)> passed)
    : ctx_(ctx),
      graph_(graph),
      checkpoint_(checkpoint),
      group_(group),
      passed_(std::move(passed)),
      workspace_(ctx) {}

void BlockStream::run(ActivationStore& x) {
  prefetch_block_weights(graph_.blocks.front(), checkpoint_, false);
  for (std::size_t i = 0; i < graph_.blocks.size(); ++i) {
    const Block& block = graph_.blocks[i];
    BlockWeights weights = load_block_weights(block, checkpoint_, false);
    if (i + 1 < graph_.blocks.size()) {
      prefetch_block_weights(graph_.blocks[i + 1], checkpoint_, false);
    }
    if (block.mixture) {
      run_mixture(block, weights, x);
    } else {
      const double part = 1.0 / static_cast<double>(x.count());
      advance_sequences(ctx_, workspace_, graph_.config, block, weights, x, x, [&](std::int64_t) {
        passed_(part);
      });
    }
    release_block_weights(block, checkpoint_);
  }
}

void BlockStream::run_mixture(const Block& block, BlockWeights& weights, ActivationStore& x) {
  const Mixture& mixture = *block.mixture;
  const double share = mixture_share(block);
  for (std::int64_t first = 0; first < x.count(); first += group_) {
    prefetch_expert(block, 0);
    std::vector<Waiting> group(static_cast<std::size_t>(std::min(group_, x.count() - first)));
    for (std::size_t i = 0; i < group.size(); ++i) {
      Waiting& each = group[i];
      const std::int64_t sequence = first + static_cast<std::int64_t>(i);
      const std::int64_t rows = x.rows(sequence);
      each.x = x.values(sequence, each.buffer);
      LayerCache cache;
      forward_to_site(
          ctx_, workspace_, graph_.config, block, weights, kMlpInput, rows, cache, each.x, each.X);
      each.X.shrink_to_fit();  // it was scratch of wider sites
      each.routing = route_rows(ctx_, workspace_, mixture, weights, each.X.data(), rows);
      passed_((1 - share) / static_cast<double>(x.count()));
    }
    run_experts(
        block,
        weights,
        group,
        share * static_cast<double>(group.size()) / static_cast<double>(x.count()));
    for (std::size_t i = 0; i < group.size(); ++i) {
      const std::int64_t sequence = first + static_cast<std::int64_t>(i);
      const Waiting& each = group[i];
      add_shared_expert(
          ctx_, workspace_, mixture, weights, each.X.data(), x.rows(sequence), each.x);
      x.write(sequence, each.x);
    }
  }
}

void BlockStream::run_experts(
    const Block& block, BlockWeights& weights, const std::vector<Waiting>& group, double part) {
  const Mixture& mixture = *block.mixture;
  std::vector<int> taken;
  for (int expert = 0; expert < mixture.experts; ++expert) {
    if (std::any_of(group.begin(), group.end(), [&](const Waiting& each) {
          return each.routing.takes(expert);
        })) {
      taken.push_back(expert);
    }
  }
  for (std::size_t i = 0; i < taken.size(); ++i) {
    if (i + 1 < taken.size()) {
      prefetch_expert(block, taken[i + 1]);
    }
    const auto begin = static_cast<std::size_t>(mixture.expert(taken[i]));
    for (std::size_t linear = begin; linear < begin + 3; ++linear) {
      weights.linears[linear] = load_linear_weights(block.linears[linear], checkpoint_);
    }
    for (const Waiting& each : group) {
      add_expert(ctx_, workspace_, mixture, weights, taken[i], each.routing, each.X.data(), each.x);
    }
    for (std::size_t linear = begin; linear < begin + 3; ++linear) {
      weights.linears[linear] = {};
      release_linear_weights(block.linears[linear], checkpoint_);
    }
    passed_(part / static_cast<double>(taken.size()));
  }
}

void BlockStream::prefetch_expert(const Block& block, int expert) const {
  const auto begin = static_cast<std::size_t>(block.mixture->expert(expert));
  for (std::size_t linear = begin; linear < begin + 3; ++linear) {
    prefetch_linear_weights(block.linears[linear], checkpoint_);
  }
}

}  // namespace quern
