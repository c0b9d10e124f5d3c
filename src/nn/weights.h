// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "model/graph.h"
#include "quant/quantized_matrix.h"
#include "quant/scheme.h"
#include "tensor/checkpoint.h"

#include <memory>
#include <vector>

namespace quern {

// The weights of one linear: dense values as the file stores them (BF16 stays BF16), or quantized.
struct LinearWeights {
  std::int64_t out_features = 0;
  std::int64_t in_features = 0;
  TensorView dense;  // points into the mapped file; unused when quantized
  // Behind `dense` when the file does not align the tensor to its values.
  std::shared_ptr<const std::vector<std::byte>> aligned_copy;
  std::shared_ptr<const QuantizedMatrix> quantized;  // null when dense
  ActivationScheme activation;
  std::vector<float> bias;  // [out_features] or empty
};

// What DeltaNet has besides its linears, as floats.
struct DeltaWeights {
  std::vector<float> convolution;  // [channels, kernel], the last column for the current token
  std::vector<float> decay;  // [value heads] -exp(A_log)
  std::vector<float> decay_bias;  // [value heads]
  std::vector<float> norm;  // [value dim]
};

struct BlockWeights {
  std::vector<LinearWeights> linears;  // in the order of Block::linears
  std::vector<float> attention_norm;
  std::vector<float> mlp_norm;
  std::vector<float> q_norm;
  std::vector<float> k_norm;
  DeltaWeights delta;
};

// Kernels cast the bytes to values; a file may start a tensor at any byte. Copies `dense` then.
void align_dense(LinearWeights& weights);

[[nodiscard]] LinearWeights load_linear_weights(const Linear& linear, const Checkpoint& checkpoint);
// Without `experts`, those of a mixture stay empty, to be loaded one after the other.
[[nodiscard]] BlockWeights load_block_weights(
    const Block& block, const Checkpoint& checkpoint, bool experts = true);

// The gain: what the tensor holds, plus 1 where that is centred on zero.
[[nodiscard]] std::vector<float> load_norm(const Norm& norm, const Checkpoint& checkpoint);

// Give the mapped pages of everything that is stored for a linear or block back to the system.
void release_linear_weights(const Linear& linear, const Checkpoint& checkpoint);
void release_block_weights(const Block& block, const Checkpoint& checkpoint);
// Ask for them to be read ahead.
void prefetch_linear_weights(const Linear& linear, const Checkpoint& checkpoint);
void prefetch_block_weights(const Block& block, const Checkpoint& checkpoint, bool experts = true);

// A model opened for running: graph, checkpoint and every weight (dense ones mapped).
struct Model {
  ModelGraph graph;
  std::unique_ptr<Checkpoint> checkpoint;
  LinearWeights embedding;  // [vocab_size, hidden_size]: rows are looked up
  std::vector<BlockWeights> blocks;
  std::vector<float> final_norm;
  LinearWeights head;
};

// Opens, checks and loads. Throws the errors of its parts.
[[nodiscard]] Model load_model(std::unique_ptr<Checkpoint> checkpoint);

}  // namespace quern
