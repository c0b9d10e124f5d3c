// SPDX-License-Identifier: Apache-2.0
#include "model/mtp.h"

#include "base/error.h"
#include "tensor/checkpoint.h"

#include <fmt/format.h>

#include <set>
#include <string>
#include <string_view>
#include <utility>

namespace quern {
namespace {

constexpr std::string_view kPrefix = "mtp.";
constexpr const char* kBlock = "mtp.layers.0.";

bool has_tensor_under(const TensorStore& store, std::string_view prefix) {
  const auto found = store.tensors().lower_bound(std::string(prefix));
  return found != store.tensors().end() && found->first.starts_with(prefix);
}

MtpLayer make_layer(const ModelConfig& config, const Checkpoint& checkpoint) {
  const std::int64_t hidden = config.hidden_size;
  const bool centred = config.zero_centred_norms;
  DecoderOptions options;
  options.qk_norm = true;
  MtpLayer layer;
  layer.projection = {"mtp.fc", Role::kDraftInput, hidden, 2 * hidden, false};
  layer.embedding_norm = {"mtp.pre_fc_norm_embedding.weight", hidden, centred};
  layer.hidden_norm = {"mtp.pre_fc_norm_hidden.weight", hidden, centred};
  // What config.json says of the layers' mixtures does not say which it is here.
  layer.block = decoder_block(
      kBlock,
      config,
      options,
      false,
      config.mixture && has_tensor_under(checkpoint.tensors(), std::string(kBlock) + "mlp.gate."));
  layer.norm = {"mtp.norm.weight", hidden, centred};
  return layer;
}

// A tensor below mtp. that is no part of `layer`; empty: none.
std::string other_tensor(const MtpLayer& layer, const TensorStore& store) {
  const Block& block = layer.block;
  std::set<std::string> norms;
  for (const Norm* norm :
       {&layer.embedding_norm,
        &layer.hidden_norm,
        &layer.norm,
        &block.attention_norm,
        &block.mlp_norm,
        &block.q_norm,
        &block.k_norm}) {
    norms.insert(norm->tensor);
  }
  std::set<std::string> modules = {layer.projection.module};
  for (const Linear& linear : block.linears) {
    modules.insert(linear.module);
  }
  const auto& tensors = store.tensors();
  for (auto at = tensors.lower_bound(std::string(kPrefix));
       at != tensors.end() && at->first.starts_with(kPrefix);
       ++at) {
    const std::string& name = at->first;
    if (!norms.contains(name) && !modules.contains(name.substr(0, name.rfind('.')))) {
      return name;
    }
  }
  return "";
}

// The value of `key`, of the decoder or outside it, when it is there and not `expected`.
std::string other_value(const Checkpoint& checkpoint, const char* key, const Json& expected) {
  const Json& config = checkpoint.config();
  const auto text = config.find("text_config");
  for (const Json* object : {text == config.end() ? nullptr : &*text, &config}) {
    if (object == nullptr || !object->is_object()) {
      continue;
    }
    const auto found = object->find(key);
    if (found != object->end() && !found->is_null()) {
      return *found == expected ? ""
                                : fmt::format(
                                      "expected {} {}, found {}",
                                      key,
                                      expected.dump(),
                                      printable(found->dump(), 40));
    }
  }
  return "";
}

// Why the checkpoint has no draft layer that quern runs; empty: it has one.
std::string obstacle(const ModelConfig& config, const Checkpoint& checkpoint) {
  if (!has_tensor_under(checkpoint.tensors(), kPrefix)) {
    return "expected tensors mtp.*, found none";
  }
  if (!config.delta_net) {
    return "expected Qwen3-Next, or Qwen3.5 or later, found " + config.family;
  }
  for (const char* key : {"mtp_num_hidden_layers", "num_nextn_predict_layers"}) {
    if (std::string other = other_value(checkpoint, key, 1); !other.empty()) {
      return other;
    }
  }
  if (std::string other = other_value(checkpoint, "mtp_use_dedicated_embeddings", false);
      !other.empty()) {
    return other;
  }
  const std::string name = other_tensor(make_layer(config, checkpoint), checkpoint.tensors());
  return name.empty() ? ""
                      : "expected one attention layer with its norms and mtp.fc, found " + name;
}

}  // namespace

std::optional<MtpLayer> find_mtp(const ModelConfig& config, const Checkpoint& checkpoint) {
  if (!obstacle(config, checkpoint).empty()) {
    return std::nullopt;
  }
  return make_layer(config, checkpoint);
}

const MtpLayer& require_mtp(const ModelGraph& graph, const Checkpoint& checkpoint) {
  if (!graph.mtp) {
    throw UnsupportedError(
        "the model has no draft layer (MTP) that quern runs",
        checkpoint.directory().string(),
        obstacle(graph.config, checkpoint),
        "go on without drafts, or use the model's own release: many conversions leave mtp.* out");
  }
  const MtpLayer& layer = *graph.mtp;
  check_linear(layer.projection, checkpoint);
  for (const Norm* norm : {&layer.embedding_norm, &layer.hidden_norm, &layer.norm}) {
    check_norm(*norm, checkpoint);
  }
  check_block(layer.block, graph.config, checkpoint);
  return layer;
}

}  // namespace quern
