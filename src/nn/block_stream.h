// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "nn/activation_store.h"
#include "nn/block.h"
#include "nn/moe.h"

#include <cstdint>
#include <functional>
#include <vector>

namespace quern {

// Takes every sequence of `from` through a block whose weights are in memory, to `to`, which may be
// the same store. `passed` is called after each; it may throw to stop.
void advance_sequences(
    const Context& ctx,
    Workspace& workspace,
    const ModelConfig& config,
    const Block& block,
    const BlockWeights& weights,
    ActivationStore& from,
    ActivationStore& to,
    const std::function<void(std::int64_t sequence)>& passed);

// Many sequences through a checkpoint that need not fit in memory: the weights of a block are read
// from the mapped files, used for all sequences, and their pages given back, while the next ones
// are read ahead. Experts of a mixture come and go one by one, so that neither memory nor pages
// grow with their number. Every sequence goes through the calls that Decoder::forward makes for it,
// so the values are the same to the last bit.
class BlockStream {
 public:
  // `group`: sequences (at least one) that wait together while the experts of a mixture pass; every
  // expert is read once for each group. `passed` is told which part of a block's work was done
  // since the last call; it may throw to stop.
  BlockStream(
      const Context& ctx,
      const ModelGraph& graph,
      const Checkpoint& checkpoint,
      std::int64_t group,
      std::function<void(double part)> passed);

  // Moves x from the input of the first block to the output of the last.
  void run(ActivationStore& x);

 private:
  // A sequence on its way through a mixture.
  struct Waiting {
    std::vector<float> buffer;  // behind x when that is not in memory
    float* x = nullptr;  // [rows, hidden]
    std::vector<float> X;  // [rows, hidden] what enters the experts
    Routing routing;
  };

  void run_mixture(const Block& block, BlockWeights& weights, ActivationStore& x);
  // `part`: of the block's work.
  void run_experts(
      const Block& block, BlockWeights& weights, const std::vector<Waiting>& group, double part);
  void prefetch_expert(const Block& block, int expert) const;

  const Context& ctx_;
  const ModelGraph& graph_;
  const Checkpoint& checkpoint_;
  std::int64_t group_;
  std::function<void(double part)> passed_;
  Workspace workspace_;
};

}  // namespace quern
