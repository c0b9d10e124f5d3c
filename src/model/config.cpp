// SPDX-License-Identifier: Apache-2.0
#include "model/config.h"

#include "base/error.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <optional>

namespace quern {
namespace {

constexpr std::int64_t kMaxWidth = 1 << 20;
constexpr std::int64_t kMaxPositions = std::int64_t{1} << 31;

// Keys of other architectures that change the result of a layer; quern computes without them, so a
// config that sets one is refused rather than run wrongly.
constexpr const char* kChangesComputation[] = {
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "query_pre_attn_scalar",
    "logit_scale",
    "logits_scaling",
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "clip_qkv",
    "n_routed_experts",
    "parallel_attn",
    "alibi",
    "qk_layernorm",
    "use_qk_norm"};

// The same of families that are no mixtures of experts.
constexpr const char* kMakesMixture[] = {"num_experts", "num_local_experts"};

[[noreturn]] void unsupported(
    const JsonReader& config, const std::string& key, const std::string& expected) {
  const auto found = config.json().find(key);
  throw UnsupportedError(
      "a configuration value that quern does not compute",
      config.place(key),
      fmt::format(
          "expected {}, found {}",
          expected,
          found == config.json().end() ? "nothing" : found->dump().substr(0, 80)),
      "quern inspect lists the supported families");
}

std::vector<double> plain_frequencies(double theta, std::int64_t rotary) {
  std::vector<double> frequencies(static_cast<std::size_t>(rotary / 2));
  for (std::size_t m = 0; m < frequencies.size(); ++m) {
    frequencies[m] = std::pow(theta, -2.0 * static_cast<double>(m) / static_cast<double>(rotary));
  }
  return frequencies;
}

double positive(const JsonReader& reader, const std::string& key) {
  const double value = reader.get_number(key);
  if (!(value > 0) || !std::isfinite(value)) {
    throw ParseError(
        "a key is out of range",
        reader.place(key),
        fmt::format("expected a positive number, found {}", value),
        "check the file");
  }
  return value;
}

// Llama 3.1: long wavelengths are slowed down by `factor`, short ones kept, a ramp in between.
void scale_llama3(const JsonReader& rope, std::vector<double>& frequencies) {
  const double factor = positive(rope, "factor");
  const double low = positive(rope, "low_freq_factor");
  const double high = positive(rope, "high_freq_factor");
  const double original = positive(rope, "original_max_position_embeddings");
  if (!(high > low)) {
    throw ParseError(
        "a key is out of range",
        rope.place("high_freq_factor"),
        "it must exceed low_freq_factor",
        "check the file");
  }
  for (double& f : frequencies) {
    const double wavelength = 2 * std::numbers::pi / f;
    if (wavelength > original / low) {
      f /= factor;
    } else if (wavelength >= original / high) {
      const double ramp = (original / wavelength - low) / (high - low);
      f = (1 - ramp) * f / factor + ramp * f;
    }
  }
}

// GGUF files hold the divisors that follow from Llama 3.1's numbers instead of those.
void divide_frequencies(const JsonReader& rope, std::vector<double>& frequencies) {
  const Json& factors = rope.get_array("factors");
  for (std::size_t m = 0; m < frequencies.size(); ++m) {
    const bool is_there = factors.size() == frequencies.size() && factors[m].is_number();
    const double factor = is_there ? factors[m].get<double>() : 0;
    if (!(factor > 0)) {
      throw ParseError(
          "a key is out of range",
          rope.place("factors"),
          fmt::format("expected {} positive numbers", frequencies.size()),
          "check the file");
    }
    frequencies[m] /= factor;
  }
}

// YaRN (arXiv 2309.00071) as transformers computes it; static, whatever the current length.
double scale_yarn(
    const JsonReader& rope,
    double theta,
    std::int64_t head_dim,
    double max_positions,
    std::vector<double>& frequencies) {
  const double factor = positive(rope, "factor");
  const double original = rope.has("original_max_position_embeddings")
                              ? positive(rope, "original_max_position_embeddings")
                              : max_positions;
  const auto dim = static_cast<double>(head_dim);
  const auto correction = [&](double rotations) {
    return dim * std::log(original / (rotations * 2 * std::numbers::pi)) / (2 * std::log(theta));
  };
  double low = correction(rope.get_number_or("beta_fast", 32));
  double high = correction(rope.get_number_or("beta_slow", 1));
  if (rope.get_bool_or("truncate", true)) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, dim - 1);
  if (low == high) {
    high += 0.001;
  }
  for (std::size_t m = 0; m < frequencies.size(); ++m) {
    const double ramp = std::clamp((static_cast<double>(m) - low) / (high - low), 0.0, 1.0);
    frequencies[m] = frequencies[m] / factor * ramp + frequencies[m] * (1 - ramp);
  }
  if (rope.has("attention_factor")) {
    return positive(rope, "attention_factor");
  }
  const auto mscale = [&](double scale) {
    return factor <= 1 ? 1.0 : 0.1 * scale * std::log(factor) + 1;
  };
  if (rope.has("mscale") && rope.has("mscale_all_dim")) {
    return mscale(rope.get_number("mscale")) / mscale(rope.get_number("mscale_all_dim"));
  }
  return mscale(1);
}

// How many values of a head are rotated.
std::int64_t read_rotary_values(
    const JsonReader& config,
    const std::optional<JsonReader>& scaling,
    std::int64_t head_dim,
    const DecoderDefaults& defaults) {
  constexpr const char* kKey = "partial_rotary_factor";
  if (!defaults.hybrid) {
    refuse_unless(config, kKey, 1.0);
    if (scaling) {
      refuse_unless(*scaling, kKey, 1.0);
    }
    return head_dim;
  }
  constexpr double kDefault = 0.25;
  const double factor = scaling && scaling->has(kKey) ? positive(*scaling, kKey)
                        : config.has(kKey)            ? positive(config, kKey)
                                                      : kDefault;
  const auto values = static_cast<std::int64_t>(factor * static_cast<double>(head_dim));
  if (factor > 1 || values < 2 || values % 2 != 0) {
    throw ParseError(
        "a key is out of range",
        config.place(kKey),
        fmt::format("expected a part of {} values that can be paired, found {}", head_dim, factor),
        "check the file");
  }
  return values;
}

// Both spellings: rope_theta + rope_scaling (old), rope_parameters (transformers 5).
Rope read_rope(
    const JsonReader& config, const ModelConfig& model, const DecoderDefaults& defaults) {
  std::optional<JsonReader> scaling;
  double theta = 10000;
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    if (config.has(key)) {
      scaling = config.get_object(key);
      for (const Json& value : scaling->json()) {
        if (value.is_object()) {
          unsupported(config, key, "one set of values for all layers");
        }
      }
    }
  }
  if (scaling && scaling->has("rope_theta")) {
    theta = positive(*scaling, "rope_theta");
  } else if (config.has("rope_theta")) {
    theta = positive(config, "rope_theta");
  } else if (defaults.theta_required) {
    throw ParseError(
        "a required key is missing",
        config.place("rope_theta"),
        "the usual default of 10000 is wrong for this family",
        "take config.json from the model's own release");
  }
  const std::int64_t rotary = read_rotary_values(config, scaling, model.head_dim, defaults);
  double attention_factor = 1;
  std::vector<double> frequencies = plain_frequencies(theta, rotary);
  if (scaling) {
    const std::string type = scaling->has("rope_type") ? scaling->get_string("rope_type")
                                                       : scaling->get_string_or("type", "default");
    if (type == "llama3") {
      scale_llama3(*scaling, frequencies);
    } else if (type == "yarn") {
      attention_factor = scale_yarn(
          *scaling, theta, rotary, static_cast<double>(model.max_positions), frequencies);
    } else if (type == "linear") {
      const double factor = positive(*scaling, "factor");
      for (double& f : frequencies) {
        f /= factor;
      }
    } else if (type == "frequency_factors") {
      divide_frequencies(*scaling, frequencies);
    } else if (type != "default") {
      throw UnsupportedError(
          "a rope type that quern does not compute",
          scaling->place("rope_type"),
          "expected default, linear, llama3 or yarn, found " + type,
          "remove the scaling if the context is short");
    }
  }
  const auto is_float = [](double value) {
    return std::fabs(value) <= static_cast<double>(std::numeric_limits<float>::max());
  };
  if (!is_float(attention_factor) ||
      !std::all_of(frequencies.begin(), frequencies.end(), is_float)) {
    throw ParseError(
        "the rope values give frequencies that are not finite",
        scaling ? scaling->where() : config.place("rope_theta"),
        fmt::format("rope_theta is {}", theta),
        "take config.json from the model's own release");
  }
  Rope rope;
  rope.attention_factor = static_cast<float>(attention_factor);
  rope.inverse_frequencies.assign(frequencies.begin(), frequencies.end());
  return rope;
}

