// SPDX-License-Identifier: Apache-2.0
#include "model/graph.h"

#include "base/error.h"
#include "model/mtp.h"
#include "tensor/checkpoint.h"

#include <fmt/format.h>

#include <numeric>
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
    case Role::kDeltaInput: return "delta_input";
    case Role::kDeltaGates: return "delta_gates";
    case Role::kDraftInput: return "draft_input";
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

// q, k, v and o with their sites.
void add_attention(
    const std::string& base,
    const ModelConfig& config,
    const DecoderOptions& options,
    Block& block) {
  const std::int64_t hidden = config.hidden_size;
  const std::int64_t q_width = config.heads * config.head_dim;
  const std::int64_t kv_width = config.kv_heads * config.head_dim;
  const std::int64_t q_rows = config.output_gate ? 2 * q_width : q_width;
  block.has_qk_norm = options.qk_norm;
  if (options.qk_norm) {
    const bool centred = config.zero_centred_norms;
    block.q_norm = {base + "self_attn.q_norm.weight", config.head_dim, centred};
    block.k_norm = {base + "self_attn.k_norm.weight", config.head_dim, centred};
  }
  // In the order of DenseLinear.
  block.linears = {
      {base + "self_attn.q_proj", Role::kQuery, q_rows, hidden, options.qkv_bias},
      {base + "self_attn.k_proj", Role::kKey, kv_width, hidden, options.qkv_bias},
      {base + "self_attn.v_proj", Role::kValue, kv_width, hidden, options.qkv_bias},
      {base + "self_attn.o_proj", Role::kOutput, hidden, q_width, options.output_bias},
  };
  block.output = kO;
  block.sites = {
      {"attention_input", hidden, {kQ, kK, kV}, kNormProduces, {}},
      {"attention_output", q_width, {kO}, kV, value_rows(config)},
  };
}

void add_delta_net(const std::string& base, const ModelConfig& config, Block& block) {
  const DeltaNetConfig& shape = *config.delta_net;
  const std::int64_t hidden = config.hidden_size;
  const std::int64_t values = shape.value_width();
  const std::int64_t heads = shape.value_heads;
  const std::string name = base + "linear_attn.";
  DeltaNet delta;
  if (shape.fused) {
    block.linears = {
        {name + "in_proj_qkvz", Role::kDeltaInput, shape.channels() + values, hidden, false},
        {name + "in_proj_ba", Role::kDeltaGates, 2 * heads, hidden, false},
    };
    delta.b = 1;
  } else {
    block.linears = {
        {name + "in_proj_qkv", Role::kDeltaInput, shape.channels(), hidden, false},
        {name + "in_proj_z", Role::kDeltaInput, values, hidden, false},
        {name + "in_proj_b", Role::kDeltaGates, heads, hidden, false},
        {name + "in_proj_a", Role::kDeltaGates, heads, hidden, false},
    };
    delta.z = 1;
    delta.b = 2;
    delta.a = 3;
  }
  std::vector<int> inputs(block.linears.size());
  std::iota(inputs.begin(), inputs.end(), 0);
  block.output = static_cast<int>(block.linears.size());
  block.linears.push_back({name + "out_proj", Role::kOutput, hidden, values, false});
  delta.convolution = name + "conv1d.weight";
  delta.log_decay = name + "A_log";
  delta.decay_bias = name + "dt_bias";
  delta.norm = {name + "norm.weight", shape.value_dim, false};
  block.delta_net = delta;
  block.sites = {
      {"delta_input", hidden, std::move(inputs), kNormProduces, {}},
      {"delta_output", values, {block.output}, kNothingProduces, {}},
  };
}

