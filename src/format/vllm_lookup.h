// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/json.h"
#include "format/merged_modules.h"

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace quern {

// What vLLM 0.33 finds in a quantization configuration. It asks under its own names of modules:
// other prefixes (models/qwen3_vl.py hf_to_vllm_mapper), linears that it merges, all experts of a
// layer as one. A configuration that is right for the names of the file may be wrong for these.

// The name under which vLLM holds a module of a checkpoint, merged. `multimodal`: of a class
// …ForConditionalGeneration, whose decoder is a part of the model.
[[nodiscard]] std::string vllm_name(const std::string& module, bool multimodal);

class VllmLookup {
 public:
  virtual ~VllmLookup() = default;

  struct Answer {
    std::optional<ModuleScheme> scheme;  // none: floats
    bool any_symmetry = false;  // zero points are stored, and are what they are (AWQ)
    bool decided_by_file = false;  // without a rule, by the dtypes in the file (GPTQ)
    bool contradicts_itself = false;  // parts of a merged module are named differently
  };
  // `parts`: the checkpoint's modules that vLLM holds as one; all experts of a layer, or one
  // linear.
  [[nodiscard]] virtual Answer ask(std::span<const std::string> parts) const = 0;
  // GPTQ: whether draft layers are built without quantization (models/qwen3_5_mtp.py).
  [[nodiscard]] virtual bool keeps_draft() const { return false; }
};

// For the formats gptq, awq and compressed-tensors; null for others. Throws as their readers do.
[[nodiscard]] std::unique_ptr<VllmLookup> vllm_lookup(
    const std::string& format, const Json& quantization, bool multimodal, const std::string& where);

}  // namespace quern
