// SPDX-License-Identifier: Apache-2.0
#include "format/gguf_config.h"

#include "base/error.h"
#include "format/gguf_names.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

namespace quern {
namespace {

struct Architecture {
  std::string_view name;  // in GGUF
  std::string_view model_type;  // in config.json, when it is read back
  std::string_view class_name;
  bool mixture = false;
  bool hybrid = false;  // DeltaNet layers between those of attention
};

constexpr std::array<Architecture, 7> kArchitectures = {{
    {"qwen2", "qwen2", "Qwen2ForCausalLM"},
    {"qwen3", "qwen3", "Qwen3ForCausalLM"},
    {"llama", "llama", "LlamaForCausalLM"},
    {"qwen3moe", "qwen3_moe", "Qwen3MoeForCausalLM", true},
    {"qwen3next", "qwen3_next", "Qwen3NextForCausalLM", true, true},
    {"qwen35", "qwen3_5_text", "Qwen3_5ForCausalLM", false, true},
    {"qwen35moe", "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", true, true},
}};

constexpr const char* kKnownArchitectures =
    "qwen2, qwen3, qwen3moe, qwen3next, qwen35, qwen35moe or llama";

struct FileType {
  std::string_view label;
  std::uint32_t number;
};

// clang-format off
constexpr std::array<FileType, 20> kFileTypes = {{
    {"F32", 0},     {"F16", 1},     {"Q4_0", 2},    {"Q4_1", 3},    {"Q8_0", 7},
    {"Q5_0", 8},    {"Q5_1", 9},    {"Q2_K", 10},   {"Q3_K_S", 11}, {"Q3_K_M", 12},
    {"Q3_K_L", 13}, {"Q4_K_S", 14}, {"Q4_K_M", 15}, {"Q5_K_S", 16}, {"Q5_K_M", 17},
    {"Q6_K", 18},   {"Q2_K_S", 21}, {"IQ4_NL", 25}, {"IQ4_XS", 30}, {"BF16", 32},
}};
// clang-format on

// Keys under ARCHITECTURE. that change the computation in ways that quern does not have; values
// that leave it as it is are none, 0 or 1.
constexpr std::array<const char*, 13> kChangesComputation = {
    "expert_group_count",
    "expert_weights_scale",
    "attention.sliding_window",
    "attention.scale",
    "attention.clamp_kqv",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "embedding_scale",
    "residual_scale",
    "rope.scale_linear",
    "use_parallel_residual",
    "expert_gating_func"};

[[noreturn]] void cannot_hold(const std::string& place, const std::string& reason) {
  throw UnsupportedError(
      "a model that GGUF readers would compute differently",
      place,
      reason,
      "write a safetensors format instead");
}

// The block that scales rotary positions, and the base of their frequencies; both spellings of
// config.json (see model/config.cpp).
struct RopeSettings {
  double theta = 10000;
  std::string type = "default";
  std::optional<JsonReader> scaling;
};

RopeSettings read_rope(const JsonReader& config) {
  RopeSettings rope;
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    if (config.has(key)) {
      rope.scaling = config.get_object(key);
    }
  }
  if (rope.scaling) {
    rope.type = rope.scaling->has("rope_type") ? rope.scaling->get_string("rope_type")
                                               : rope.scaling->get_string_or("type", "default");
  }
  rope.theta = rope.scaling && rope.scaling->has("rope_theta")
                   ? rope.scaling->get_number("rope_theta")
                   : config.get_number_or("rope_theta", rope.theta);
  return rope;
}

std::uint32_t as_u32(std::int64_t value) {
  return static_cast<std::uint32_t>(value);
}

// ARCHITECTURE.KEY pairs.
class Writer {
 public:
  Writer(GgufMetadata& metadata, std::string architecture)
      : metadata_(metadata), prefix_(std::move(architecture) + ".") {}
  void add(const std::string& key, GgufValue value) {
    metadata_.add(prefix_ + key, std::move(value));
  }

