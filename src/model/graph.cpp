// SPDX-License-Identifier: Apache-2.0
#include "model/graph.h"

#include "base/error.h"
#include "tensor/checkpoint.h"

#include <fmt/format.h>

#include <utility>

namespace quern {

std::string_view role_name(Role role) {
  switch (role) {
    case Role::kQuery: return "q";
    case Role::kKey: return "k";
    case Role::kValue: return "v";
    case Role::kOutput: return "o";
    case Role::kGate: return "gate";
    case Role::kUp: return "up";
    case Role::kDown: return "down";
    case Role::kRouter: return "router";
    case Role::kSharedGate: return "shared_gate";
    case Role::kEmbedding: return "embedding";
    case Role::kHead: return "head";
  }
  return "";
}

std::int64_t ModelGraph::linear_parameters() const {
  std::int64_t total = 0;
  for (const Block& block : blocks) {
    for (const Linear& linear : block.linears) {
      total += linear.parameters();
    }
  }
  return total;
}

namespace {

// Row of v_proj behind each channel of o_proj's input: heads of one group share a key-value head.
std::vector<std::int32_t> value_rows(const ModelConfig& config) {
  std::vector<std::int32_t> rows;
  for (std::int64_t head = 0; head < config.heads; ++head) {
    const std::int64_t kv_head = head / (config.heads / config.kv_heads);
    for (std::int64_t i = 0; i < config.head_dim; ++i) {
      rows.push_back(static_cast<std::int32_t>(kv_head * config.head_dim + i));
    }
  }
  return rows;
}

void add_expert(
    const std::string& module,
    std::int64_t hidden,
    std::int64_t width,
    std::vector<Linear>& linears) {
  linears.push_back({module + ".gate_proj", Role::kGate, width, hidden, false});
  linears.push_back({module + ".up_proj", Role::kUp, width, hidden, false});
  linears.push_back({module + ".down_proj", Role::kDown, hidden, width, false});
}

// Puts a mixture in the place of the MLP, with the names of qwen2_moe and qwen3_moe.
void make_mixture(
    const std::string& base, std::int64_t hidden, const MixtureConfig& config, Block& block) {
  Mixture mixture;
  mixture.experts = static_cast<int>(config.experts);
  mixture.experts_per_token = static_cast<int>(config.experts_per_token);
  mixture.normalize = config.normalize;
  std::vector<Linear>& linears = block.linears;
  linears.resize(kGateProj);
  mixture.router = static_cast<int>(linears.size());
  linears.push_back({base + "mlp.gate", Role::kRouter, config.experts, hidden, false});
  if (config.shared_width > 0) {
    mixture.shared_gate = static_cast<int>(linears.size());
    linears.push_back({base + "mlp.shared_expert_gate", Role::kSharedGate, 1, hidden, false});
    mixture.shared_expert = static_cast<int>(linears.size());
    add_expert(base + "mlp.shared_expert", hidden, config.shared_width, linears);
  }
  mixture.first_expert = static_cast<int>(linears.size());
  for (std::int64_t expert = 0; expert < config.experts; ++expert) {
    add_expert(fmt::format("{}mlp.experts.{}", base, expert), hidden, config.expert_width, linears);
  }
  block.sites.resize(kMlpInput + 1);
  CalibrationSite& site = block.sites.back();
  site.linears.clear();
  for (int i = mixture.router; i < static_cast<int>(linears.size()); ++i) {
    if (linears[static_cast<std::size_t>(i)].role != Role::kDown) {
      site.linears.push_back(i);
    }
  }
  block.mixture = mixture;
}

}  // namespace

ModelGraph dense_graph(ModelConfig config, const DenseOptions& options) {
  ModelGraph graph;
  const std::int64_t hidden = config.hidden_size;
  const std::int64_t q_width = config.heads * config.head_dim;
  const std::int64_t kv_width = config.kv_heads * config.head_dim;
  const std::int64_t inner = config.intermediate_size;
  for (int i = 0; i < config.layers; ++i) {
    const std::string base = fmt::format("{}layers.{}.", options.prefix, i);
    Block block;
    block.index = i;
    block.attention_norm = {base + "input_layernorm.weight", hidden};
    block.mlp_norm = {base + "post_attention_layernorm.weight", hidden};
    block.has_qk_norm = options.qk_norm;
    if (options.qk_norm) {
      block.q_norm = {base + "self_attn.q_norm.weight", config.head_dim};
      block.k_norm = {base + "self_attn.k_norm.weight", config.head_dim};
    }
    block.sliding_window = config.sliding_windows[static_cast<std::size_t>(i)];
    // In the order of DenseLinear.
    block.linears = {
        {base + "self_attn.q_proj", Role::kQuery, q_width, hidden, options.qkv_bias},
        {base + "self_attn.k_proj", Role::kKey, kv_width, hidden, options.qkv_bias},
        {base + "self_attn.v_proj", Role::kValue, kv_width, hidden, options.qkv_bias},
        {base + "self_attn.o_proj", Role::kOutput, hidden, q_width, options.output_bias},
        {base + "mlp.gate_proj", Role::kGate, inner, hidden, options.mlp_bias},
        {base + "mlp.up_proj", Role::kUp, inner, hidden, options.mlp_bias},
        {base + "mlp.down_proj", Role::kDown, hidden, inner, options.mlp_bias},
    };
    // In the order of DenseSite.
    block.sites = {
        {"attention_input", hidden, {kQ, kK, kV}, -1, {}},
        {"attention_output", q_width, {kO}, kV, value_rows(config)},
        {"mlp_input", hidden, {kGateProj, kUpProj}, -1, {}},
        {"mlp_hidden", inner, {kDownProj}, kUpProj, {}},
    };
    if (config.mixture && config.mixture->layers[static_cast<std::size_t>(i)]) {
      make_mixture(base, hidden, *config.mixture, block);
    }
    graph.blocks.push_back(std::move(block));
  }
  graph.embedding = {
      options.prefix + "embed_tokens", Role::kEmbedding, config.vocab_size, hidden, false};
  graph.final_norm = {options.prefix + "norm.weight", hidden};
  graph.head_tied = config.tied_embeddings;
  graph.head = {
      graph.head_tied ? graph.embedding.module : "lm_head",
      Role::kHead,
      config.vocab_size,
      hidden,
      false};
  graph.config = std::move(config);
  return graph;
}

ModelGraph build_graph(const Json& config, const std::string& where) {
  const JsonReader reader(config, where);
  const std::string type = reader.get_string("model_type");
  std::string known;
  for (const Family& family : families()) {
    if (family.model_type == type) {
      return family.build(reader);
    }
    known += (known.empty() ? "" : ", ") + std::string(family.model_type);
  }
  throw UnsupportedError(
      "a model family that quern does not know",
      reader.place("model_type"),
      "expected one of " + known + ", found " + type,
      "use a checkpoint of one of these families");
}

void refuse_mixtures(const ModelGraph& graph, const std::string& where) {
  for (const Block& block : graph.blocks) {
    if (block.mixture) {
      throw UnsupportedError(
          "a mixture of experts",
          where,
          fmt::format("{} is run and measured, and not quantized yet", graph.config.family),
          "quern eval, generate, logits");
    }
  }
}

void check_tensors(const ModelGraph& graph, const Checkpoint& checkpoint) {
  const TensorStore& store = checkpoint.tensors();
  const auto require_float = [&](const std::string& name, const Shape& shape) {
    const TensorView& view = store.require(name, shape);
    if (!is_16_or_32_bit_float(view.dtype)) {
      throw UnsupportedError(
          "a tensor is not of a float type that quern computes with",
          name,
          fmt::format("expected BF16, F16 or F32, found {}", dtype_name(view.dtype)),
          "use the BF16 release of the model");
    }
  };
  const auto require_linear = [&](const Linear& linear) {
    (void)checkpoint.load_linear(linear.module, linear.out_features, linear.in_features);
    if (linear.has_bias) {
      require_float(linear.module + ".bias", {linear.out_features});
    }
  };
  require_linear(graph.embedding);
  require_float(graph.final_norm.tensor, {graph.final_norm.size});
  for (const Block& block : graph.blocks) {
    for (const Norm* norm : {&block.attention_norm, &block.mlp_norm}) {
      require_float(norm->tensor, {norm->size});
    }
    if (block.has_qk_norm) {
      require_float(block.q_norm.tensor, {block.q_norm.size});
      require_float(block.k_norm.tensor, {block.k_norm.size});
    }
    for (const Linear& linear : block.linears) {
      if (checkpoint.is_quantized(linear.module)) {
        require_linear(linear);
      } else {
        require_float(linear.module + ".weight", {linear.out_features, linear.in_features});
        if (linear.has_bias) {
          require_float(linear.module + ".bias", {linear.out_features});
        }
      }
    }
  }
  if (!graph.head_tied) {
    require_linear(graph.head);
  }
}

}  // namespace quern
