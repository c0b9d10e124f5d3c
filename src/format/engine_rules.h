// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/json.h"
#include "quant/scheme.h"
#include "tensor/tensor.h"

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace quern {

// What serving engines take of a quantized checkpoint. The rules were read in the engines' sources
// or seen to hold (scripts/check_independent_engine.py); they are about what a checkpoint is, not
// about the machine that it will run on.

// How tensor parallelism divides a module.
enum class EngineSplit { kOutputs, kKeyValueHeads, kInputs, kNone };

// What a module is to engines.
enum class EngineKind {
  kLinear,
  kExpert,  // routed: all of a layer are one module
  kGate,  // router, gate of a shared expert: made without quantization
  kEmbedding,
  kHead,
  kBeside  // of the vision tower or the draft layers
};

// A linear, or the table of embeddings, as an engine sees it.
struct EngineModule {
  std::string name;
  std::int64_t out_features = 0;
  std::int64_t in_features = 0;
  std::optional<QuantScheme> scheme;  // none: floats
  DType scale_dtype = DType::kF16;
  ActivationScheme activation;
  bool act_order = false;  // has a group index
  EngineKind kind = EngineKind::kLinear;
  EngineSplit split = EngineSplit::kOutputs;
};

// DeltaNet layers; engines give each device whole heads.
struct EngineDeltaNet {
  std::int64_t key_heads = 0;
  std::int64_t value_heads = 0;
};

struct EngineModel {
  std::string format;  // Checkpoint::format()
  std::string family;  // model_type of config.json
  DType dtype = DType::kBF16;
  bool tied = false;
  bool says_desc_act = false;  // GPTQ: `desc_act` of the configuration
  std::int64_t heads = 1;
  std::int64_t kv_heads = 1;
  std::int64_t experts = 0;
  std::optional<EngineDeltaNet> delta_net;
  bool multimodal = false;  // of a class …ForConditionalGeneration
  Json quantization;  // quantization_config of config.json; null: none
  std::vector<EngineModule> modules;
};

struct EngineVerdict {
  std::string_view engine;
  std::string_view version;
  std::vector<std::string> problems;  // why it does not load; empty: it does
  std::vector<std::string> notes;  // what to know when it does
};

// One line of the list in engine_rules.cpp.
struct Engine {
  std::string_view name;
  std::string_view version;  // whose sources the rules were read in
  void (*judge)(const EngineModel& model, EngineVerdict& verdict);
};

[[nodiscard]] std::span<const Engine> engines() noexcept;
// Throws UsageError with the known names.
[[nodiscard]] const Engine& find_engine(const std::string& name);

[[nodiscard]] EngineVerdict judge(const Engine& engine, const EngineModel& model);

// The largest number of devices (a power of two) among which vLLM and SGLang can divide the model:
// heads are shared out evenly, and each device gets whole groups and whole words of every quantized
// module.
[[nodiscard]] std::int64_t largest_tensor_parallel(const EngineModel& model);

}  // namespace quern
