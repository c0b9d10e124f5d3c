// SPDX-License-Identifier: Apache-2.0
#include "format/gguf_names.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
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

constexpr std::array<NamePair, 23> kInside = {{
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
    {"mlp.gate", "ffn_gate_inp"},
    {"mlp.shared_expert_gate", "ffn_gate_inp_shexp"},
    {"mlp.shared_expert.gate_proj", "ffn_gate_shexp"},
    {"mlp.shared_expert.up_proj", "ffn_up_shexp"},
    {"mlp.shared_expert.down_proj", "ffn_down_shexp"},
    {"linear_attn.in_proj_qkv", "attn_qkv"},
    {"linear_attn.in_proj_z", "attn_gate"},
    {"linear_attn.in_proj_b", "ssm_beta"},
    {"linear_attn.in_proj_a", "ssm_alpha"},
    {"linear_attn.in_proj_ba", "ssm_ba"},
    {"linear_attn.norm", "ssm_norm"},
    {"linear_attn.out_proj", "ssm_out"},
}};

// Names with an end of their own.
constexpr std::array<NamePair, 3> kWhole = {{
    {"linear_attn.A_log", "ssm_a"},
    {"linear_attn.dt_bias", "ssm_dt.bias"},
    {"linear_attn.conv1d.weight", "ssm_conv1d.weight"},
}};

// The norm before the MLP, where layers have DeltaNet.
constexpr NamePair kHybridNorm = {"post_attention_layernorm.weight", "post_attention_norm.weight"};

constexpr std::array<NamePair, 3> kStacks = {{
    {".gate_proj.weight", ".ffn_gate_exps.weight"},
    {".up_proj.weight", ".ffn_up_exps.weight"},
    {".down_proj.weight", ".ffn_down_exps.weight"},
}};

bool is_hybrid(std::string_view architecture) {
  return architecture == "qwen3next" || architecture.starts_with("qwen35");
}

bool is_number(std::string_view text) {
  return !text.empty() && text.size() <= 6 && (text[0] != '0' || text.size() == 1) &&
         text.find_first_not_of("0123456789") == std::string_view::npos;
}

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
    std::string_view name,
    std::string_view from,
    std::string_view to,
    bool by_first,
    std::string_view architecture) {
  const std::size_t dot = name.rfind('.');
  if (dot == std::string_view::npos) {
    return std::nullopt;
  }
  const std::string_view suffix = name.substr(dot);
  const bool plain = suffix == ".weight" || suffix == ".bias";
  if (!name.starts_with(from)) {
    const auto found = plain ? partner(kOutside, name.substr(0, dot), by_first) : std::nullopt;
    return found ? std::optional(std::string(*found) += suffix) : std::nullopt;
  }
  name.remove_prefix(from.size());
  const std::size_t end = name.find('.');
  if (end == std::string_view::npos || !is_number(name.substr(0, end))) {
    return std::nullopt;
  }
  const std::string block = std::string(to).append(name.substr(0, end)).append(".");
  const std::string_view inside = name.substr(end + 1);
  if (const auto whole = partner(kWhole, inside, by_first)) {
    return block + std::string(*whole);
  }
  const auto& [norm, gguf_norm] = kHybridNorm;
  if (is_hybrid(architecture) && inside == (by_first ? norm : gguf_norm)) {
    return block + std::string(by_first ? gguf_norm : norm);
  }
  const auto found =
      plain ? partner(kInside, inside.substr(0, inside.rfind('.')), by_first) : std::nullopt;
  if (!found) {
    return std::nullopt;
  }
  return block + std::string(*found).append(suffix);
}

}  // namespace

std::string without_multimodal_prefix(const std::string& name) {
  constexpr std::string_view kLong = "model.language_model.";
  return name.starts_with(kLong) ? "model." + name.substr(kLong.size()) : name;
}

std::optional<std::string> gguf_tensor_name(
    const std::string& name, std::string_view architecture) {
  return translate(without_multimodal_prefix(name), kBlock, kGgufBlock, true, architecture);
}

std::optional<std::string> checkpoint_tensor_name(
    const std::string& gguf_name, std::string_view architecture) {
  return translate(gguf_name, kGgufBlock, kBlock, false, architecture);
}

std::optional<GgufSlice> gguf_slice(const std::string& name) {
  constexpr std::string_view kExperts = ".mlp.experts.";
  const std::string plain = without_multimodal_prefix(name);
  const std::size_t at = plain.find(kExperts);
  if (!plain.starts_with(kBlock) || at == std::string::npos) {
    return std::nullopt;
  }
  const std::string layer = plain.substr(kBlock.size(), at - kBlock.size());
  const std::size_t number = at + kExperts.size();
  const std::size_t dot = plain.find('.', number);
  if (dot == std::string::npos || !is_number(layer) ||
      !is_number(std::string_view(plain).substr(number, dot - number))) {
    return std::nullopt;
  }
  const auto stack = partner(kStacks, std::string_view(plain).substr(dot), true);
  if (!stack) {
    return std::nullopt;
  }
  return GgufSlice{
      std::string(kGgufBlock) + layer + std::string(*stack),
      std::stoll(plain.substr(number, dot - number))};
}

