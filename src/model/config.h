// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/json.h"
#include "tensor/tensor.h"

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace quern {

// Rotary position embedding, half-split pairing over the first values of a head; the others pass.
struct Rope {
  std::vector<float> inverse_frequencies;  // [rotary values / 2], scaling applied
  float attention_factor = 1;  // multiplies cos and sin (YaRN)
};

// The feed-forward part of a mixture of experts.
struct MixtureConfig {
  std::int64_t experts = 0;
  std::int64_t experts_per_token = 0;
  std::int64_t expert_width = 0;  // of the hidden values of one expert
  std::int64_t shared_width = 0;  // of an expert that every token takes; 0: none
  bool normalize = false;  // weights of the chosen experts are divided by their sum
  std::vector<bool> layers;  // [layers] true: a mixture, false: a dense MLP
};

// Gated DeltaNet (linear attention): Qwen3-Next and Qwen3.5 and later.
struct DeltaNetConfig {
  std::int64_t key_heads = 0;
  std::int64_t value_heads = 0;  // a multiple; value head i reads key head i / (values / keys)
  std::int64_t key_dim = 0;
  std::int64_t value_dim = 0;
  std::int64_t kernel = 0;  // of the causal convolution
  bool sigmoid_gate = false;  // of the output norm; else SiLU
  bool fused = false;  // Qwen3-Next: rows of one projection stand by key head
  std::vector<bool> layers;  // [layers] true: DeltaNet, false: attention

  [[nodiscard]] std::int64_t key_width() const noexcept { return key_heads * key_dim; }
  [[nodiscard]] std::int64_t value_width() const noexcept { return value_heads * value_dim; }
  // Queries, keys and values side by side.
  [[nodiscard]] std::int64_t channels() const noexcept { return 2 * key_width() + value_width(); }
};

// The checked values of config.json that every decoder has. Filled by the family file.
struct ModelConfig {
  std::string family;  // model_type: "qwen3"
  std::string architecture;  // architectures[0], for people
  std::int64_t vocab_size = 0;
  std::int64_t hidden_size = 0;
  std::int64_t layers = 0;
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t intermediate_size = 0;
  std::int64_t max_positions = 0;
  float norm_eps = 0;
  bool tied_embeddings = false;
  Rope rope;
  std::vector<std::int64_t> sliding_windows;  // [layers] tokens seen, itself included; 0: all
  DType dtype = DType::kBF16;  // of the source weights
  std::optional<MixtureConfig> mixture;
  std::optional<DeltaNetConfig> delta_net;
  bool output_gate = false;  // q_proj gives a gate beside each head's query
  bool zero_centred_norms = false;  // gains are stored around 0: y = (1 + w) x / rms
  std::vector<std::int32_t> eos_ids;  // of config.json; generation_config.json may say more
};

// What differs between families in how config.json is read; see read_decoder_config.
struct DecoderDefaults {
  bool theta_required = true;  // transformers' default of 10000 is wrong for every released Qwen
  bool sliding_by_layer = false;  // Qwen: only with use_sliding_window, from max_window_layers on
  bool sliding_by_key = false;  // Mistral: `sliding_window` unless null
  std::int64_t default_head_dim = 0;  // when head_dim is absent; 0: hidden_size / heads
  bool mixture = false;  // reads MixtureConfig too
  bool shared_expert = false;  // shared_expert_intermediate_size
  bool normalize_experts = false;  // always, without a key (Qwen3.5)
  // Qwen3-Next and later: DeltaNet layers between gated attention, rotation of a part of each head,
  // zero-centred norms.
  bool hybrid = false;
  bool fused_delta_net = false;  // with the projections of Qwen3-Next
};

// Reads the keys that the dense families share, range-checked, and refuses (UnsupportedError) the
// values and keys that would change the computation in ways that quern does not have.
[[nodiscard]] ModelConfig read_decoder_config(
    const JsonReader& config, const DecoderDefaults& defaults);

// Family, architecture and dtype of a config.json whose other keys are in an object inside.
[[nodiscard]] ModelConfig read_outer_config(const JsonReader& config);

// Throws UnsupportedError when `key` is present, not null and not `expected`.
void refuse_unless(const JsonReader& config, const std::string& key, const Json& expected);

}  // namespace quern
