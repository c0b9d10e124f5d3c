// SPDX-License-Identifier: Apache-2.0
#include "format/merged_modules.h"

#include "base/error.h"
#include "format/module_pattern.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <tuple>
#include <utility>

namespace quern {
namespace {

constexpr std::string_view kExperts = ".experts.";
constexpr std::string_view kVision = "visual.";  // the tower of multimodal models, as one

// Linears that serving engines hold as one.
struct Merge {
  std::string_view merged;
  std::vector<std::string_view> parts;
};

const std::vector<Merge>& merges() {
  static const std::vector<Merge> kMerges = {
      {"qkv_proj", {"q_proj", "k_proj", "v_proj"}},
      {"gate_up_proj", {"gate_proj", "up_proj"}},
      {"in_proj_qkvz", {"in_proj_qkv", "in_proj_z"}},
      {"in_proj_ba", {"in_proj_b", "in_proj_a"}},
  };
  return kMerges;
}

const Merge* find_merge(std::string_view leaf) {
  for (const Merge& merge : merges()) {
    if (std::find(merge.parts.begin(), merge.parts.end(), leaf) != merge.parts.end()) {
      return &merge;
    }
  }
  return nullptr;
}

// Where the last component of a name begins.
std::size_t leaf_of(const std::string& name) {
  const std::size_t dot = name.rfind('.');
  return dot == std::string::npos ? 0 : dot + 1;
}

bool is_mtp(const std::string& name) {
  return name.rfind("mtp.", 0) == 0;
}

// The set of modules that must share a rule, as a pattern with the layer left out.
struct Unit {
  std::string head;  // before the layer's number; empty when the name has none
  std::int64_t layer = -1;
  std::string tail;
  bool is_draft = false;

  friend bool operator<(const Unit& a, const Unit& b) {
    return std::tie(a.head, a.layer, a.tail) < std::tie(b.head, b.layer, b.tail);
  }
};

// "self_attn.q_proj" to "self_attn\.(q_proj|k_proj|v_proj|qkv_proj)", and any expert of a layer to
// one pattern for all of them, which also matches the engines' "mlp.experts".
std::string merged_tail(const std::string& tail) {
  const std::size_t experts = tail.find(kExperts);
  if (experts != std::string::npos) {
    return escape_pattern(tail.substr(0, experts + kExperts.size() - 1)) + R"((\..*)?)";
  }
  const std::size_t leaf = leaf_of(tail);
  if (const Merge* merge = find_merge(std::string_view(tail).substr(leaf))) {
    return fmt::format(
        "{}({}|{})",
        escape_pattern(tail.substr(0, leaf)),
        fmt::join(merge->parts, "|"),
        merge->merged);
  }
  return escape_pattern(tail);
}

Unit unit_of(const std::string& name) {
  constexpr std::string_view kLayers = ".layers.";
  const std::size_t at = name.find(kLayers);
  if (at != std::string::npos) {
    const std::size_t number = at + kLayers.size();
    const std::size_t dot = name.find('.', number);
    const std::string digits = name.substr(number, dot - number);
    constexpr std::size_t kMaxDigits = 9;
    if (dot != std::string::npos && !digits.empty() && digits.size() <= kMaxDigits &&
        digits.find_first_not_of("0123456789") == std::string::npos) {
      return {
          is_mtp(name) ? ".*mtp" : ".*",
          std::stoll(digits),
          merged_tail(name.substr(dot + 1)),
          is_mtp(name)};
    }
  }
  // Engines rename the front of a name, not its end.
  std::string tail = name;
  for (const std::string_view front : {"model.", "language_model."}) {
    if (tail.rfind(front, 0) == 0) {
      tail = tail.substr(front.size());
    }
  }
  if (tail.starts_with(kVision)) {
    return {"", -1, escape_pattern(std::string(kVision)) + ".*", false};
  }
  return {"", -1, merged_tail(tail), is_mtp(tail)};
}

std::string describe(const std::optional<ModuleScheme>& scheme) {
  if (!scheme) {
    return "16 bits";
  }
  const QuantScheme& weights = scheme->weights;
  std::string text = fmt::format(
      "{} bits, group {}, {}",
      weights.bits,
      weights.group_size,
      weights.symmetric ? "symmetric" : "asymmetric");
  if (scheme->activation_bits < 16) {
    text += fmt::format(", inputs in {} bits", scheme->activation_bits);
  }
  return text;
}

using Units = std::map<Unit, std::optional<ModuleScheme>>;

Units collect_units(std::span<const SchemedModule> modules) {
  Units units;
  for (const SchemedModule& module : modules) {
    const auto [unit, fresh] = units.emplace(unit_of(module.name), module.scheme);
    if (!fresh && unit->second != module.scheme) {
      throw UnsupportedError(
          "engines need one scheme for linears that they merge",
          module.name,
          fmt::format(
              "expected {} as for its siblings, found {}",
              describe(unit->second),
              describe(module.scheme)),
          "give q, k and v, gate and up, and all experts of a layer the same scheme");
    }
  }
  return units;
}

}  // namespace

std::string ModuleRule::pattern() const {
  if (layers.empty()) {
    return ".*" + tail + "$";
  }
  const std::string numbers = layers.size() == 1 ? std::to_string(layers.front())
                                                 : fmt::format("({})", fmt::join(layers, "|"));
  return fmt::format(R"({}\.layers\.{}\.{}$)", head, numbers, tail);
}

std::vector<ModuleRule> module_rules(std::span<const SchemedModule> modules) {
  std::vector<ModuleRule> rules;
  for (const auto& entry : collect_units(modules)) {
    const auto& unit = entry.first;
    const auto& scheme = entry.second;
    auto rule = std::find_if(rules.begin(), rules.end(), [&](const ModuleRule& each) {
      return each.head == unit.head && each.tail == unit.tail && each.scheme == scheme;
    });
    if (rule == rules.end()) {
      rule = rules.insert(rules.end(), {unit.head, unit.tail, {}, scheme, unit.is_draft});
    }
    if (unit.layer >= 0) {
      rule->layers.push_back(unit.layer);
    }
  }
  return rules;
}

std::string merged_name(const std::string& module) {
  const std::size_t experts = module.find(kExperts);
  if (experts != std::string::npos) {
    return module.substr(0, experts + kExperts.size() - 1);
  }
  const std::size_t leaf = leaf_of(module);
  const Merge* merge = find_merge(std::string_view(module).substr(leaf));
  return merge == nullptr ? module : module.substr(0, leaf) + std::string(merge->merged);
}

}  // namespace quern