 private:
  GgufMetadata& metadata_;
  std::string prefix_;
};

void add_rope_scaling(
    const RopeSettings& rope, const ModelGraph& graph, const std::string& where, Writer& writer) {
  if (rope.type == "default") {
    return;
  }
  const JsonReader& scaling = *rope.scaling;
  if (rope.type == "llama3") {
    if (gguf_architecture(graph) != "llama") {
      cannot_hold(where, "expected Llama 3.1's scaling of positions in a Llama model only");
    }
    return;  // becomes the tensor of gguf_rope_factors()
  }
  if (rope.type != "linear" && rope.type != "yarn") {
    cannot_hold(where, "expected linear, yarn or llama3, found " + printable(rope.type, 60));
  }
  writer.add("rope.scaling.type", rope.type);
  writer.add("rope.scaling.factor", static_cast<float>(scaling.get_number("factor")));
  if (rope.type == "linear") {
    return;
  }
  for (const char* key : {"attention_factor", "mscale", "mscale_all_dim"}) {
    if (scaling.has(key)) {
      cannot_hold(scaling.place(key), "readers of GGUF work this factor out themselves");
    }
  }
  if (!scaling.get_bool_or("truncate", true)) {
    cannot_hold(scaling.place("truncate"), "expected true, found false");
  }
  writer.add(
      "rope.scaling.original_context_length",
      as_u32(scaling.get_int_in_or(
          "original_max_position_embeddings", 1, INT32_MAX, graph.config.max_positions)));
  for (const char* key : {"beta_fast", "beta_slow"}) {
    if (scaling.has(key)) {
      writer.add(
          std::string("rope.scaling.yarn_") + key, static_cast<float>(scaling.get_number(key)));
    }
  }
}

// Typed reads of ARCHITECTURE.KEY.
class Reader {
 public:
  explicit Reader(const GgufFile& file)
      : file_(file), architecture_(file.metadata().get_string("general.architecture")) {}

  [[nodiscard]] const std::string& architecture() const { return architecture_; }
  [[nodiscard]] const GgufMetadata& metadata() const { return file_.metadata(); }
  [[nodiscard]] std::string key(const std::string& name) const {
    return architecture_ + "." + name;
  }
  [[nodiscard]] bool has(const std::string& name) const { return metadata().has(key(name)); }
  // A size; config.json's own checks are stricter.
  [[nodiscard]] std::int64_t size(const std::string& name) const {
    return metadata().get_int_in(key(name), 1, std::int64_t{1} << 31U);
  }
  // A number of heads or layers, or the width of a head.
  [[nodiscard]] std::int64_t count(const std::string& name) const {
    return metadata().get_int_in(key(name), 1, 4096);
  }
  [[nodiscard]] std::int64_t size_or(const std::string& name, std::int64_t fallback) const {
    return has(name) ? size(name) : fallback;
  }
  [[nodiscard]] double number_or(const std::string& name, double fallback) const {
    return metadata().get_number_or(key(name), fallback);
  }
  [[nodiscard]] bool has_tensor(const std::string& name) const {
    return file_.find(name) != nullptr;
  }
  [[noreturn]] void unsupported(const std::string& name, const std::string& reason) const {
    throw UnsupportedError(
        "a GGUF model that quern does not compute",
        metadata().place(key(name)),
        reason,
        std::string("use a model of ") + kKnownArchitectures);
  }

