// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/json.h"
#include "format/compressed_tensors.h"
#include "format/module_pattern.h"

#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace quern {

// Entries of `targets` and `ignore`, in their order: a whole module name, "re:" and an expression
// that is matched from the start of the name, or the name of a class ("Linear", "Embedding").
class ModuleTargets {
 public:
  // `index` is what a match gives. Throws ParseError for an entry that was added before, and for
  // malformed expressions.
  void add(const std::string& entry, std::size_t index, const std::string& where);

  // The index of the first entry that is the name or whose expression matches it.
  [[nodiscard]] std::optional<std::size_t> find_name(const std::string& module) const;
  // The index of the first entry that is part of the name of the class, without regard to case.
  [[nodiscard]] std::optional<std::size_t> find_class(std::string_view name) const;
  // Whether that very text is an entry.
  [[nodiscard]] bool contains(const std::string& entry) const { return names_.contains(entry); }

 private:
  struct Expression {
    ModulePattern pattern;
    std::size_t order;
    std::size_t index;
  };
  struct Place {
    std::size_t order;
    std::size_t index;
  };
  struct Class {
    std::string lower_case;
    std::size_t index;
  };
  std::size_t order_ = 0;
  std::unordered_map<std::string, Place> names_;  // expressions as well
  std::vector<Expression> expressions_;
  std::vector<Class> classes_;  // entries that may be one: without dots
};

// What `quantization_config` says of a compressed-tensors checkpoint, checked.
struct CompressedConfig {
  std::vector<CompressedForm> forms;  // of config_groups, in their order
  ModuleTargets targets;  // index: into `forms`
  ModuleTargets ignore;

  // The form of a module, as vLLM 0.33 looks for it (compressed_tensors/utils.py): nothing for
  // what is ignored; then names and expressions on the module's name, in the order of the groups;
  // then on the name that engines merge it under; then classes. Nothing when none matches.
  [[nodiscard]] const CompressedForm* form_for(const std::string& module) const;
};

// Throws ParseError, and UnsupportedError for settings under which the tensors do not give the
// computation: floats in 4 or 8 bits, sparsity, transforms, a quantized cache, checkpoints that
// were not compressed.
[[nodiscard]] CompressedConfig read_compressed_config(const Json& json, const std::string& where);

// A linear of the model that is written; no form when it keeps its floats.
struct CompressedModule {
  std::string name;
  std::optional<CompressedForm> form;
  bool is_linear = true;  // false for embeddings and head, which engines hold in other classes
};

// The object for `quantization_config`. The most frequent form is that of the class "Linear"; other
// forms, embeddings and the head are named by expressions that exclude each other, because readers
// differ in the order in which they ask them (vLLM: that of the groups; compressed-tensors:
// alphabetic), and that match engines' names of merged modules too. Throws UnsupportedError when
// parts of one merged module have different forms.
[[nodiscard]] Json compressed_config_json(std::span<const CompressedModule> modules);

}  // namespace quern
