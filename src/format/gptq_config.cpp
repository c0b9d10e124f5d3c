// SPDX-License-Identifier: Apache-2.0
#include "format/gptq_config.h"

#include "base/error.h"
#include "format/merged_modules.h"

#include <fmt/format.h>
#include <quern/version.h>

#include <algorithm>
#include <initializer_list>
#include <string_view>
#include <utility>

namespace quern {
namespace {

constexpr std::int64_t kMaxGroupSize = 1 << 20;
constexpr std::size_t kMaxRules = 20'000;

// What one of the two places of a configuration says; absent where it says nothing.
struct Said {
  std::optional<std::int64_t> bits;
  std::optional<std::int64_t> group_size;
  std::optional<bool> symmetric;
  std::optional<std::string> version;
  std::optional<bool> desc_act;
  std::optional<bool> lm_head;
};

[[noreturn]] void contradiction(
    const std::string& place, const std::string& first, const std::string& second) {
  throw ParseError(
      "the quantization configuration contradicts itself",
      place,
      fmt::format(
          "expected {} as said before, found {}", printable(first, 60), printable(second, 60)),
      "correct the configuration, or download the model again");
}

std::string text_of(std::int64_t value) {
  return std::to_string(value);
}
std::string text_of(bool value) {
  return value ? "true" : "false";
}
std::string text_of(const std::string& value) {
  return value;
}

template <class T>
void agree(std::optional<T>& known, const std::optional<T>& said, const std::string& place) {
  if (known && said && *known != *said) {
    contradiction(place, text_of(*known), text_of(*said));
  }
  if (!known) {
    known = said;
  }
}

template <class T, class Get>
std::optional<T> first_of(
    const JsonReader& reader, std::initializer_list<const char*> keys, Get get) {
  std::optional<T> value;
  for (const char* key : keys) {
    if (reader.has(key)) {
      agree(value, std::optional<T>(get(key)), reader.place(key));
    }
  }
  return value;
}

std::optional<std::int64_t> read_bits(
    const JsonReader& reader, std::initializer_list<const char*> keys) {
  return first_of<std::int64_t>(
      reader, keys, [&](const char* key) { return reader.get_int_in(key, 2, 8); });
}

std::optional<std::int64_t> read_group_size(
    const JsonReader& reader, std::initializer_list<const char*> keys) {
  return first_of<std::int64_t>(reader, keys, [&](const char* key) {
    const std::int64_t size = reader.get_int_in(key, -1, kMaxGroupSize);
    if (size == 0) {
      throw ParseError(
          "a key is out of range",
          reader.place(key),
          "expected -1 or a positive number of columns, found 0",
          "check the file");
    }
    return size < 0 ? std::int64_t{0} : size;
  });
}

std::optional<bool> read_flag(const JsonReader& reader, const char* key) {
  return reader.has(key) ? std::optional(reader.get_bool_or(key, false)) : std::nullopt;
}

// Settings under which the tensors alone do not give the weights.
void refuse_unknown_computation(const JsonReader& reader) {
  for (const char* key : {"rotation", "activation", "adapter"}) {
    if (!reader.has(key)) {
      continue;
    }
    const Json& value = reader.json().at(key);
    const bool off =
        value.is_boolean() ? !value.get<bool>() : value.empty() || value == Json(std::string());
    if (!off) {
      throw UnsupportedError(
          "a GPTQ setting that quern does not handle",
          reader.place(key),
          fmt::format(
              "expected none, found {}",
              printable(value.dump(-1, ' ', false, Json::error_handler_t::replace), 60)),
          "use a checkpoint without it");
    }
  }
  const std::string pack = reader.get_string_or("pack_dtype", "int32");
  if (pack != "int32") {
    throw UnsupportedError(
        "a packing that quern does not read",
        reader.place("pack_dtype"),
        fmt::format("expected int32, found {}", printable(pack, 40)),
        "convert the checkpoint with GPTQModel to pack_dtype int32");
  }
}

Said read_said(const JsonReader& reader) {
  refuse_unknown_computation(reader);
  Said said;
  said.bits = read_bits(reader, {"bits", "w_bit", "wbits"});
  said.group_size = read_group_size(reader, {"group_size", "q_group_size"});
  said.symmetric = read_flag(reader, "sym");
  if (const std::optional<bool> zero_point = read_flag(reader, "zero_point")) {
    agree(said.symmetric, std::optional(!*zero_point), reader.place("zero_point"));
  }
  const auto get = [&](const char* key) { return reader.get_string(key); };
  said.version = first_of<std::string>(reader, {"checkpoint_format", "format"}, get);
  if (!said.version) {
    said.version = first_of<std::string>(reader, {"version"}, get);
  }
  said.desc_act = read_flag(reader, "desc_act");
  said.lm_head = read_flag(reader, "lm_head");
  return said;
}

GptqVersion read_version(const Said& said, const std::string& where) {
  const std::string name = said.version.value_or("gptq");
  const std::optional<GptqVersion> version = gptq_version_from_name(name);
  if (!version) {
    throw UnsupportedError(
        "a GPTQ variant that quern does not read",
        where + ": checkpoint_format",
        fmt::format("expected gptq, gptq_v2 or gptq_p, found {}", printable(name, 40)),
        "convert the checkpoint with GPTQModel to the gptq format");
  }
  return *version;
}

std::vector<GptqRule> read_rules(const JsonReader& reader) {
  std::vector<GptqRule> rules;
  if (!reader.has("dynamic") || reader.json().at("dynamic") == false) {
    return rules;
  }
  const JsonReader dynamic = reader.get_object("dynamic");
  if (dynamic.json().size() > kMaxRules) {
    throw UnsupportedError(
        "too many rules",
        dynamic.where(),
        fmt::format("expected at most {}, found {}", kMaxRules, dynamic.json().size()),
        "write fewer rules that match more modules each");
  }
  for (const auto& [key, value] : dynamic.json().items()) {
    const std::string place = dynamic.place(printable(key));
    const bool sign = key.rfind("-:", 0) == 0 || key.rfind("+:", 0) == 0;
    GptqRule rule{
        ModulePattern(sign ? key.substr(2) : key, place), key.rfind("-:", 0) != 0, {}, {}, {}};
    if (rule.quantize && !value.is_null()) {
      const JsonReader overrides(value, place);
      refuse_unknown_computation(overrides);
      if (const auto bits = read_bits(overrides, {"bits"})) {
        rule.bits = static_cast<int>(*bits);
      }
      rule.group_size = read_group_size(overrides, {"group_size"});
      rule.symmetric = read_flag(overrides, "sym");
    }
    rules.push_back(std::move(rule));
  }
  return rules;
}

template <class T>
T required(const std::optional<T>& value, const std::string& place) {
  if (!value) {
    throw ParseError(
        "a required key is missing", place, "nothing found", "check that the file is complete");
  }
  return *value;
}

// --- writing ---------------------------------------------------------------------------------

std::int64_t written_group_size(const QuantScheme& scheme) {
  return scheme.group_size == 0 ? -1 : scheme.group_size;
}

Json overrides_of(const QuantScheme& scheme, const QuantScheme& common) {
  Json overrides = Json::object();
  if (scheme.bits != common.bits) {
    overrides["bits"] = scheme.bits;
  }
  if (scheme.group_size != common.group_size) {
    overrides["group_size"] = written_group_size(scheme);
  }
  if (scheme.symmetric != common.symmetric) {
    overrides["sym"] = scheme.symmetric;
  }
  return overrides;
}

// Draft layers: vLLM leaves all of them unquantized as soon as one excluding rule says "mtp".
bool all_mtp_unquantized(std::span<const GptqModule> modules) {
  std::optional<std::string> plain;
  std::optional<std::string> quantized;
  for (const GptqModule& module : modules) {
    // mtp.fc keeps its precision without a rule: engines see it in the file.
    if (module.name.starts_with("mtp.") && module.name != "mtp.fc") {
      (module.scheme ? quantized : plain) = module.name;
    }
  }
  if (plain && quantized) {
    throw UnsupportedError(
        "GPTQ readers take draft layers quantized or not, never half",
        *plain,
        fmt::format("expected a scheme as for {}, found 16 bits", *quantized),
        "quantize all linears of the draft layers, or none");
  }
  return plain.has_value();
}

Json dynamic_rules(const QuantScheme& common, std::span<const GptqModule> modules) {
  const bool plain_mtp = all_mtp_unquantized(modules);
  std::vector<SchemedModule> named;
  for (const GptqModule& module : modules) {
    named.push_back({module.name, {}});
    if (module.scheme) {
      named.back().scheme = ModuleScheme{*module.scheme};
    }
  }
  std::vector<ModuleRule> excluded;
  std::vector<ModuleRule> draft;
  std::vector<ModuleRule> changed;
  for (const ModuleRule& rule : module_rules(named)) {
    if (rule.tail == "lm_head" && !rule.scheme) {
      continue;  // the key lm_head says so
    }
    if (rule.is_draft && (plain_mtp || !rule.scheme)) {
      continue;
    }
    // A rule for layer 0 also matches layer 0 of the draft model, so drafts always get their own.
    if (rule.is_draft || !rule.scheme || rule.scheme->weights != common) {
      (!rule.scheme ? excluded : rule.is_draft ? draft : changed).push_back(rule);
    }
  }
  Json rules = Json::object();
  if (plain_mtp) {
    rules["-:.*mtp.*"] = Json::object();
  }
  for (const ModuleRule& rule : excluded) {
    rules["-:" + rule.pattern()] = Json::object();
  }
  for (const std::vector<ModuleRule>* list : {&draft, &changed}) {
    for (const ModuleRule& rule : *list) {
      rules["+:" + rule.pattern()] = overrides_of(rule.scheme->weights, common);
    }
  }
  return rules;
}

}  // namespace

std::optional<QuantScheme> GptqConfig::scheme_for(const std::string& module) const {
  for (const GptqRule& rule : rules) {
    if (!rule.pattern.matches(module)) {
      continue;
    }
    if (!rule.quantize) {
      return std::nullopt;
    }
    QuantScheme found = scheme;
    found.bits = rule.bits.value_or(found.bits);
    found.group_size = rule.group_size.value_or(found.group_size);
    found.symmetric = rule.symmetric.value_or(found.symmetric);
    return found;
  }
  return scheme;
}

GptqConfig read_gptq_config(
    const Json& json,
    const std::string& where,
    const Json* second,
    const std::string& second_where) {
  const JsonReader reader(json, where);
  Said said = read_said(reader);
  std::vector<GptqRule> rules = read_rules(reader);
  if (second != nullptr) {
    const JsonReader other(*second, second_where);
    const Said also = read_said(other);
    agree(said.bits, also.bits, other.place("bits"));
    agree(said.group_size, also.group_size, other.place("group_size"));
    agree(said.symmetric, also.symmetric, other.place("sym"));
    agree(said.version, also.version, other.place("checkpoint_format"));
    agree(said.desc_act, also.desc_act, other.place("desc_act"));
    agree(said.lm_head, also.lm_head, other.place("lm_head"));
    if (!reader.has("dynamic")) {
      rules = read_rules(other);
    }
  }
  GptqConfig config;
  config.scheme.bits = static_cast<int>(required(said.bits, reader.place("bits")));
  config.scheme.group_size = required(said.group_size, reader.place("group_size"));
  config.scheme.symmetric = said.symmetric.value_or(true);
  config.version = read_version(said, where);
  config.desc_act = said.desc_act.value_or(false);
  config.lm_head = said.lm_head.value_or(false);
  config.rules = std::move(rules);
  return config;
}

Json gptq_config_json(
    const QuantScheme& scheme,
    GptqVersion version,
    std::span<const GptqModule> modules,
    const Json& meta) {
  const bool lm_head = std::any_of(modules.begin(), modules.end(), [](const GptqModule& module) {
    return module.name == "lm_head" && module.scheme.has_value();
  });
  Json json;
  json["quant_method"] = "gptq";
  json["method"] = "gptq";
  json["bits"] = scheme.bits;
  json["group_size"] = written_group_size(scheme);
  json["desc_act"] = false;
  json["sym"] = scheme.symmetric;
  json["lm_head"] = lm_head;
  json["checkpoint_format"] = gptq_version_name(version);
  json["format"] = gptq_version_name(version);
  json["pack_dtype"] = "int32";
  Json dynamic = dynamic_rules(scheme, modules);
  if (!dynamic.empty()) {
    json["dynamic"] = std::move(dynamic);
  }
  json["meta"]["quantizer"] = Json::array({fmt::format("quern:{}", kVersion)});
  for (const auto& [key, value] : meta.items()) {
    json["meta"][key] = value;
  }
  return json;
}

}  // namespace quern
