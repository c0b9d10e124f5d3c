// SPDX-License-Identifier: Apache-2.0
#include "format/engine_rules.h"

#include "base/error.h"
#include "format/merged_modules.h"
#include "format/vllm_lookup.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <utility>

namespace quern {
namespace {

bool is_one_of(std::int64_t value, std::initializer_list<std::int64_t> list) {
  return std::find(list.begin(), list.end(), value) != list.end();
}

bool is_gptq(const EngineModel& model) {
  return model.format.starts_with("gptq");
}

bool is_compressed(const EngineModel& model) {
  return model.format == "compressed-tensors";
}

// Groups for which the Marlin kernels are built (vllm and sglang marlin_utils.py); 0: the row.
bool is_marlin_group(const QuantScheme& scheme) {
  return is_one_of(scheme.group_size, {0, 32, 64, 128});
}

// Whether packed words and groups cover the inputs without a remainder.
bool fills_inputs(const QuantScheme& scheme, std::int64_t inputs) {
  return inputs % scheme.group_width(inputs) == 0 && inputs * scheme.bits % 32 == 0;
}

using Condition = std::function<bool(const EngineModule& module, const QuantScheme& scheme)>;

// Adds a line for the quantized modules that meet the condition: the first by name, and how many.
void list_modules(
    const EngineModel& model,
    const std::string& what,
    const Condition& condition,
    std::vector<std::string>& lines) {
  const EngineModule* first = nullptr;
  std::int64_t count = 0;
  for (const EngineModule& module : model.modules) {
    if (module.scheme && condition(module, *module.scheme)) {
      first = first == nullptr ? &module : first;
      ++count;
    }
  }
  if (first != nullptr) {
    lines.push_back(
        count == 1 ? fmt::format("{}: {}", what, first->name)
                   : fmt::format("{}: {} and {} more", what, first->name, count - 1));
  }
}

bool is_weight_only(const EngineModule& module) {
  return !module.activation.active();
}

std::optional<ModuleScheme> scheme_of(const EngineModule& module) {
  if (!module.scheme) {
    return std::nullopt;
  }
  return ModuleScheme{
      *module.scheme,
      module.activation.bits,
      module.activation.dynamic || !module.activation.active()};
}

// Parts of merged modules must have one scheme.
void require_equal_parts(const EngineModel& model, EngineVerdict& verdict) {
  std::map<std::string, const EngineModule*> merged;
  for (const EngineModule& module : model.modules) {
    const auto [entry, fresh] = merged.emplace(merged_name(module.name), &module);
    if (!fresh && scheme_of(*entry->second) != scheme_of(module)) {
      verdict.problems.push_back(fmt::format(
          "parts of one merged module have different schemes: {} and {}",
          entry->second->name,
          module.name));
      return;
    }
  }
}

// The linears of one engine module, in the order of the file.
using MergedModules = std::map<std::string, std::vector<const EngineModule*>>;

MergedModules merged_modules(const EngineModel& model) {
  MergedModules merged;
  for (const EngineModule& module : model.modules) {
    merged[merged_name(module.name)].push_back(&module);
  }
  return merged;
}

// The configuration, asked under vLLM's names, must say what the file holds.
void require_fitting_names(const EngineModel& model, EngineVerdict& verdict) {
  if (model.quantization.is_null()) {
    return;
  }
  const std::unique_ptr<VllmLookup> lookup = vllm_lookup(
      model.format, model.quantization, model.multimodal, "config.json: quantization_config");
  if (lookup == nullptr) {
    return;
  }
  std::vector<std::string> misfits;
  bool has_plain_draft = false;
  bool has_quantized_draft = false;
  for (const auto& [name, parts] : merged_modules(model)) {
    const EngineModule& first = *parts.front();
    if (first.kind == EngineKind::kGate || first.kind == EngineKind::kEmbedding ||
        (first.kind == EngineKind::kHead && !first.scheme)) {
      continue;  // never asked for
    }
    if (first.name.starts_with("mtp.layers.")) {
      (first.scheme ? has_quantized_draft : has_plain_draft) = true;
    }
    std::vector<std::string> names;
    for (const EngineModule* part : parts) {
      names.push_back(part->name);
    }
    VllmLookup::Answer answer = lookup->ask(names);
    if (answer.any_symmetry && answer.scheme && first.scheme) {
      answer.scheme->weights.symmetric = first.scheme->symmetric;
    }
    const bool fits = !first.scheme ? !answer.scheme || answer.decided_by_file
                                    : answer.scheme == scheme_of(first);
    if (!fits || answer.contradicts_itself) {
      misfits.push_back(vllm_name(first.name, model.multimodal));
    }
  }
  if (!misfits.empty()) {
    verdict.problems.push_back(fmt::format(
        "the configuration, under vLLM's names of modules, does not say what the file holds: {}{}",
        misfits.front(),
        misfits.size() == 1 ? "" : fmt::format(" and {} more", misfits.size() - 1)));
  }
  if (is_gptq(model) && has_plain_draft && !lookup->keeps_draft()) {
    verdict.problems.emplace_back(R"(draft layers in floats need a rule "-:.*mtp.*")");
  }
  if (is_gptq(model) && has_quantized_draft && lookup->keeps_draft()) {
    verdict.problems.emplace_back("quantized draft layers, and a rule that says that they are not");
  }
}

void require_known_format(
    const EngineModel& model,
    std::initializer_list<std::string_view> known,
    EngineVerdict& verdict) {
  const bool is_known = std::any_of(known.begin(), known.end(), [&](std::string_view name) {
    return model.format == name || (name == "gptq" && is_gptq(model));
  });
  if (!is_known) {
    verdict.problems.push_back(
        model.format == "quern" ? "only quern reads its own container: quern export"
                                : fmt::format("it does not read {}", model.format));
  }
}

void require_plain_embeddings(const EngineModel& model, EngineVerdict& verdict) {
  list_modules(
      model,
      "no quantized embeddings in this format",
      [](const EngineModule& module, const QuantScheme&) {
        return module.kind == EngineKind::kEmbedding;
      },
      verdict.problems);
}

// qwen3_next.py, qwen3_moe.py and qwen2_moe.py make them with quant_config=None.
void require_plain_gates(const EngineModel& model, EngineVerdict& verdict) {
  list_modules(
      model,
      "routers and gates of shared experts are loaded in floats only",
      [](const EngineModule& module, const QuantScheme&) {
        return module.kind == EngineKind::kGate;
      },
      verdict.problems);
}

// vLLM and SGLang (Marlin): 4 and 8 bits, symmetric.
void judge_marlin_gptq(const EngineModel& model, EngineVerdict& verdict) {
  require_plain_embeddings(model, verdict);
  list_modules(
      model,
      "only 4 and 8 bits, symmetric",
      [](const EngineModule&, const QuantScheme& scheme) {
        return !scheme.symmetric || !is_one_of(scheme.bits, {4, 8});
      },
      verdict.problems);
  list_modules(
      model,
      "groups of 32, 64, 128 or whole rows only",
      [](const EngineModule&, const QuantScheme& scheme) { return !is_marlin_group(scheme); },
      verdict.problems);
}

void judge_vllm_gptq(const EngineModel& model, EngineVerdict& verdict) {
  judge_marlin_gptq(model, verdict);
  list_modules(
      model,
      "inputs that do not fill whole words and groups",
      [](const EngineModule& module, const QuantScheme& scheme) {
        return !fills_inputs(scheme, module.in_features);
      },
      verdict.problems);
  // gptq_utils.py normalize_and_validate_gptq_desc_act
  const bool grouped =
      std::any_of(model.modules.begin(), model.modules.end(), [](const EngineModule& module) {
        return module.scheme && module.scheme->group_size != 0;
      });
  if (model.says_desc_act && grouped) {
    verdict.problems.emplace_back("desc_act: true with groups is refused");
  }
}

void judge_awq(const EngineModel& model, EngineVerdict& verdict) {
  require_plain_embeddings(model, verdict);
  list_modules(
      model,
      "no Marlin kernel for these groups, a slower one is used",
      [](const EngineModule&, const QuantScheme& scheme) { return !is_marlin_group(scheme); },
      verdict.notes);
}

// compressed_tensors_embedding.py, and which models pass their configuration to it.
void judge_vllm_embeddings(const EngineModel& model, EngineVerdict& verdict) {
  constexpr std::array<std::string_view, 4> kFamilies = {
      "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"};
  const auto embedding =
      std::find_if(model.modules.begin(), model.modules.end(), [](const EngineModule& module) {
        return module.kind == EngineKind::kEmbedding && module.scheme;
      });
  if (embedding == model.modules.end()) {
    return;
  }
  if (std::find(kFamilies.begin(), kFamilies.end(), model.family) == kFamilies.end()) {
    verdict.problems.push_back(
        fmt::format("no quantized embeddings for the family {}", model.family));
  }
  if (model.tied) {
    verdict.problems.emplace_back("a quantized table cannot be tied to the head");
  }
  if (!embedding->scheme->symmetric || !is_one_of(embedding->scheme->bits, {2, 4, 8})) {
    verdict.problems.emplace_back("embeddings: 2, 4 or 8 bits, symmetric, only");
  }
}

void judge_vllm_compressed(const EngineModel& model, EngineVerdict& verdict) {
  judge_vllm_embeddings(model, verdict);
  list_modules(
      model,
      "act-order group indexes are refused",
      [](const EngineModule& module, const QuantScheme&) { return module.act_order; },
      verdict.problems);
  list_modules(
      model,
      "inputs that do not fill whole words and groups",
      [](const EngineModule& module, const QuantScheme& scheme) {
        return is_weight_only(module) && !fills_inputs(scheme, module.in_features);
      },
      verdict.problems);
  // compressed_tensors.py _is_dynamic_token_w8a8, _is_static_tensor_w8a8,
  // _is_dynamic_token_w4a8_int
  list_modules(
      model,
      "integer inputs only as W8A8 by channel or dynamic W4A8, symmetric",
      [](const EngineModule& module, const QuantScheme& scheme) {
        const bool w8 = scheme.bits == 8 && scheme.group_size == 0;
        const bool w4 = scheme.bits == 4 && module.activation.dynamic;
        return !is_weight_only(module) &&
               (!scheme.symmetric || module.activation.bits != 8 || (!w8 && !w4));
      },
      verdict.problems);
  // compressed_tensors_moe_wna16_marlin.py, compressed_tensors_moe.py
  list_modules(
      model,
      "experts: 4 or 8 bits only, integer inputs only with dynamic scales",
      [](const EngineModule& module, const QuantScheme& scheme) {
        return module.kind == EngineKind::kExpert &&
               (!is_one_of(scheme.bits, {4, 8}) ||
                (!is_weight_only(module) && !module.activation.dynamic));
      },
      verdict.problems);
  const auto has_kernel = [](const QuantScheme& scheme) {
    return scheme.bits == 4 || (scheme.bits == 8 && scheme.symmetric);
  };
  list_modules(
      model,
      "needs the optional Humming kernels (CUDA)",
      [&](const EngineModule& module, const QuantScheme& scheme) {
        return is_weight_only(module) && module.kind != EngineKind::kEmbedding &&
               !has_kernel(scheme);
      },
      verdict.notes);
  list_modules(
      model,
      "no Marlin kernel for these groups",
      [&](const EngineModule& module, const QuantScheme& scheme) {
        return is_weight_only(module) && module.kind != EngineKind::kEmbedding &&
               has_kernel(scheme) && !is_marlin_group(scheme);
      },
      verdict.notes);
  list_modules(
      model,
      "scales are rounded to the dtype of the model at load",
      [&](const EngineModule& module, const QuantScheme&) {
        return is_weight_only(module) && module.scale_dtype != model.dtype;
      },
      verdict.notes);
}

void judge_vllm(const EngineModel& model, EngineVerdict& verdict) {
  if (model.format == "gguf") {
    verdict.problems.emplace_back("GGUF is in a plugin, not in its core");
    return;
  }
  require_known_format(model, {"dense", "gptq", "awq", "compressed-tensors", "fp8"}, verdict);
  require_equal_parts(model, verdict);
  require_plain_gates(model, verdict);
  require_fitting_names(model, verdict);
  if (is_gptq(model)) {
    judge_vllm_gptq(model, verdict);
  } else if (model.format == "awq") {
    judge_awq(model, verdict);
  } else if (is_compressed(model)) {
    judge_vllm_compressed(model, verdict);
  }
}

void judge_sglang_gptq(const EngineModel& model, EngineVerdict& verdict) {
  require_plain_embeddings(model, verdict);
  list_modules(
      model,
      "only 2, 3, 4 and 8 bits",
      [](const EngineModule&, const QuantScheme& scheme) {
        return !is_one_of(scheme.bits, {2, 3, 4, 8});
      },
      verdict.problems);
  if (model.format == "gptq_p") {
    verdict.problems.emplace_back("only GPTQModel reads the planar layout");
  }
  if (model.format == "gptq_v2") {
    verdict.notes.emplace_back("gptq_v2 is refused on CPUs");
  }
  EngineVerdict marlin;
  judge_marlin_gptq(model, marlin);
  if (!marlin.problems.empty()) {
    verdict.notes.push_back("no Marlin kernel: " + marlin.problems.front());
  }
}

void judge_sglang_compressed(const EngineModel& model, EngineVerdict& verdict) {
  require_plain_embeddings(model, verdict);
  list_modules(
      model,
      "weights alone: only 4 and 8 bits",
      [](const EngineModule& module, const QuantScheme& scheme) {
        return is_weight_only(module) && !is_one_of(scheme.bits, {4, 8});
      },
      verdict.problems);
  list_modules(
      model,
      "integer inputs only as W8A8 by channel, symmetric",
      [](const EngineModule& module, const QuantScheme& scheme) {
        return !is_weight_only(module) && (scheme.bits != 8 || module.activation.bits != 8 ||
                                           scheme.group_size != 0 || !scheme.symmetric);
      },
      verdict.problems);
  list_modules(
      model,
      "no Marlin kernel for these groups",
      [](const EngineModule& module, const QuantScheme& scheme) {
        return is_weight_only(module) && !is_marlin_group(scheme);
      },
      verdict.notes);
}

void judge_sglang(const EngineModel& model, EngineVerdict& verdict) {
  require_known_format(
      model, {"dense", "gptq", "awq", "compressed-tensors", "fp8", "gguf"}, verdict);
  require_equal_parts(model, verdict);
  if (is_gptq(model)) {
    judge_sglang_gptq(model, verdict);
  } else if (model.format == "awq") {
    judge_awq(model, verdict);
  } else if (is_compressed(model)) {
    judge_sglang_compressed(model, verdict);
  }
}

// Seen to hold with the versions that scripts/check_independent_engine.py names.
void judge_transformers_compressed(const EngineModel& model, EngineVerdict& verdict) {
  list_modules(
      model,
      "asymmetric packed weights do not load (compressed-tensors 0.20.0)",
      [](const EngineModule& module, const QuantScheme& scheme) {
        return is_weight_only(module) && !scheme.symmetric;
      },
      verdict.problems);
  list_modules(
      model,
      "quantized embeddings do not load (compressed-tensors 0.20.0)",
      [](const EngineModule& module, const QuantScheme&) {
        return module.kind == EngineKind::kEmbedding;
      },
      verdict.problems);
  list_modules(
      model,
      "act-order group indexes are refused",
      [](const EngineModule& module, const QuantScheme&) { return module.act_order; },
      verdict.problems);
  list_modules(
      model,
      "integer inputs are scaled by max|x| / 127.5, where engines take 127",
      [](const EngineModule& module, const QuantScheme&) {
        return module.activation.active() && module.activation.dynamic;
      },
      verdict.notes);
}

void judge_transformers(const EngineModel& model, EngineVerdict& verdict) {
  require_known_format(
      model, {"dense", "gptq", "awq", "compressed-tensors", "fp8", "gguf"}, verdict);
  if (is_gptq(model)) {
    require_plain_embeddings(model, verdict);
    // Through optimum, which does not read `dynamic`.
    const auto base =
        std::find_if(model.modules.begin(), model.modules.end(), [](const EngineModule& module) {
          return module.scheme.has_value();
        });
    list_modules(
        model,
        "one scheme for all modules (GPTQModel itself reads mixed ones)",
        [&](const EngineModule&, const QuantScheme& scheme) { return scheme != *base->scheme; },
        verdict.problems);
  } else if (is_compressed(model)) {
    judge_transformers_compressed(model, verdict);
  } else if (model.format == "gguf") {
    verdict.notes.emplace_back("GGUF is expanded to 16 bits");
  }
}

void judge_llama_cpp(const EngineModel& model, EngineVerdict& verdict) {
  if (model.format != "gguf") {
    verdict.problems.emplace_back("it reads GGUF only");
  }
}

// Whether a module can be divided among so many devices.
bool divides(const EngineModel& model, const EngineModule& module, std::int64_t devices) {
  if (module.split == EngineSplit::kNone) {
    return true;
  }
  if (module.split == EngineSplit::kInputs) {
    return module.in_features % devices == 0 &&
           (!module.scheme || !is_weight_only(module) ||
            fills_inputs(*module.scheme, module.in_features / devices));
  }
  // Key and value heads are repeated when there are fewer than devices.
  const std::int64_t shares =
      module.split == EngineSplit::kKeyValueHeads ? std::min(devices, model.kv_heads) : devices;
  if (module.out_features % shares != 0) {
    return false;
  }
  // Codes (AWQ) or zero points (GPTQ) are packed along the outputs.
  const bool packed_outputs = is_gptq(model) || model.format == "awq";
  return !module.scheme || !packed_outputs ||
         module.out_features / shares * module.scheme->bits % 32 == 0;
}

}  // namespace

std::span<const Engine> engines() noexcept {
  static constexpr std::array<Engine, 4> kEngines = {{
      {"vllm", "0.33", judge_vllm},
      {"sglang", "0.5.23", judge_sglang},
      {"transformers", "5.23", judge_transformers},
      {"llama.cpp", "llama-cpp-python 0.3.36", judge_llama_cpp},
  }};
  return kEngines;
}

const Engine& find_engine(const std::string& name) {
  std::string known;
  for (const Engine& engine : engines()) {
    if (engine.name == name) {
      return engine;
    }
    known += (known.empty() ? "" : ", ") + std::string(engine.name);
  }
  throw UsageError(
      "unknown engine", "--engine " + name, "expected one of " + known, "--engine vllm");
}

EngineVerdict judge(const Engine& engine, const EngineModel& model) {
  EngineVerdict verdict;
  verdict.engine = engine.name;
  verdict.version = engine.version;
  engine.judge(model, verdict);
  return verdict;
}

std::int64_t largest_tensor_parallel(const EngineModel& model) {
  constexpr std::int64_t kMost = 64;
  std::int64_t largest = 1;
  for (std::int64_t devices = 2; devices <= kMost; devices *= 2) {
    const bool heads = model.heads % devices == 0 &&
                       (model.kv_heads % devices == 0 || devices % model.kv_heads == 0) &&
                       (!model.delta_net || (model.delta_net->key_heads % devices == 0 &&
                                             model.delta_net->value_heads % devices == 0)) &&
                       (model.experts == 0 || devices <= model.experts);
    if (heads &&
        std::all_of(model.modules.begin(), model.modules.end(), [&](const EngineModule& module) {
          return divides(model, module, devices);
        })) {
      largest = devices;
    }
  }
  return largest;
}

}  // namespace quern