std::vector<std::string> gguf_stack_modules(const std::string& gguf_name) {
  const std::size_t dot = gguf_name.find('.', kGgufBlock.size());
  if (!gguf_name.starts_with(kGgufBlock) || dot == std::string::npos ||
      !is_number(std::string_view(gguf_name).substr(kGgufBlock.size(), dot - kGgufBlock.size()))) {
    return {};
  }
  const std::string experts = std::string(kBlock) +
                              gguf_name.substr(kGgufBlock.size(), dot - kGgufBlock.size()) +
                              ".mlp.experts.{}";
  const std::string_view tensor = std::string_view(gguf_name).substr(dot);
  if (tensor == ".ffn_gate_up_exps.weight") {
    return {experts + ".gate_proj", experts + ".up_proj"};
  }
  const auto part = partner(kStacks, tensor, false);
  if (!part) {
    return {};
  }
  return {experts + std::string(part->substr(0, part->rfind('.')))};
}

GgufDeltaRows gguf_delta_rows(const DeltaNetConfig& shape) {
  const std::int64_t values = shape.value_heads / shape.key_heads * shape.value_dim;
  const std::int64_t head_rows = 2 * (shape.key_dim + values);
  GgufDeltaRows rows;
  // `count` rows of every key head, from `first` in its part.
  const auto take = [&](std::int64_t first, std::int64_t count, std::vector<std::int64_t>& to) {
    for (std::int64_t head = 0; head < shape.key_heads; ++head) {
      for (std::int64_t i = 0; i < count; ++i) {
        to.push_back(head * head_rows + first + i);
      }
    }
  };
  take(0, shape.key_dim, rows.qkv);
  take(shape.key_dim, shape.key_dim, rows.qkv);
  take(2 * shape.key_dim, values, rows.qkv);
  take(2 * shape.key_dim + values, values, rows.gate);
  return rows;
}

std::vector<std::int64_t> gguf_value_heads(
    std::string_view architecture, const DeltaNetConfig& shape) {
  const std::int64_t group = shape.value_heads / shape.key_heads;
  if (!architecture.starts_with("qwen35") || group == 1 || shape.key_heads == 1) {
    return {};
  }
  std::vector<std::int64_t> heads;
  for (std::int64_t place = 0; place < shape.value_heads; ++place) {
    heads.push_back(place % shape.key_heads * group + place / shape.key_heads);
  }
  return heads;
}

std::vector<std::int64_t> gguf_delta_row_order(
    std::string_view architecture, const std::string& name, const DeltaNetConfig& shape) {
  const std::vector<std::int64_t> heads = gguf_value_heads(architecture, shape);
  const std::size_t at = name.find(".linear_attn.");
  if (heads.empty() || at == std::string::npos) {
    return {};
  }
  const std::string_view tensor = std::string_view(name).substr(at + 13);
  const bool has_keys = tensor == "in_proj_qkv.weight" || tensor == "conv1d.weight";
  const bool is_wide = has_keys || tensor == "in_proj_z.weight";
  const bool is_scalar = tensor == "in_proj_a.weight" || tensor == "in_proj_b.weight" ||
                         tensor == "A_log" || tensor == "dt_bias";
  if (!is_wide && !is_scalar) {
    return {};
  }
  std::vector<std::int64_t> order(static_cast<std::size_t>(has_keys ? 2 * shape.key_width() : 0));
  std::iota(order.begin(), order.end(), 0);
  const auto first = static_cast<std::int64_t>(order.size());
  const std::int64_t rows = is_wide ? shape.value_dim : 1;
  for (const std::int64_t head : heads) {
    for (std::int64_t i = 0; i < rows; ++i) {
      order.push_back(first + head * rows + i);
    }
  }
  return order;
}

GgufValues gguf_values(const std::string& name, bool hybrid) {
  if (!hybrid) {
    return GgufValues::kSame;
  }
  if (name.ends_with(".A_log")) {
    return GgufValues::kMinusExp;
  }
  const bool is_norm = name.ends_with("norm.weight") && !name.ends_with("linear_attn.norm.weight");
  return is_norm ? GgufValues::kPlusOne : GgufValues::kSame;
}

bool same_but_for_gguf(GgufValues change, std::span<const float> a, std::span<const float> b) {
  const float tolerance = change == GgufValues::kSame ? 0.0F : 0x1p-20F;
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [&](float x, float y) {
    return std::fabs(x - y) <= tolerance * (1.0F + std::fabs(y));
  });
}

void to_gguf_values(GgufValues change, std::span<float> values) {
  for (float& value : values) {
    value = change == GgufValues::kPlusOne    ? value + 1.0F
            : change == GgufValues::kMinusExp ? -std::exp(value)
                                              : value;
  }
}

void from_gguf_values(GgufValues change, std::span<float> values) {
  for (float& value : values) {
    value = change == GgufValues::kPlusOne    ? value - 1.0F
            : change == GgufValues::kMinusExp ? std::log(-value)
                                              : value;
  }
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
