// SPDX-License-Identifier: Apache-2.0
#include "nn/weights.h"

#include "base/error.h"

#include <cmath>
#include <utility>

namespace quern {
namespace {

std::vector<float> load_vector(
    const std::string& name, std::int64_t size, const Checkpoint& checkpoint) {
  return to_float(checkpoint.tensors().require(name, {size}));
}

DeltaWeights load_delta(const DeltaNet& delta, const Checkpoint& checkpoint) {
  const TensorStore& store = checkpoint.tensors();
  DeltaWeights weights;
  weights.convolution = to_float(*store.find(delta.convolution));
  weights.decay = to_float(*store.find(delta.log_decay));
  for (float& value : weights.decay) {
    value = -std::exp(value);
  }
  weights.decay_bias = to_float(*store.find(delta.decay_bias));
  weights.norm = load_norm(delta.norm, checkpoint);
  return weights;
}

}  // namespace

void align_dense(LinearWeights& weights) {
  const auto address = reinterpret_cast<std::uintptr_t>(weights.dense.bytes.data());
  if (address % dtype_size(weights.dense.dtype) != 0) {
    weights.aligned_copy = std::make_shared<const std::vector<std::byte>>(
        weights.dense.bytes.begin(), weights.dense.bytes.end());
    weights.dense.bytes = *weights.aligned_copy;
  }
}

std::vector<float> load_norm(const Norm& norm, const Checkpoint& checkpoint) {
  std::vector<float> gain = load_vector(norm.tensor, norm.size, checkpoint);
  for (float& value : gain) {
    value += norm.zero_centred ? 1.0F : 0.0F;
  }
  return gain;
}

LinearWeights load_linear_weights(const Linear& linear, const Checkpoint& checkpoint) {
  StoredLinear stored =
      checkpoint.load_linear(linear.module, linear.out_features, linear.in_features);
  LinearWeights weights;
  weights.out_features = linear.out_features;
  weights.in_features = linear.in_features;
  if (stored.activation) {
    weights.activation = *stored.activation;
  }
  if (stored.quantized) {
    weights.quantized = std::move(stored.quantized);
  } else {
    weights.dense = *stored.dense;
    align_dense(weights);
  }
  if (linear.has_bias) {
    weights.bias = load_vector(linear.module + ".bias", linear.out_features, checkpoint);
  }
  return weights;
}

BlockWeights load_block_weights(const Block& block, const Checkpoint& checkpoint) {
  BlockWeights weights;
  for (const Linear& linear : block.linears) {
    weights.linears.push_back(load_linear_weights(linear, checkpoint));
  }
  weights.attention_norm = load_norm(block.attention_norm, checkpoint);
  weights.mlp_norm = load_norm(block.mlp_norm, checkpoint);
  if (block.has_qk_norm) {
    weights.q_norm = load_norm(block.q_norm, checkpoint);
    weights.k_norm = load_norm(block.k_norm, checkpoint);
  }
  if (block.delta_net) {
    weights.delta = load_delta(*block.delta_net, checkpoint);
  }
  return weights;
}

void release_linear_weights(const LinearWeights& weights, const Checkpoint& checkpoint) {
  // Also of linears that were rounded since: their original is what was mapped.
  if (!weights.dense.bytes.empty() && weights.aligned_copy == nullptr) {
    checkpoint.tensors().release(weights.dense);
  }
}

void release_block_weights(const BlockWeights& weights, const Checkpoint& checkpoint) {
  for (const LinearWeights& linear : weights.linears) {
    release_linear_weights(linear, checkpoint);
  }
}

Model load_model(std::unique_ptr<Checkpoint> checkpoint) {
  Model model;
  model.graph = build_graph(*checkpoint);
  check_tensors(model.graph, *checkpoint);
  model.embedding = load_linear_weights(model.graph.embedding, *checkpoint);
  for (const Block& block : model.graph.blocks) {
    model.blocks.push_back(load_block_weights(block, *checkpoint));
  }
  model.final_norm = load_norm(model.graph.final_norm, *checkpoint);
  if (model.graph.head_tied) {
    model.head = model.embedding;
  } else {
    model.head = load_linear_weights(model.graph.head, *checkpoint);
  }
  model.checkpoint = std::move(checkpoint);
  return model;
}

}  // namespace quern
