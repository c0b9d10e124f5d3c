// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/json.h"
#include "format/gptq.h"
#include "format/module_pattern.h"
#include "quant/scheme.h"

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace quern {

// One entry of `dynamic`: modules that match are left alone, or quantized with other settings.
struct GptqRule {
  ModulePattern pattern;
  bool quantize = true;  // false for "-:"
  std::optional<int> bits;
  std::optional<std::int64_t> group_size;  // 0: the whole row
  std::optional<bool> symmetric;
};

// What `quantization_config` says of a GPTQ checkpoint, checked.
struct GptqConfig {
  QuantScheme scheme;
  GptqVersion version = GptqVersion::kV1;
  bool desc_act = false;
  bool lm_head = false;
  std::vector<GptqRule> rules;

  // The scheme of a module by the first rule that matches, in the order of the file; none when that
  // rule excludes it. Readers that ask "-:" rules first come to the same for every module that is
  // stored in quantized form.
  [[nodiscard]] std::optional<QuantScheme> scheme_for(const std::string& module) const;
};

// `json` is the object `quantization_config` of config.json, or quantize_config.json. `second`,
// when not null, is the other of the two: it fills in what the first does not say, and must not
// contradict it. Throws ParseError, and UnsupportedError for settings that change the computation
// in ways quern does not know.
[[nodiscard]] GptqConfig read_gptq_config(
    const Json& json,
    const std::string& where,
    const Json* second = nullptr,
    const std::string& second_where = {});

// A linear of the model that is written, and what became of it: no scheme when it keeps 16 bits.
struct GptqModule {
  std::string name;
  std::optional<QuantScheme> scheme;
};

// The object for `quantization_config` and quantize_config.json. `modules` are all linears of the
// model, quantized or not; those that differ from `scheme` get rules in `dynamic`. Rules are
// written for readers that match the names of a file and for those that match the names of their
// own merged modules: they begin with ".*", match a tail of the name that both share, name the
// merged module beside its parts, and those that exclude come first. Throws UnsupportedError when
// parts of one merged module (q, k, v; gate, up; all experts of a layer) have different schemes.
// `meta` is kept beside the name of the program.
[[nodiscard]] Json gptq_config_json(
    const QuantScheme& scheme,
    GptqVersion version,
    std::span<const GptqModule> modules,
    const Json& meta = Json::object());

}  // namespace quern