std::vector<std::int64_t> read_sliding_windows(
    const JsonReader& config, std::int64_t layers, const DecoderDefaults& defaults) {
  std::vector<std::int64_t> windows(static_cast<std::size_t>(layers), 0);
  if (defaults.hybrid) {
    return windows;  // layer_types says which are no attention at all
  }
  const bool on = defaults.sliding_by_key ||
                  (defaults.sliding_by_layer && config.get_bool_or("use_sliding_window", false));
  if (on && config.has("sliding_window")) {
    const std::int64_t window = config.get_int_in("sliding_window", 1, kMaxPositions);
    const std::int64_t first =
        defaults.sliding_by_layer ? config.get_int_in_or("max_window_layers", 0, kMaxWidth, 28) : 0;
    for (std::int64_t layer = first; layer < layers; ++layer) {
      windows[static_cast<std::size_t>(layer)] = window;
    }
  }
  if (!config.has("layer_types")) {
    return windows;
  }
  const Json& types = config.get_array("layer_types");
  if (types.size() != windows.size()) {
    throw ParseError(
        "a key has the wrong length",
        config.place("layer_types"),
        fmt::format("expected {} entries, found {}", windows.size(), types.size()),
        "check the file");
  }
  for (std::size_t layer = 0; layer < windows.size(); ++layer) {
    if (types[layer] == "full_attention") {
      windows[layer] = 0;
    } else if (types[layer] != "sliding_attention") {
      unsupported(config, "layer_types", "full_attention or sliding_attention");
    } else if (windows[layer] == 0) {
      windows[layer] = config.get_int_in("sliding_window", 1, kMaxPositions);
    }
  }
  return windows;
}