void add_mlp(
    const std::string& base,
    const ModelConfig& config,
    const DecoderOptions& options,
    Block& block) {
  const std::int64_t hidden = config.hidden_size;
  const std::int64_t inner = config.intermediate_size;
  const int gate = static_cast<int>(block.linears.size());
  block.mlp = gate;
  block.linears.push_back({base + "mlp.gate_proj", Role::kGate, inner, hidden, options.mlp_bias});
  block.linears.push_back({base + "mlp.up_proj", Role::kUp, inner, hidden, options.mlp_bias});
  block.linears.push_back({base + "mlp.down_proj", Role::kDown, hidden, inner, options.mlp_bias});
  block.sites.push_back({"mlp_input", hidden, {gate, gate + 1}, kNormProduces, {}});
  block.sites.push_back({"mlp_hidden", inner, {gate + 2}, gate + 1, {}});
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

void add_mixture(const std::string& base, const ModelConfig& model, Block& block) {
  const MixtureConfig& config = *model.mixture;
  const std::int64_t hidden = model.hidden_size;
  Mixture mixture;
  mixture.experts = static_cast<int>(config.experts);
  mixture.experts_per_token = static_cast<int>(config.experts_per_token);
  mixture.normalize = config.normalize;
  std::vector<Linear>& linears = block.linears;
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
  CalibrationSite site{"mlp_input", hidden, {}, kNormProduces, {}};
  for (int i = mixture.router; i < static_cast<int>(linears.size()); ++i) {
    if (linears[static_cast<std::size_t>(i)].role != Role::kDown) {
      site.linears.push_back(i);
    }
  }
  block.sites.push_back(std::move(site));
  block.mixture = mixture;
}

}  // namespace

Block decoder_block(
    const std::string& base,
    const ModelConfig& config,
    const DecoderOptions& options,
    bool has_delta_net,
    bool has_mixture) {
  const bool centred = config.zero_centred_norms;
  Block block;
  block.attention_norm = {base + "input_layernorm.weight", config.hidden_size, centred};
  block.mlp_norm = {base + "post_attention_layernorm.weight", config.hidden_size, centred};
  if (has_delta_net) {
    add_delta_net(base, config, block);
  } else {
    add_attention(base, config, options, block);
  }
  if (has_mixture) {
    add_mixture(base, config, block);
  } else {
    add_mlp(base, config, options, block);
  }
  return block;
}