 private:
  const GgufFile& file_;
  std::string architecture_;
};

const Architecture& find_architecture(const Reader& reader) {
  for (const Architecture& each : kArchitectures) {
    if (each.name == reader.architecture()) {
      return each;
    }
  }
  throw UnsupportedError(
      "a model family that quern does not read from GGUF",
      reader.metadata().place("general.architecture"),
      fmt::format(
          "expected {}, found {}", kKnownArchitectures, printable(reader.architecture(), 60)),
      "use the safetensors release of the model");
}

void refuse_other_computations(const Reader& reader, const Architecture& architecture) {
  if (!architecture.mixture && reader.number_or("expert_count", 0) > 0) {
    reader.unsupported("expert_count", "expected none in this architecture");
  }
  for (const char* name : kChangesComputation) {
    const GgufValue* value = reader.metadata().find(reader.key(name));
    const bool* truth = value == nullptr ? nullptr : std::get_if<bool>(value);
    if (value == nullptr || (truth != nullptr && !*truth)) {
      continue;
    }
    const double number = truth != nullptr ? 2 : reader.metadata().get_number(reader.key(name));
    if (number != 0 && number != 1) {
      reader.unsupported(name, "expected nothing, 0 or 1, found another value");
    }
  }
}

Json rope_of(const Reader& reader, const GgufFile& file, std::int64_t head_dim) {
  Json rope = Json::object();
  const std::string type = reader.metadata().get_string_or(reader.key("rope.scaling.type"), "none");
  if (const GgufTensor* factors = file.find(kRopeFactorsName)) {
    if (type != "none" || factors->type != GgmlType::kF32 ||
        factors->shape != Shape{head_dim / 2}) {
      throw UnsupportedError(
          "rotary positions scaled in a way that quern does not compute",
          file.metadata().where() + ": tensor " + kRopeFactorsName,
          fmt::format(
              "expected F32 [{}] and no other scaling, found {} {} and scaling {}",
              head_dim / 2,
              ggml_type_info(factors->type).name,
              shape_text(factors->shape),
              printable(type, 40)),
          "use the safetensors release of the model");
    }
    std::vector<float> values(static_cast<std::size_t>(head_dim / 2));
    dequantize_row(GgmlType::kF32, factors->bytes, values);
    rope["rope_type"] = "frequency_factors";
    rope["factors"] = values;
    return rope;
  }
  if (type == "none") {
    return nullptr;
  }
  if (type != "linear" && type != "yarn") {
    reader.unsupported(
        "rope.scaling.type", "expected none, linear or yarn, found " + printable(type, 40));
  }
  rope["rope_type"] = type;
  rope["factor"] = reader.metadata().get_number(reader.key("rope.scaling.factor"));
  if (type == "yarn") {
    for (const char* name :
         {"yarn_ext_factor", "yarn_attn_factor", "attn_factor", "yarn_log_multiplier"}) {
      const std::string key = std::string("rope.scaling.") + name;
      if (reader.has(key) && reader.number_or(key, 1) != 1) {
        reader.unsupported(key, "expected 1 or nothing, found another value");
      }
    }
    rope["original_max_position_embeddings"] = reader.size("rope.scaling.original_context_length");
    for (const char* name : {"beta_fast", "beta_slow"}) {
      const std::string key = std::string("rope.scaling.yarn_") + name;
      if (reader.has(key)) {
        rope[name] = reader.number_or(key, 0);
      }
    }
  }
  return rope;
}

std::int64_t vocabulary_of(const GgufFile& file) {
  const GgufTensor* embedding = file.find("token_embd.weight");
  if (embedding == nullptr || embedding->shape.size() != 2) {
    throw ParseError(
        "the table of embeddings is missing",
        file.metadata().where() + ": tensor token_embd.weight",
        "expected a matrix, found " +
            (embedding == nullptr ? std::string("nothing") : shape_text(embedding->shape)),
        "use a GGUF file of a complete model");
  }
  return embedding->shape[0];
}

// The type of the weights before they were quantized is not known; matrices that are not say it.
std::string dtype_of(const GgufFile& file) {
  switch (file.find("token_embd.weight")->type) {
    case GgmlType::kF32: return "float32";
    case GgmlType::kF16: return "float16";
    default: return "bfloat16";
  }
}

}  // namespace