// qwen2_moe, qwen3_moe: a layer is a mixture unless it is listed in mlp_only_layers or passed over
// by decoder_sparse_step.
MixtureConfig read_mixture(
    const JsonReader& config, std::int64_t layers, const DecoderDefaults& defaults) {
  MixtureConfig mixture;
  const char* count = config.has("num_experts") ? "num_experts" : "num_local_experts";
  mixture.experts = config.get_int_in(count, 1, 1 << 16);
  mixture.experts_per_token = config.get_int_in("num_experts_per_tok", 1, mixture.experts);
  mixture.expert_width = config.get_int_in("moe_intermediate_size", 1, kMaxWidth);
  mixture.normalize =
      defaults.normalize_experts || config.get_bool_or("norm_topk_prob", defaults.hybrid);
  if (defaults.shared_expert) {
    mixture.shared_width = config.get_int_in("shared_expert_intermediate_size", 1, kMaxWidth);
  }
  const std::int64_t step = config.get_int_in_or("decoder_sparse_step", 1, kMaxWidth, 1);
  for (std::int64_t layer = 0; layer < layers; ++layer) {
    mixture.layers.push_back((layer + 1) % step == 0);
  }
  if (config.has("mlp_only_layers")) {
    for (const Json& layer : config.get_array("mlp_only_layers")) {
      if (!layer.is_number_integer() || layer.get<std::int64_t>() < 0 ||
          layer.get<std::int64_t>() >= layers) {
        unsupported(config, "mlp_only_layers", "indices of layers");
      }
      mixture.layers[layer.get<std::size_t>()] = false;
    }
  }
  return mixture;
}

DeltaNetConfig read_delta_net(
    const JsonReader& config, std::int64_t layers, const DecoderDefaults& defaults) {
  DeltaNetConfig delta;
  delta.key_heads = config.get_int_in_or("linear_num_key_heads", 1, 4096, 16);
  delta.value_heads = config.get_int_in_or("linear_num_value_heads", 1, 4096, 32);
  delta.key_dim = config.get_int_in_or("linear_key_head_dim", 1, 4096, 128);
  delta.value_dim = config.get_int_in_or("linear_value_head_dim", 1, 4096, 128);
  delta.kernel = config.get_int_in_or("linear_conv_kernel_dim", 1, 64, 4);
  delta.fused = defaults.fused_delta_net;
  if (delta.value_heads % delta.key_heads != 0) {
    unsupported(
        config,
        "linear_num_value_heads",
        fmt::format("a multiple of linear_num_key_heads ({})", delta.key_heads));
  }
  const std::string gate = config.get_string_or("output_gate_type", "swish");
  if (gate != "swish" && gate != "silu" && gate != "sigmoid") {
    unsupported(config, "output_gate_type", "swish, silu or sigmoid");
  }
  delta.sigmoid_gate = gate == "sigmoid";
  const std::int64_t interval = config.get_int_in_or("full_attention_interval", 1, 4096, 4);
  for (std::int64_t layer = 0; layer < layers; ++layer) {
    delta.layers.push_back((layer + 1) % interval != 0);
  }
  if (!config.has("layer_types")) {
    return delta;
  }
  const Json& types = config.get_array("layer_types");
  if (types.size() != delta.layers.size()) {
    throw ParseError(
        "a key has the wrong length",
        config.place("layer_types"),
        fmt::format("expected {} entries, found {}", delta.layers.size(), types.size()),
        "check the file");
  }
  for (std::size_t layer = 0; layer < types.size(); ++layer) {
    if (types[layer] != "linear_attention" && types[layer] != "full_attention") {
      unsupported(config, "layer_types", "linear_attention or full_attention");
    }
    delta.layers[layer] = types[layer] == "linear_attention";
  }
  return delta;
}

