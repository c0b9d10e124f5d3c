// SPDX-License-Identifier: Apache-2.0
#include "format/gguf_names.h"

#include <algorithm>
#include <array>
#include <utility>

namespace quern {
namespace {

using NamePair = std::pair<std::string_view, std::string_view>;

constexpr std::string_view kBlock = "model.layers.";
constexpr std::string_view kGgufBlock = "blk.";

constexpr std::array<NamePair, 3> kOutside = {{
    {"model.embed_tokens", "token_embd"},
    {"model.norm", "output_norm"},
    {"lm_head", "output"},
}};

constexpr std::array<NamePair, 11> kInside = {{
    {"input_layernorm", "attn_norm"},
    {"self_attn.q_proj", "attn_q"},
    {"self_attn.k_proj", "attn_k"},
    {"self_attn.v_proj", "attn_v"},
    {"self_attn.o_proj", "attn_output"},
    {"self_attn.q_norm", "attn_q_norm"},
    {"self_attn.k_norm", "attn_k_norm"},
    {"post_attention_layernorm", "ffn_norm"},
    {"mlp.gate_proj", "ffn_gate"},
    {"mlp.up_proj", "ffn_up"},
    {"mlp.down_proj", "ffn_down"},
}};

// The partner of `module` in a table, looked up by its first or its second names.
template <std::size_t kCount>
std::optional<std::string_view> partner(
    const std::array<NamePair, kCount>& table, std::string_view module, bool by_first) {
  for (const auto& [first, second] : table) {
    if (module == (by_first ? first : second)) {
      return by_first ? second : first;
    }
  }
  return std::nullopt;
}

// Translates PREFIX N.MODULE.SUFFIX, or MODULE.SUFFIX outside of blocks.
std::optional<std::string> translate(
    std::string_view name, std::string_view from, std::string_view to, bool by_first) {
  const std::size_t dot = name.rfind('.');
  if (dot == std::string_view::npos) {
    return std::nullopt;
  }
  const std::string_view suffix = name.substr(dot);
  if (suffix != ".weight" && suffix != ".bias") {
    return std::nullopt;
  }
  std::string_view module = name.substr(0, dot);
  if (!module.starts_with(from)) {
    const auto found = partner(kOutside, module, by_first);
    return found ? std::optional(std::string(*found) += suffix) : std::nullopt;
  }
  module.remove_prefix(from.size());
  const std::size_t end = module.find('.');
  const std::string_view number = module.substr(0, end);
  const bool is_number = !number.empty() && number.size() <= 6 &&
                         (number[0] != '0' || number.size() == 1) &&
                         number.find_first_not_of("0123456789") == std::string_view::npos;
  if (end == std::string_view::npos || !is_number) {
    return std::nullopt;
  }
  const auto found = partner(kInside, module.substr(end + 1), by_first);
  if (!found) {
    return std::nullopt;
  }
  return (std::string(to) += number).append(".").append(*found).append(suffix);
}

}  // namespace

std::optional<std::string> gguf_tensor_name(const std::string& name) {
  return translate(name, kBlock, kGgufBlock, true);
}

std::optional<std::string> checkpoint_tensor_name(const std::string& gguf_name) {
  return translate(gguf_name, kGgufBlock, kBlock, false);
}

std::vector<std::int64_t> gguf_row_order(
    std::string_view architecture,
    const std::string& name,
    std::int64_t rows,
    std::int64_t head_dim) {
  constexpr std::array<std::string_view, 4> kRotated = {
      ".q_proj.weight", ".q_proj.bias", ".k_proj.weight", ".k_proj.bias"};
  const bool is_rotated = std::any_of(
      kRotated.begin(), kRotated.end(), [&](std::string_view end) { return name.ends_with(end); });
  if (architecture != "llama" || !is_rotated) {
    return {};
  }
  std::vector<std::int64_t> order;
  order.reserve(static_cast<std::size_t>(rows));
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t in_head = row % head_dim;
    order.push_back(row - in_head + in_head % 2 * (head_dim / 2) + in_head / 2);
  }
  return order;
}

}  // namespace quern