namespace {

const Architecture* architecture_of(std::string_view family) {
  constexpr std::array<std::pair<std::string_view, std::string_view>, 3> kSame = {{
      {"mistral", "llama"},
      {"qwen3_5", "qwen3_5_text"},
      {"qwen3_5_moe", "qwen3_5_moe_text"},
  }};
  for (const auto& [other, name] : kSame) {
    family = family == other ? name : family;
  }
  const auto* known =
      std::find_if(kArchitectures.begin(), kArchitectures.end(), [&](const Architecture& each) {
        return each.model_type == family;
      });
  return known == kArchitectures.end() ? nullptr : known;
}

// What llama.cpp's models take for granted of mixtures (src/models/qwen3moe.cpp and others).
void check_mixture(const MixtureConfig& mixture) {
  if (std::find(mixture.layers.begin(), mixture.layers.end(), false) != mixture.layers.end()) {
    cannot_hold("mlp_only_layers", "readers of GGUF expect experts in every layer");
  }
  if (!mixture.normalize) {
    cannot_hold("norm_topk_prob", "expected true, as readers of GGUF compute it, found false");
  }
}

// The same for DeltaNet (src/models/qwen3next.cpp, qwen35.cpp).
void check_delta_net(const DeltaNetConfig& delta) {
  if (delta.key_dim != delta.value_dim) {
    cannot_hold(
        "linear_value_head_dim",
        fmt::format("expected that of keys ({}), found {}", delta.key_dim, delta.value_dim));
  }
  if (delta.sigmoid_gate) {
    cannot_hold("output_gate_type", "expected swish, found sigmoid");
  }
}

}  // namespace

std::string gguf_architecture(const ModelGraph& graph) {
  const Architecture* known = architecture_of(graph.config.family);
  if (known == nullptr) {
    cannot_hold(
        "model_type",
        fmt::format(
            "expected qwen2, qwen3, qwen3_moe, qwen3_next, qwen3_5, qwen3_5_moe, llama or mistral, "
            "found {}",
            graph.config.family));
  }
  if (graph.config.mixture) {
    check_mixture(*graph.config.mixture);
  }
  if (graph.config.delta_net) {
    check_delta_net(*graph.config.delta_net);
  }
  const std::string architecture(known->name);
  const auto& windows = graph.config.sliding_windows;
  if (std::any_of(windows.begin(), windows.end(), [](std::int64_t window) { return window > 0; })) {
    cannot_hold("sliding_window", "readers of GGUF let every layer of this family see all tokens");
  }
  for (const Block& block : graph.blocks) {
    for (const Linear& linear : block.linears) {
      const bool is_input =
          linear.role == Role::kQuery || linear.role == Role::kKey || linear.role == Role::kValue;
      const bool has_place =
          architecture == "llama" || (is_input && !known->mixture && !known->hybrid);
      if (linear.has_bias && !has_place) {
        cannot_hold(linear.module + ".bias", "the architecture " + architecture + " has none");
      }
    }
  }
  return architecture;
}

namespace {

void add_mixture(const MixtureConfig& mixture, Writer& writer) {
  writer.add("expert_count", as_u32(mixture.experts));
  writer.add("expert_used_count", as_u32(mixture.experts_per_token));
  writer.add("expert_feed_forward_length", as_u32(mixture.expert_width));
  if (mixture.shared_width > 0) {
    writer.add("expert_shared_feed_forward_length", as_u32(mixture.shared_width));
  }
}

void add_delta_net(const DeltaNetConfig& delta, Writer& writer) {
  writer.add("ssm.conv_kernel", as_u32(delta.kernel));
  writer.add("ssm.state_size", as_u32(delta.key_dim));
  writer.add("ssm.group_count", as_u32(delta.key_heads));
  writer.add("ssm.time_step_rank", as_u32(delta.value_heads));
  writer.add("ssm.inner_size", as_u32(delta.value_width()));
  writer.add("attention.recurrent_layers", GgufArray(delta.layers));
}

// The parts of a rotation that follow time, height and width; all the same for text.
std::vector<std::int32_t> rope_sections(const RopeSettings& rope) {
  constexpr std::size_t kSections = 4;
  std::vector<std::int32_t> sections = {11, 11, 10, 0};
  if (rope.scaling && rope.scaling->has("mrope_section")) {
    sections.clear();
    for (const Json& part : rope.scaling->get_array("mrope_section")) {
      if (!part.is_number_integer()) {
        cannot_hold(rope.scaling->place("mrope_section"), "expected whole numbers");
      }
      sections.push_back(part.get<std::int32_t>());
    }
    sections.resize(kSections, 0);
  }
  return sections;
}

// Where config.json keeps the decoder's keys.
JsonReader decoder_keys(const Json& config) {
  const JsonReader reader(config, "config.json");
  return reader.has("text_config") ? reader.get_object("text_config") : reader;
}

}  // namespace

