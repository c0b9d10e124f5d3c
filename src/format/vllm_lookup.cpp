// SPDX-License-Identifier: Apache-2.0
#include "format/vllm_lookup.h"

#include "format/awq.h"
#include "format/compressed_tensors_config.h"
#include "format/gptq_config.h"

#include <algorithm>
#include <array>
#include <utility>

namespace quern {
namespace {

constexpr std::string_view kExperts = ".experts.";

// Prefixes of names, as models/qwen3_vl.py maps them for multimodal classes.
std::string with_vllm_prefix(const std::string& name, bool multimodal) {
  using Pair = std::pair<std::string_view, std::string_view>;
  constexpr std::array<Pair, 3> kPrefixes = {{
      {"model.visual.", "visual."},
      {"model.language_model.", "language_model.model."},
      {"lm_head", "language_model.lm_head"},
  }};
  for (const auto& [from, to] : kPrefixes) {
    if (multimodal && name.starts_with(from)) {
      return std::string(to) + name.substr(from.size());
    }
  }
  return name;
}

class GptqLookup : public VllmLookup {
 public:
  GptqLookup(GptqConfig config, bool multimodal)
      : config_(std::move(config)), multimodal_(multimodal) {}

  [[nodiscard]] Answer ask(std::span<const std::string> parts) const override {
    const std::string name = vllm_name(parts.front(), multimodal_);
    const bool experts = parts.front().find(kExperts) != std::string::npos;
    Answer answer;
    if (const auto scheme = config_.scheme_for(name)) {
      answer.scheme = ModuleScheme{*scheme};
      answer.decided_by_file = !experts;  // auto_gptq.py maybe_update_config
    }
    return answer;
  }
  [[nodiscard]] bool keeps_draft() const override {
    return std::any_of(config_.rules.begin(), config_.rules.end(), [](const GptqRule& rule) {
      return !rule.quantize && rule.pattern.text().find("mtp") != std::string::npos;
    });
  }

 private:
  GptqConfig config_;
  bool multimodal_;
};

// auto_awq.py: entries are parts of names.
class AwqLookup : public VllmLookup {
 public:
  AwqLookup(const AwqConfig& config, bool multimodal)
      : scheme_(config.scheme), multimodal_(multimodal) {
    for (const std::string& entry : config.unconverted) {
      skipped_.push_back(with_vllm_prefix(entry, multimodal));
    }
  }

  [[nodiscard]] Answer ask(std::span<const std::string> parts) const override {
    Answer answer;
    answer.any_symmetry = true;
    answer.decided_by_file = skipped_.empty();
    std::size_t skipped = 0;
    for (const std::string& part : parts) {
      const bool is_expert = part.find(kExperts) != std::string::npos;
      const std::string name =
          is_expert ? vllm_name(part, multimodal_) : with_vllm_prefix(part, multimodal_);
      const bool is_skipped =
          std::any_of(skipped_.begin(), skipped_.end(), [&](const std::string& entry) {
            return name.find(entry) != std::string::npos;
          });
      skipped += is_skipped ? 1 : 0;
    }
    answer.contradicts_itself = skipped != 0 && skipped != parts.size();
    if (skipped == 0) {
      answer.scheme = ModuleScheme{scheme_};
    }
    return answer;
  }

 private:
  QuantScheme scheme_;
  std::vector<std::string> skipped_;
  bool multimodal_;
};

// Names in `targets` and `ignore` are renamed with the modules; expressions and classes are not.
Json with_vllm_names(Json quantization, bool multimodal) {
  const auto rename = [&](Json& list) {
    for (Json& entry : list) {
      const std::string text = entry.is_string() ? entry.get<std::string>() : "";
      if (!text.starts_with("re:") && text.find('.') != std::string::npos) {
        entry = with_vllm_prefix(text, multimodal);
      }
    }
  };
  if (quantization.contains("ignore")) {
    rename(quantization["ignore"]);
  }
  for (Json& group : quantization.at("config_groups")) {
    if (group.is_object() && group.contains("targets")) {
      rename(group["targets"]);
    }
  }
  return quantization;
}

// compressed_tensors/utils.py should_ignore_layer and find_matched_target.
class CompressedLookup : public VllmLookup {
 public:
  CompressedLookup(CompressedConfig config, bool multimodal)
      : config_(std::move(config)), multimodal_(multimodal) {}

  [[nodiscard]] Answer ask(std::span<const std::string> parts) const override {
    std::vector<std::string> asked;
    if (parts.front().find(kExperts) != std::string::npos) {
      // Only the first expert is looked at.
      const std::string experts = vllm_name(parts.front(), multimodal_);
      asked = {experts + ".0.gate_proj", experts + ".0.up_proj", experts + ".0.down_proj"};
    } else {
      for (const std::string& part : parts) {
        asked.push_back(with_vllm_prefix(part, multimodal_));
      }
    }
    Answer answer;
    for (std::size_t i = 0; i < asked.size(); ++i) {
      const std::optional<ModuleScheme> scheme = scheme_of(config_.form_for(asked[i]));
      answer.contradicts_itself = answer.contradicts_itself || (i > 0 && scheme != answer.scheme);
      answer.scheme = i == 0 ? scheme : answer.scheme;
    }
    return answer;
  }

 private:
  static std::optional<ModuleScheme> scheme_of(const CompressedForm* form) {
    if (form == nullptr) {
      return std::nullopt;
    }
    const ActivationScheme& inputs = form->activation;
    return ModuleScheme{form->scheme, inputs.bits, inputs.dynamic || !inputs.active()};
  }

  CompressedConfig config_;
  bool multimodal_;
};

}  // namespace

std::string vllm_name(const std::string& module, bool multimodal) {
  return with_vllm_prefix(merged_name(module), multimodal);
}

std::unique_ptr<VllmLookup> vllm_lookup(
    const std::string& format,
    const Json& quantization,
    bool multimodal,
    const std::string& where) {
  if (format.starts_with("gptq")) {
    return std::make_unique<GptqLookup>(read_gptq_config(quantization, where), multimodal);
  }
  if (format == "awq") {
    return std::make_unique<AwqLookup>(read_awq_config(quantization, where), multimodal);
  }
  if (format == "compressed-tensors") {
    return std::make_unique<CompressedLookup>(
        read_compressed_config(with_vllm_names(quantization, multimodal), where), multimodal);
  }
  return nullptr;
}

}  // namespace quern
