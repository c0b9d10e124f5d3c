// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace quern {

// The tensors of dense decoders (qwen2, qwen3, llama) in checkpoints and in GGUF files:
// "model.layers.3.mlp.up_proj.weight" and "blk.3.ffn_up.weight" (gguf/tensor_mapping.py of
// llama.cpp). Nothing for names of other tensors.
[[nodiscard]] std::optional<std::string> gguf_tensor_name(const std::string& name);
[[nodiscard]] std::optional<std::string> checkpoint_tensor_name(const std::string& gguf_name);

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