GgufMetadata gguf_metadata(
    const Json& config, const ModelGraph& graph, const std::string& name, std::uint32_t file_type) {
  const ModelConfig& model = graph.config;
  const std::string architecture = gguf_architecture(graph);
  const JsonReader reader = decoder_keys(config);
  const RopeSettings rope = read_rope(reader);
  GgufMetadata metadata;
  metadata.add("general.architecture", architecture);
  metadata.add("general.type", std::string("model"));
  metadata.add("general.name", name);
  Writer writer(metadata, architecture);
  writer.add("block_count", as_u32(model.layers));
  writer.add("context_length", as_u32(model.max_positions));
  writer.add("embedding_length", as_u32(model.hidden_size));
  if (model.intermediate_size > 0) {
    writer.add("feed_forward_length", as_u32(model.intermediate_size));
  }
  if (model.mixture) {
    add_mixture(*model.mixture, writer);
  }
  if (model.delta_net) {
    add_delta_net(*model.delta_net, writer);
  }
  writer.add("attention.head_count", as_u32(model.heads));
  writer.add("attention.head_count_kv", as_u32(model.kv_heads));
  add_rope_scaling(rope, graph, reader.place("rope_scaling"), writer);
  writer.add("rope.freq_base", static_cast<float>(rope.theta));
  writer.add("attention.layer_norm_rms_epsilon", model.norm_eps);
  writer.add("attention.key_length", as_u32(model.head_dim));
  writer.add("attention.value_length", as_u32(model.head_dim));
  metadata.add("general.file_type", file_type);
  writer.add("vocab_size", as_u32(model.vocab_size));
  writer.add(
      "rope.dimension_count",
      as_u32(2 * static_cast<std::int64_t>(model.rope.inverse_frequencies.size())));
  if (architecture.starts_with("qwen35")) {
    writer.add("rope.dimension_sections", GgufArray(rope_sections(rope)));
  }
  constexpr std::uint32_t kQuantizationVersion = 2;
  metadata.add("general.quantization_version", kQuantizationVersion);
  return metadata;
}

std::optional<std::uint32_t> gguf_file_type(std::string_view label) noexcept {
  const auto found = std::find_if(kFileTypes.begin(), kFileTypes.end(), [&](const FileType& type) {
    return type.label == label;
  });
  return found == kFileTypes.end() ? std::nullopt : std::optional(found->number);
}

std::vector<float> gguf_rope_factors(const Json& config, const ModelGraph& graph) {
  const RopeSettings rope = read_rope(decoder_keys(config));
  if (rope.type != "llama3") {
    return {};
  }
  const std::vector<float>& scaled = graph.config.rope.inverse_frequencies;
  const auto width = static_cast<double>(graph.config.head_dim);
  std::vector<float> factors;
  for (std::size_t m = 0; m < scaled.size(); ++m) {
    const double plain = std::pow(rope.theta, -2 * static_cast<double>(m) / width);
    factors.push_back(static_cast<float>(plain / scaled[m]));
  }
  return factors;
}

std::int64_t gguf_layers(const GgufFile& file) {
  const Reader reader(file);
  const std::int64_t blocks = reader.size("block_count");
  const std::int64_t draft =
      reader.has("nextn_predict_layers")
          ? reader.metadata().get_int_in(reader.key("nextn_predict_layers"), 0, blocks - 1)
          : 0;
  return blocks - draft;
}

