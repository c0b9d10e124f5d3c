// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "quant/scheme.h"

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace quern {

// Serving engines hold some linears of a checkpoint as one (q, k and v; gate and up; all experts of
// a layer), under names of their own and behind other prefixes. Configurations that give modules
// different schemes must be right for both sets of names.

// What is done to a module. Everything that must agree between parts of one merged module.
struct ModuleScheme {
  QuantScheme weights;
  int activation_bits = 16;
  bool activation_dynamic = true;

  friend bool operator==(const ModuleScheme&, const ModuleScheme&) = default;
};

struct SchemedModule {
  std::string name;
  std::optional<ModuleScheme> scheme;  // none: it keeps its floats
};

// Modules of one kind and scheme in one or more layers.
struct ModuleRule {
  std::string head;  // pattern of what stands before the number of the layer
  std::string tail;  // pattern of what stands behind it, or of the whole name
  std::vector<std::int64_t> layers;  // empty: a module outside the layers
  std::optional<ModuleScheme> scheme;
  bool is_draft = false;  // of the draft layers ("mtp")

  // A regular expression that matches, from the start, every name of these modules and of what
  // engines merge them into, whatever their prefix: ".*\.layers\.(0|3)\.self_attn\.(q_proj|…)$".
  [[nodiscard]] std::string pattern() const;
};

// All modules as rules that exclude each other (but that a rule for a layer also matches that layer
// of the draft model). Throws UnsupportedError when parts of one merged module have different
// schemes.
[[nodiscard]] std::vector<ModuleRule> module_rules(std::span<const SchemedModule> modules);

// The module that engines hold `module` in: "….self_attn.qkv_proj"; `module` itself when it is not
// merged with others. Experts become "….mlp.experts".
[[nodiscard]] std::string merged_name(const std::string& module);

}  // namespace quern
