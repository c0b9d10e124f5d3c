// SPDX-License-Identifier: Apache-2.0
#include "nn/weights.h"

#include "base/error.h"
#include "base/mapped_file.h"

#include <cmath>
#include <map>
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

bool is_expert(const Block& block, std::size_t linear) {
  if (!block.mixture) {
    return false;
  }
  const auto index = static_cast<int>(linear);
  return index >= block.mixture->expert(0) && index < block.mixture->expert(block.mixture->experts);
}

// Whatever the format calls the parts of a module.
template <class Function>
void for_stored_tensors(
    const Linear& linear, const Checkpoint& checkpoint, const Function& function) {
  const std::string prefix = linear.module + ".";
  const std::map<std::string, TensorView>& tensors = checkpoint.tensors().tensors();
  for (auto at = tensors.lower_bound(prefix); at != tensors.end() && at->first.starts_with(prefix);
       ++at) {
    function(at->second);
  }
}

// What a block has besides its linears.
std::vector<std::string> vector_names(const Block& block) {
  std::vector<std::string> names = {block.attention_norm.tensor, block.mlp_norm.tensor};
  if (block.has_qk_norm) {
    names.insert(names.end(), {block.q_norm.tensor, block.k_norm.tensor});
  }
  if (block.delta_net) {
    const DeltaNet& delta = *block.delta_net;
    names.insert(
        names.end(), {delta.convolution, delta.log_decay, delta.decay_bias, delta.norm.tensor});
  }
  return names;
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

BlockWeights load_block_weights(const Block& block, const Checkpoint& checkpoint, bool experts) {
  BlockWeights weights;
  for (std::size_t i = 0; i < block.linears.size(); ++i) {
    const bool loaded = experts || !is_expert(block, i);
    weights.linears.push_back(
        loaded ? load_linear_weights(block.linears[i], checkpoint) : LinearWeights());
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

void release_linear_weights(const Linear& linear, const Checkpoint& checkpoint) {
  for_stored_tensors(
      linear, checkpoint, [&](const TensorView& view) { checkpoint.tensors().release(view); });
}

void release_block_weights(const Block& block, const Checkpoint& checkpoint) {
  for (const Linear& linear : block.linears) {
    release_linear_weights(linear, checkpoint);
  }
  for (const std::string& name : vector_names(block)) {
    checkpoint.tensors().release(*checkpoint.tensors().find(name));
  }
}

void prefetch_linear_weights(const Linear& linear, const Checkpoint& checkpoint) {
  for_stored_tensors(
      linear, checkpoint, [](const TensorView& view) { prefetch_mapped(view.bytes); });
}

void prefetch_block_weights(const Block& block, const Checkpoint& checkpoint, bool experts) {
  for (std::size_t i = 0; i < block.linears.size(); ++i) {
    if (experts || !is_expert(block, i)) {
      prefetch_linear_weights(block.linears[i], checkpoint);
    }
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