ModelGraph decoder_graph(ModelConfig config, const DecoderOptions& options) {
  ModelGraph graph;
  const std::int64_t hidden = config.hidden_size;
  const bool centred = config.zero_centred_norms;
  for (int i = 0; i < config.layers; ++i) {
    const auto layer = static_cast<std::size_t>(i);
    Block block = decoder_block(
        fmt::format("{}layers.{}.", options.prefix, i),
        config,
        options,
        config.delta_net && config.delta_net->layers[layer],
        config.mixture && config.mixture->layers[layer]);
    block.index = i;
    block.sliding_window = config.sliding_windows[layer];
    graph.blocks.push_back(std::move(block));
  }
  graph.embedding = {
      options.prefix + "embed_tokens", Role::kEmbedding, config.vocab_size, hidden, false};
  graph.final_norm = {options.prefix + "norm.weight", hidden, centred};
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

ModelGraph hybrid_graph(
    const JsonReader& config, const DecoderDefaults& defaults, DecoderOptions options) {
  const bool nested = config.has("text_config");
  const JsonReader text = nested ? config.get_object("text_config") : config;
  ModelConfig model = read_decoder_config(text, defaults);
  if (nested) {
    const ModelConfig outer = read_outer_config(config);
    model.family = outer.family;
    model.architecture = outer.architecture;
    model.tied_embeddings = config.get_bool_or("tie_word_embeddings", model.tied_embeddings);
    if (!text.has("dtype") && !text.has("torch_dtype")) {
      model.dtype = outer.dtype;
    }
    options.prefix = "model.language_model.";
  }
  options.qk_norm = true;
  return decoder_graph(std::move(model), options);
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

namespace {

// Renames every tensor and module that begins with `from`.
void replace_prefix(const std::string& from, const std::string& to, ModelGraph& graph) {
  const auto rename = [&](std::string& name) {
    if (name.starts_with(from)) {
      name.replace(0, from.size(), to);
    }
  };
  rename(graph.embedding.module);
  rename(graph.final_norm.tensor);
  rename(graph.head.module);
  for (Block& block : graph.blocks) {
    for (Norm* norm : {&block.attention_norm, &block.mlp_norm, &block.q_norm, &block.k_norm}) {
      rename(norm->tensor);
    }
    for (Linear& linear : block.linears) {
      rename(linear.module);
    }
    if (block.delta_net) {
      DeltaNet& delta = *block.delta_net;
      for (std::string* name :
           {&delta.convolution, &delta.log_decay, &delta.decay_bias, &delta.norm.tensor}) {
        rename(*name);
      }
    }
  }
}

}  // namespace

ModelGraph build_graph(const Checkpoint& checkpoint) {
  constexpr const char* kShort = "model.";
  constexpr const char* kLong = "model.language_model.";
  ModelGraph graph = build_graph(checkpoint.config(), checkpoint.config_place());
  const bool is_long = graph.final_norm.tensor.starts_with(kLong);
  if (checkpoint.tensors().find(graph.final_norm.tensor) == nullptr) {
    const std::string other = is_long ? "model.norm.weight" : "model.language_model.norm.weight";
    if (checkpoint.tensors().find(other) != nullptr) {
      replace_prefix(is_long ? kLong : kShort, is_long ? kShort : kLong, graph);
    }
  }
  graph.mtp = find_mtp(graph.config, checkpoint);
  return graph;
}

void refuse_sparse_and_linear(const ModelGraph& graph, const std::string& where) {
  for (const Block& block : graph.blocks) {
    if (block.mixture || block.delta_net) {
      throw UnsupportedError(
          "a mixture of experts, or DeltaNet layers",
          where,
          fmt::format("{} is not planned by its gradients yet", graph.config.family),
          "--recipe best, experts-int4 or gptq: every linear alike");
    }
  }
}

namespace {

void check_float(const std::string& name, const Shape& shape, const Checkpoint& checkpoint) {
  // What is made when it is asked for has its type and shape without being made.
  const TensorStore& store = checkpoint.tensors();
  const auto known = store.tensors().find(name);
  if (known == store.tensors().end() || known->second.shape != shape ||
      !is_16_or_32_bit_float(known->second.dtype)) {
    (void)store.require_float(name, shape);  // throws
  }
}

}  // namespace

void check_norm(const Norm& norm, const Checkpoint& checkpoint) {
  check_float(norm.tensor, {norm.size}, checkpoint);
}

void check_linear(const Linear& linear, const Checkpoint& checkpoint) {
  if (checkpoint.is_quantized(linear.module)) {
    (void)checkpoint.load_linear(linear.module, linear.out_features, linear.in_features);
  } else {
    check_float(linear.weight(), {linear.out_features, linear.in_features}, checkpoint);
  }
  if (linear.has_bias) {
    check_float(linear.module + ".bias", {linear.out_features}, checkpoint);
  }
}

void check_block(const Block& block, const ModelConfig& config, const Checkpoint& checkpoint) {
  check_norm(block.attention_norm, checkpoint);
  check_norm(block.mlp_norm, checkpoint);
  if (block.has_qk_norm) {
    check_norm(block.q_norm, checkpoint);
    check_norm(block.k_norm, checkpoint);
  }
  if (block.delta_net) {
    const DeltaNet& delta = *block.delta_net;
    const DeltaNetConfig& shape = *config.delta_net;
    check_float(delta.convolution, {shape.channels(), 1, shape.kernel}, checkpoint);
    check_float(delta.log_decay, {shape.value_heads}, checkpoint);
    check_float(delta.decay_bias, {shape.value_heads}, checkpoint);
    check_norm(delta.norm, checkpoint);
  }
  for (const Linear& linear : block.linears) {
    check_linear(linear, checkpoint);
  }
}

void check_tensors(const ModelGraph& graph, const Checkpoint& checkpoint) {
  const auto check_table = [&](const Linear& linear) {
    (void)checkpoint.load_linear(linear.module, linear.out_features, linear.in_features);
  };
  check_table(graph.embedding);
  check_norm(graph.final_norm, checkpoint);
  for (const Block& block : graph.blocks) {
    check_block(block, graph.config, checkpoint);
  }
  if (!graph.head_tied) {
    check_table(graph.head);
  }
}

}  // namespace quern
