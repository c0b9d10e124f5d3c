// SPDX-License-Identifier: Apache-2.0
#include "format/compressed_tensors_config.h"

#include "base/error.h"
#include "format/merged_modules.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

namespace quern {
namespace {

constexpr std::int64_t kMaxGroupSize = 1 << 20;
constexpr std::size_t kMaxTargets = 200'000;
constexpr std::size_t kMaxExpressions = 5'000;
constexpr std::string_view kExpression = "re:";
constexpr const char* kUseOther = "use another checkpoint of the model, or its BF16 release";

std::string lower_case(std::string_view text) {
  std::string lower(text);
  std::transform(lower.begin(), lower.end(), lower.begin(), [](unsigned char c) {
    return static_cast<char>(c >= 'A' && c <= 'Z' ? c + 'a' - 'A' : c);
  });
  return lower;
}

[[noreturn]] void throw_unsupported(
    const std::string& where, const std::string& expected, const std::string& found) {
  throw UnsupportedError(
      "a compressed-tensors setting that quern does not handle",
      where,
      fmt::format("expected {}, found {}", expected, printable(found, 60)),
      kUseOther);
}

std::string text_of(const Json& value) {
  return value.is_string() ? value.get<std::string>()
                           : value.dump(-1, ' ', false, Json::error_handler_t::replace);
}

// How the weights of a group are stored; nothing for a name that says it of each group.
std::optional<CompressedLayout> read_layout(const std::string& format, const std::string& where) {
  if (format == "pack-quantized") {
    return CompressedLayout::kPacked;
  }
  if (format == "int-quantized" || format == "naive-quantized") {
    return CompressedLayout::kInteger;
  }
  if (format == "mixed-precision") {
    return std::nullopt;
  }
  throw_unsupported(
      where, "pack-quantized, int-quantized, naive-quantized or mixed-precision", format);
}

// Settings under which the tensors alone do not give the computation.
void refuse_unknown_computation(const JsonReader& reader) {
  const std::string status = reader.get_string_or("quantization_status", "compressed");
  // Early files were saved as integers and yet called frozen.
  if (status != "compressed" && status != "frozen") {
    throw_unsupported(reader.place("quantization_status"), "compressed", status);
  }
  for (const char* key : {"kv_cache_scheme", "moe_sparsity_config"}) {
    if (reader.has(key)) {
      throw_unsupported(reader.place(key), "none", text_of(reader.json().at(key)));
    }
  }
  if (reader.has("sparsity_config")) {
    const JsonReader sparsity = reader.get_object("sparsity_config");
    const std::string format = sparsity.get_string_or("format", "dense");
    if (format != "dense") {
      throw_unsupported(sparsity.place("format"), "dense", format);
    }
  }
  if (reader.has("transform_config") && !reader.json().at("transform_config").empty()) {
    throw_unsupported(
        reader.place("transform_config"), "none", text_of(reader.json().at("transform_config")));
  }
}

void require_integers(const JsonReader& args) {
  const std::string type = lower_case(args.get_string_or("type", "int"));
  if (type != "int") {
    throw_unsupported(args.place("type"), "int", type);
  }
}

// The strategy, as QuantizationArgs.validate_model_after infers it.
std::string read_strategy(const JsonReader& args) {
  if (args.has("strategy")) {
    return lower_case(args.get_string("strategy"));
  }
  const std::int64_t group_size = args.get_int_in_or("group_size", -1, kMaxGroupSize, 0);
  return group_size > 0 ? "group" : group_size < 0 ? "channel" : "tensor";
}

void read_weights(const JsonReader& args, CompressedForm& form) {
  require_integers(args);
  form.scheme.bits = static_cast<int>(args.get_int_in_or("num_bits", 1, 8, 8));
  form.scheme.symmetric = args.get_bool_or("symmetric", true);
  if (args.has("dynamic") && args.json().at("dynamic") != false) {
    throw_unsupported(args.place("dynamic"), "false", text_of(args.json().at("dynamic")));
  }
  const std::string strategy = read_strategy(args);
  form.per_tensor = strategy == "tensor";
  form.scheme.group_size = 0;
  if (strategy == "group") {
    form.scheme.group_size = args.get_int_in("group_size", 1, kMaxGroupSize);
  } else if (strategy != "channel" && strategy != "tensor") {
    throw_unsupported(args.place("strategy"), "group, channel or tensor", strategy);
  }
  if (args.has("actorder")) {
    const Json& order = args.json().at("actorder");
    const std::string text = lower_case(text_of(order));
    form.act_order = text == "group" || text == "dynamic" || text == "true";
    if (!form.act_order && text != "weight" && text != "static" && text != "false") {
      throw_unsupported(args.place("actorder"), "weight, static or group", text);
    }
  }
}

ActivationScheme read_activation(const JsonReader& args) {
  require_integers(args);
  ActivationScheme activation;
  activation.bits = static_cast<int>(args.get_int_in_or("num_bits", 2, 8, 8));
  if (!args.get_bool_or("symmetric", true)) {
    throw_unsupported(args.place("symmetric"), "true", "false");
  }
  activation.dynamic = args.get_bool_or("dynamic", false);
  const std::string strategy = read_strategy(args);
  const char* expected = activation.dynamic ? "token" : "tensor";
  if (strategy != expected) {
    throw_unsupported(
        args.place("strategy"),
        fmt::format("{} for {} inputs", expected, activation.dynamic ? "dynamic" : "static"),
        strategy);
  }
  return activation;
}

void read_group(
    const JsonReader& group, std::optional<CompressedLayout> common, CompressedConfig& config) {
  if (group.has("output_activations")) {
    throw_unsupported(
        group.place("output_activations"), "none", text_of(group.json().at("output_activations")));
  }
  if (!group.has("weights")) {
    throw_unsupported(group.place("weights"), "a scheme for the weights", "none");
  }
  CompressedForm form;
  const std::optional<CompressedLayout> own =
      group.has("format") ? read_layout(group.get_string("format"), group.place("format")) : common;
  if (!own) {
    throw ParseError(
        "a group does not say how its weights are stored",
        group.place("format"),
        "expected a format here or one for all groups, found neither",
        "check the file");
  }
  form.layout = *own;
  read_weights(group.get_object("weights"), form);
  if (group.has("input_activations")) {
    form.activation = read_activation(group.get_object("input_activations"));
  }
  for (const Json& target : group.get_array("targets")) {
    if (!target.is_string()) {
      throw ParseError(
          "a target is no text",
          group.place("targets"),
          "found " + text_of(target),
          "check the file");
    }
    config.targets.add(target.get<std::string>(), config.forms.size(), group.place("targets"));
  }
  config.forms.push_back(form);
}

// --- writing ---------------------------------------------------------------------------------

const char* format_name(CompressedLayout layout) {
  return layout == CompressedLayout::kPacked ? "pack-quantized" : "int-quantized";
}

CompressedLayout layout_of(const ModuleScheme& scheme) {
  return scheme.activation_bits < 16 ? CompressedLayout::kInteger : CompressedLayout::kPacked;
}

Json group_json(const ModuleScheme& scheme, Json targets) {
  Json weights = {
      {"num_bits", scheme.weights.bits},
      {"type", "int"},
      {"symmetric", scheme.weights.symmetric},
      {"strategy", scheme.weights.group_size == 0 ? "channel" : "group"},
      {"dynamic", false}};
  if (scheme.weights.group_size != 0) {
    weights["group_size"] = scheme.weights.group_size;
  }
  Json inputs = nullptr;
  if (scheme.activation_bits < 16) {
    inputs = {
        {"num_bits", scheme.activation_bits},
        {"type", "int"},
        {"symmetric", true},
        {"strategy", scheme.activation_dynamic ? "token" : "tensor"},
        {"dynamic", scheme.activation_dynamic}};
  }
  return {
      {"targets", std::move(targets)},
      {"format", format_name(layout_of(scheme))},
      {"weights", std::move(weights)},
      {"input_activations", std::move(inputs)},
      {"output_activations", nullptr}};
}

// Groups in the making: schemes and their targets.
using Groups = std::vector<std::pair<ModuleScheme, Json>>;

Json& targets_of(Groups& groups, const ModuleScheme& scheme) {
  const auto found = std::find_if(
      groups.begin(), groups.end(), [&](const auto& each) { return each.first == scheme; });
  return (found == groups.end() ? groups.emplace_back(scheme, Json::array()) : *found).second;
}

// The scheme of most linears outside draft layers; nothing when there is none.
std::optional<ModuleScheme> most_frequent(std::span<const ModuleRule> rules) {
  std::vector<std::pair<ModuleScheme, std::size_t>> counts;
  for (const ModuleRule& rule : rules) {
    if (!rule.scheme || rule.is_draft) {
      continue;
    }
    const auto found = std::find_if(
        counts.begin(), counts.end(), [&](const auto& each) { return each.first == *rule.scheme; });
    (found == counts.end() ? counts.emplace_back(*rule.scheme, 0) : *found).second +=
        std::max<std::size_t>(1, rule.layers.size());
  }
  const auto best =
      std::max_element(counts.begin(), counts.end(), [](const auto& a, const auto& b) {
        return a.second < b.second;
      });
  return best == counts.end() ? std::nullopt : std::optional(best->first);
}

// Whether there are draft layers, and all of them keep their floats.
bool has_plain_draft(std::span<const ModuleRule> rules) {
  const auto draft = [](const ModuleRule& rule) { return rule.is_draft; };
  return std::any_of(rules.begin(), rules.end(), draft) &&
         std::none_of(rules.begin(), rules.end(), [&](const ModuleRule& rule) {
           return draft(rule) && rule.scheme.has_value();
         });
}

SchemedModule schemed(const CompressedModule& module) {
  SchemedModule named{module.name, {}};
  if (module.form) {
    const ActivationScheme& inputs = module.form->activation;
    named.scheme =
        ModuleScheme{module.form->scheme, inputs.bits, inputs.dynamic || !inputs.active()};
  }
  return named;
}

std::string target_of(const ModuleRule& rule) {
  return std::string(kExpression) + rule.pattern();
}

}  // namespace

void ModuleTargets::add(const std::string& entry, std::size_t index, const std::string& where) {
  const bool expression = entry.starts_with(kExpression);
  if (order_ >= kMaxTargets || expressions_.size() + classes_.size() >= kMaxExpressions) {
    throw UnsupportedError(
        "too many targets",
        where,
        fmt::format(
            "expected at most {} names and {} expressions or classes",
            kMaxTargets,
            kMaxExpressions),
        "write fewer expressions that match more modules each");
  }
  // Expressions too: the same text twice would make the second unreachable.
  if (!names_.emplace(entry, Place{order_, index}).second) {
    throw ParseError(
        "a target stands twice",
        where,
        "expected each target once, found again: " + printable(entry, 60),
        "correct the configuration");
  }
  if (expression) {
    expressions_.push_back({ModulePattern(entry.substr(kExpression.size()), where), order_, index});
  } else if (!entry.empty() && entry.find('.') == std::string::npos) {
    classes_.push_back({lower_case(entry), index});
  }
  ++order_;
}

std::optional<std::size_t> ModuleTargets::find_name(const std::string& module) const {
  const auto exact = names_.find(module);
  for (const Expression& expression : expressions_) {
    if (exact != names_.end() && exact->second.order < expression.order) {
      break;
    }
    if (expression.pattern.matches(module)) {
      return expression.index;
    }
  }
  return exact == names_.end() ? std::nullopt : std::optional(exact->second.index);
}

std::optional<std::size_t> ModuleTargets::find_class(std::string_view name) const {
  const std::string wanted = lower_case(name);
  for (const Class& each : classes_) {
    if (wanted.find(each.lower_case) != std::string::npos) {
      return each.index;
    }
  }
  return std::nullopt;
}

const CompressedForm* CompressedConfig::form_for(const std::string& module) const {
  const std::string merged = merged_name(module);
  const char* class_name = module.ends_with("embed_tokens") ? "Embedding" : "Linear";
  if (ignore.find_name(module) || ignore.contains(class_name)) {
    return nullptr;
  }
  std::optional<std::size_t> index = targets.find_name(module);
  if (!index && merged != module) {
    index = targets.find_name(merged);
  }
  if (!index) {
    index = targets.find_class(class_name);
  }
  return index ? &forms[*index] : nullptr;
}

CompressedConfig read_compressed_config(const Json& json, const std::string& where) {
  const JsonReader reader(json, where);
  refuse_unknown_computation(reader);
  std::optional<CompressedLayout> layout;
  if (reader.has("format")) {
    layout = read_layout(reader.get_string("format"), reader.place("format"));
  }
  CompressedConfig config;
  const JsonReader groups = reader.get_object("config_groups");
  for (const auto& [name, value] : groups.json().items()) {
    if (!value.is_object()) {
      throw_unsupported(groups.place(printable(name)), "a scheme in full", "the name of a preset");
    }
    read_group(JsonReader(value, groups.place(printable(name))), layout, config);
  }
  if (reader.has("ignore")) {
    for (const Json& entry : reader.get_array("ignore")) {
      if (!entry.is_string()) {
        throw ParseError(
            "an entry is no text",
            reader.place("ignore"),
            "found " + text_of(entry),
            "check the file");
      }
      // Tools write some names twice; that says nothing more.
      const std::string text = entry.get<std::string>();
      if (!config.ignore.contains(text)) {
        config.ignore.add(text, 0, reader.place("ignore"));
      }
    }
  }
  return config;
}

Json compressed_config_json(std::span<const CompressedModule> modules) {
  std::vector<SchemedModule> linears;
  std::vector<ModuleRule> others;
  for (const CompressedModule& module : modules) {
    if (module.is_linear) {
      linears.push_back(schemed(module));
    } else if (module.form) {
      const SchemedModule named = schemed(module);
      others.push_back(module_rules(std::span(&named, 1)).front());
    }
  }
  const std::vector<ModuleRule> rules = module_rules(linears);
  const std::optional<ModuleScheme> common = most_frequent(rules);
  Groups drafts;
  Groups special;
  Json ignore = Json::array();
  const bool plain_draft = has_plain_draft(rules);
  for (const ModuleRule& rule : rules) {
    if (!rule.scheme && !(rule.is_draft && plain_draft)) {
      ignore.push_back(target_of(rule));
    } else if (rule.is_draft && !plain_draft) {
      targets_of(drafts, *rule.scheme).push_back(target_of(rule));
    } else if (rule.scheme && rule.scheme != common) {
      targets_of(special, *rule.scheme).push_back(target_of(rule));
    }
  }
  for (const ModuleRule& rule : others) {
    targets_of(special, *rule.scheme).push_back(target_of(rule));
  }
  if (std::none_of(others.begin(), others.end(), [](const ModuleRule& rule) {
        return rule.tail == "lm_head";
      })) {
    ignore.push_back("lm_head");  // a Linear in transformers
    if (std::any_of(modules.begin(), modules.end(), [](const CompressedModule& module) {
          return module.name.starts_with("model.language_model.");
        })) {
      ignore.push_back(std::string(kExpression) + R"(.*\.lm_head$)");  // engines' prefixes
    }
  }
  if (plain_draft) {
    ignore.push_back(std::string(kExpression) + ".*mtp.*");
  }
  // Draft layers first: a rule for layer 0 also matches layer 0 of the draft model.
  Groups groups = std::move(drafts);
  groups.insert(groups.end(), special.begin(), special.end());
  if (common) {
    targets_of(groups, *common).push_back("Linear");
  }
  Json config_groups = Json::object();
  std::string format;
  for (const auto& [scheme, targets] : groups) {
    const std::string own = format_name(layout_of(scheme));
    format = format.empty() || format == own ? own : "mixed-precision";
    config_groups[fmt::format("group_{}", config_groups.size())] = group_json(scheme, targets);
  }
  return {
      {"quant_method", "compressed-tensors"},
      {"format", format},
      {"quantization_status", "compressed"},
      {"global_compression_ratio", nullptr},
      {"kv_cache_scheme", nullptr},
      {"ignore", std::move(ignore)},
      {"config_groups", std::move(config_groups)}};
}

}  // namespace quern
