// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/json.h"
#include "tensor/tensor.h"

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace quern {

// Rotary position embedding, half-split pairing over the whole head.
struct Rope {
  std::vector<float> inverse_frequencies;  // [head_dim / 2], scaling applied
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

// The checked values of config.json that every dense decoder has. Filled by the family file.
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
  std::vector<std::int32_t> eos_ids;  // of config.json; generation_config.json may say more
};

// What differs between families in how config.json is read; see read_dense_config.
struct DenseDefaults {
  bool theta_required = true;  // transformers' default of 10000 is wrong for every released Qwen
  bool sliding_by_layer = false;  // Qwen: only with use_sliding_window, from max_window_layers on
  bool sliding_by_key = false;  // Mistral: `sliding_window` unless null
  std::int64_t default_head_dim = 0;  // when head_dim is absent; 0: hidden_size / heads
  bool mixture = false;  // reads MixtureConfig too
  bool shared_expert = false;  // Qwen2-MoE: shared_expert_intermediate_size
};

// Reads the keys that the dense families share, range-checked, and refuses (UnsupportedError) the
// values and keys that would change the computation in ways that quern does not have.
[[nodiscard]] ModelConfig read_dense_config(
    const JsonReader& config, const DenseDefaults& defaults);

// Throws UnsupportedError when `key` is present, not null and not `expected`.
void refuse_unless(const JsonReader& config, const std::string& key, const Json& expected);

}  // namespace quern
