// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "model/config.h"

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace quern {

// The tensors of decoders in checkpoints and in GGUF files: "model.layers.3.mlp.up_proj.weight" and
// "blk.3.ffn_up.weight" (gguf/tensor_mapping.py of llama.cpp). Nothing for names of other tensors.
// `architecture` is that of the file; only the name of one norm depends on it. Checkpoints' names
// may have the prefix of multimodal models, "model.language_model."; it is never given back.
[[nodiscard]] std::optional<std::string> gguf_tensor_name(
    const std::string& name, std::string_view architecture = {});
[[nodiscard]] std::optional<std::string> checkpoint_tensor_name(
    const std::string& gguf_name, std::string_view architecture = {});

// "model." for the prefix "model.language_model.".
[[nodiscard]] std::string without_multimodal_prefix(const std::string& name);

// The experts of a layer are slices of one tensor [experts, out, in]:
// "model.layers.3.mlp.experts.7.up_proj.weight" is slice 7 of "blk.3.ffn_up_exps.weight".
struct GgufSlice {
  std::string stack;
  std::int64_t expert = 0;
};
[[nodiscard]] std::optional<GgufSlice> gguf_slice(const std::string& name);
// The modules that a slice of a stack holds, one below the other, with {} for the expert: one, or
// gate_proj and up_proj ("ffn_gate_up_exps"). Empty for other tensors.
[[nodiscard]] std::vector<std::string> gguf_stack_modules(const std::string& gguf_name);

// Qwen3-Next's in_proj_qkvz stands by key head: its query, its key, the values and the gates of its
// value heads. GGUF has two tensors, attn_qkv (all queries, keys, values) and attn_gate. Element r
// is the row of in_proj_qkvz in row r of the one or the other.
struct GgufDeltaRows {
  std::vector<std::int64_t> qkv;
  std::vector<std::int64_t> gate;
};
[[nodiscard]] GgufDeltaRows gguf_delta_rows(const DeltaNetConfig& shape);
inline constexpr std::string_view kFusedDeltaInput = ".linear_attn.in_proj_qkvz.weight";

// The architectures qwen35 and qwen35moe have the value heads of DeltaNet in another order: all
// first ones of the key heads, then all second ones (_LinearAttentionVReorderBase of llama.cpp's
// conversion/qwen.py). Element h is the checkpoint's head in place h of the file; empty when the
// order is the same.
[[nodiscard]] std::vector<std::int64_t> gguf_value_heads(
    std::string_view architecture, const DeltaNetConfig& shape);
// What that does to the tensor `name`: element r is the checkpoint's row in row r of the GGUF
// tensor; empty when all rows stand in order.
[[nodiscard]] std::vector<std::int64_t> gguf_delta_row_order(
    std::string_view architecture, const std::string& name, const DeltaNetConfig& shape);
// The one tensor whose columns stand by value head.
inline constexpr std::string_view kDeltaOutput = ".linear_attn.out_proj.weight";

// How values of a float tensor change on the way into a GGUF file (conversion/qwen.py).
enum class GgufValues {
  kSame,
  kPlusOne,  // gains of norms that are stored around 0
  kMinusExp  // A_log: the decay itself
};
// `hybrid`: of a model with DeltaNet.
[[nodiscard]] GgufValues gguf_values(const std::string& name, bool hybrid);
// Whether two tensors are the same but for what this change, there and back, leaves of them.
[[nodiscard]] bool same_but_for_gguf(
    GgufValues change, std::span<const float> a, std::span<const float> b);
void to_gguf_values(GgufValues change, std::span<float> values);
void from_gguf_values(GgufValues change, std::span<float> values);

// Rotary positions of the architecture "llama" pair neighbours, so its query and key rows stand
// interleaved (LlamaModel.permute of llama.cpp's conversion/llama.py); the other architectures pair
// halves of a head, as checkpoints do. Element r is the row of the checkpoint's tensor `name`
// (weight or bias) that stands in row r of the GGUF tensor; empty when all rows stand in order.
[[nodiscard]] std::vector<std::int64_t> gguf_row_order(
    std::string_view architecture,
    const std::string& name,
    std::int64_t rows,
    std::int64_t head_dim);

// The divisors of rotary frequencies, F32 [head_dim / 2]; only where Llama 3.1's scaling is used.
inline constexpr const char* kRopeFactorsName = "rope_freqs.weight";

}  // namespace quern