DType read_dtype(const JsonReader& config) {
  const std::string key = config.has("dtype") ? "dtype" : "torch_dtype";
  const std::string name = config.get_string_or(key, "bfloat16");
  if (name == "bfloat16") {
    return DType::kBF16;
  }
  if (name == "float16") {
    return DType::kF16;
  }
  if (name == "float32") {
    return DType::kF32;
  }
  unsupported(config, key, "bfloat16, float16 or float32");
}

}  // namespace

void refuse_unless(const JsonReader& config, const std::string& key, const Json& expected) {
  if (config.has(key) && *config.json().find(key) != expected) {
    unsupported(config, key, expected.dump());
  }
}

ModelConfig read_outer_config(const JsonReader& config) {
  ModelConfig model;
  model.family = config.get_string("model_type");
  if (config.has("architectures")) {
    const Json& names = config.get_array("architectures");
    model.architecture = names.empty() || !names[0].is_string() ? "" : names[0].get<std::string>();
  }
  model.dtype = read_dtype(config);
  return model;
}

ModelConfig read_decoder_config(const JsonReader& config, const DecoderDefaults& defaults) {
  ModelConfig model = read_outer_config(config);
  for (const char* key : kChangesComputation) {
    if (config.has(key)) {
      unsupported(config, key, "nothing");
    }
  }
  for (const char* key : kMakesMixture) {
    if (config.has(key) && !defaults.mixture) {
      unsupported(config, key, "nothing");
    }
  }
  refuse_unless(config, "hidden_act", "silu");
  model.vocab_size = config.get_int_in("vocab_size", 1, std::int64_t{1} << 24);
  model.hidden_size = config.get_int_in("hidden_size", 1, kMaxWidth);
  model.layers = config.get_int_in("num_hidden_layers", 1, 4096);
  model.heads = config.get_int_in("num_attention_heads", 1, 4096);
  model.kv_heads = config.get_int_in_or("num_key_value_heads", 1, 4096, model.heads);
  const std::int64_t default_dim =
      defaults.default_head_dim != 0 ? defaults.default_head_dim : model.hidden_size / model.heads;
  model.head_dim = config.has("head_dim") ? config.get_int_in("head_dim", 2, 4096) : default_dim;
  const bool needs_mlp = !defaults.mixture;
  model.intermediate_size = needs_mlp || config.has("intermediate_size")
                                ? config.get_int_in("intermediate_size", 1, kMaxWidth)
                                : 0;
  model.max_positions = config.get_int_in_or("max_position_embeddings", 1, kMaxPositions, 2048);
  if (model.heads % model.kv_heads != 0) {
    unsupported(
        config,
        "num_key_value_heads",
        fmt::format("a divisor of num_attention_heads ({})", model.heads));
  }
  if (model.head_dim < 2 || model.head_dim % 2 != 0) {
    throw UnsupportedError(
        "a head width that rotary positions cannot pair",
        config.place("head_dim"),
        fmt::format("expected an even number, found {}", model.head_dim),
        "check the file");
  }
  model.norm_eps =
      static_cast<float>(config.has("rms_norm_eps") ? positive(config, "rms_norm_eps") : 1e-6);
  model.tied_embeddings = config.get_bool_or("tie_word_embeddings", false);
  model.rope = read_rope(config, model, defaults);
  model.sliding_windows = read_sliding_windows(config, model.layers, defaults);
  if (defaults.mixture) {
    model.mixture = read_mixture(config, model.layers, defaults);
    const std::vector<bool>& mixtures = model.mixture->layers;
    if (model.intermediate_size == 0 &&
        std::find(mixtures.begin(), mixtures.end(), false) != mixtures.end()) {
      (void)config.get_int_in("intermediate_size", 1, kMaxWidth);  // of the layers with an MLP
    }
  }
  if (defaults.hybrid) {
    model.delta_net = read_delta_net(config, model.layers, defaults);
    refuse_unless(config, "attn_output_gate", true);
    model.output_gate = true;
    model.zero_centred_norms = true;
  }
  if (config.has("eos_token_id")) {
    const Json& eos = *config.json().find("eos_token_id");
    for (const Json& id : eos.is_array() ? eos : Json::array({eos})) {
      // -1 stands for none in some files and matches nothing; beyond 32 bits is no token.
      const bool fits = id.is_number_unsigned()
                            ? id.get<std::uint64_t>() <= INT32_MAX
                            : id.is_number_integer() && id.get<std::int64_t>() >= INT32_MIN &&
                                  id.get<std::int64_t>() <= INT32_MAX;
      if (!fits) {
        unsupported(config, "eos_token_id", "a token id or a list of them");
      }
      model.eos_ids.push_back(id.get<std::int32_t>());
    }
  }
  return model;
}

}  // namespace quern