namespace {

void read_mixture(const Reader& reader, Json& config) {
  config["num_experts"] = reader.size("expert_count");
  config["num_experts_per_tok"] = reader.size("expert_used_count");
  config["moe_intermediate_size"] = reader.size("expert_feed_forward_length");
  config["norm_topk_prob"] = true;
  if (reader.has_tensor("blk.0.ffn_gate_shexp.weight")) {
    config["shared_expert_intermediate_size"] =
        reader.size_or("expert_shared_feed_forward_length", config["moe_intermediate_size"]);
  }
}

void read_delta_net(const Reader& reader, std::int64_t head_dim, Json& config) {
  const std::int64_t values = reader.count("ssm.time_step_rank");
  const std::int64_t dim = reader.count("ssm.state_size");
  if (reader.size("ssm.inner_size") != values * dim) {
    reader.unsupported("ssm.inner_size", fmt::format("expected {} heads of {}", values, dim));
  }
  config["linear_num_key_heads"] = reader.count("ssm.group_count");
  config["linear_num_value_heads"] = values;
  config["linear_key_head_dim"] = dim;
  config["linear_value_head_dim"] = dim;
  config["linear_conv_kernel_dim"] = reader.count("ssm.conv_kernel");
  config["partial_rotary_factor"] =
      static_cast<double>(reader.size_or("rope.dimension_count", head_dim)) /
      static_cast<double>(head_dim);
  const std::int64_t layers = reader.count("block_count");
  Json types = Json::array();
  for (std::int64_t layer = 0;
       layer < std::min(layers, config["num_hidden_layers"].get<std::int64_t>());
       ++layer) {
    // Which layers are which is what their tensors say.
    const bool linear = reader.has_tensor(fmt::format("blk.{}.ssm_a", layer));
    types.push_back(linear ? "linear_attention" : "full_attention");
  }
  config["layer_types"] = std::move(types);
}

}  // namespace

Json config_from_gguf(const GgufFile& file) {
  const Reader reader(file);
  const Architecture& architecture = find_architecture(reader);
  refuse_other_computations(reader, architecture);
  const std::int64_t hidden = reader.size("embedding_length");
  const std::int64_t heads = reader.size("attention.head_count");
  const std::int64_t head_dim = reader.size_or("attention.key_length", hidden / heads);
  for (const char* name : {"attention.value_length", "rope.dimension_count"}) {
    const bool is_partial = architecture.hybrid && std::string_view(name).starts_with("rope");
    if (!is_partial && reader.size_or(name, head_dim) != head_dim) {
      reader.unsupported(name, fmt::format("expected the width of a head, {}", head_dim));
    }
  }
  Json config = Json::object();
  config["architectures"] = {architecture.class_name};
  config["model_type"] = architecture.model_type;
  config["vocab_size"] = vocabulary_of(file);
  config["hidden_size"] = hidden;
  if (!architecture.mixture || reader.has("feed_forward_length")) {
    config["intermediate_size"] = reader.size("feed_forward_length");
  }
  config["num_hidden_layers"] = gguf_layers(file);
  config["num_attention_heads"] = heads;
  config["num_key_value_heads"] = reader.size_or("attention.head_count_kv", heads);
  config["head_dim"] = head_dim;
  config["hidden_act"] = "silu";
  config["max_position_embeddings"] = reader.size("context_length");
  config["rms_norm_eps"] =
      reader.metadata().get_number(reader.key("attention.layer_norm_rms_epsilon"));
  config["rope_theta"] = reader.number_or("rope.freq_base", 10000);
  config["rope_scaling"] = rope_of(reader, file, head_dim);
  config["tie_word_embeddings"] = !reader.has_tensor("output.weight");
  if (architecture.mixture) {
    read_mixture(reader, config);
  }
  if (architecture.hybrid) {
    read_delta_net(reader, head_dim, config);
  } else if (architecture.name != "qwen2") {
    config["attention_bias"] = reader.has_tensor("blk.0.attn_q.bias");
  }
  if (architecture.name == "llama") {
    config["mlp_bias"] = reader.has_tensor("blk.0.ffn_gate.bias");
  }
  for (const char* name : {"bos", "eos"}) {
    const std::string key = fmt::format("tokenizer.ggml.{}_token_id", name);
    if (file.metadata().has(key)) {
      config[fmt::format("{}_token_id", name)] = file.metadata().get_int_in(key, 0, INT32_MAX);
    }
  }
  config["torch_dtype"] = dtype_of(file);
  return config;
}

}  // namespace quern
