// SPDX-License-Identifier: Apache-2.0
#include "report/facts.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>

namespace quern {
namespace {

constexpr std::array<std::string_view, 7> kKnownRoles = {"q", "k", "v", "o", "gate", "up", "down"};

double bits_of_dtype(const std::string& dtype) {
  static constexpr std::array<std::pair<std::string_view, double>, 8> kWidths = {{
      {"F64", 64},
      {"F32", 32},
      {"F16", 16},
      {"BF16", 16},
      {"I32", 32},
      {"I16", 16},
      {"I8", 8},
      {"U8", 8},
  }};
  std::string upper = dtype;
  std::transform(upper.begin(), upper.end(), upper.begin(), [](unsigned char c) {
    return static_cast<char>(std::toupper(c));
  });
  for (const auto& [name, bits] : kWidths) {
    if (upper == name || (name.front() == 'B' && upper == "BFLOAT16") ||
        (name == "F32" && upper == "FLOAT32") || (name == "F16" && upper == "FLOAT16")) {
      return bits;
    }
  }
  return 0;
}

bool ends_with(std::string_view text, std::string_view end) {
  return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

std::string kind_of(const std::string& name) {
  const auto holds = [&](const char* part) { return name.find(part) != std::string::npos; };
  if (holds("embed") || holds("wte")) {
    return "embedding";
  }
  if (holds("lm_head")) {
    return "output head";
  }
  if (holds("norm")) {
    return "norms";
  }
  return ends_with(name, ".bias") ? "biases" : "other";
}

LinearFacts linear_of(const Json& entry) {
  LinearFacts linear;
  linear.name = find_text(entry, {"name"});
  linear.role = find_text(entry, {"role"});
  if (linear.role.empty()) {
    linear.role = "other";
  }
  if (const auto layer = find_number(entry, {"layer"}); layer && *layer >= 0 && *layer < 1e6) {
    linear.layer = static_cast<std::int64_t>(*layer);
  }
  linear.parameters = 1;
  for (const Json& extent : find_list(entry, {"shape"})) {
    const double size = extent.is_number() ? extent.get<double>() : 0;
    linear.parameters *= size;
    linear.shape += fmt::format("{}{:.0f}", linear.shape.empty() ? "" : " × ", size);
  }
  linear.parameters = linear.shape.empty() ? 0 : linear.parameters;
  linear.method = find_text(entry, {"method"});
  linear.bits = find_number(entry, {"bits"});
  if (const Json* group = find_json(entry, {"group_size"}); group != nullptr) {
    const bool channel = group->is_number() && group->get<double>() <= 0;
    linear.group = channel ? "channel" : plain_value(*group);
  }
  linear.fallback = find_text(entry, {"fallback"});
  linear.rule = find_text(entry, {"rule"});
  linear.bytes = find_number(entry, {"bytes"});
  linear.tokens = find_number(entry, {"tokens"});
  linear.damping = find_number(entry, {"damping"});
  linear.dead_columns = find_number(entry, {"dead_columns"});
  linear.relative_error = find_number(entry, {"relative_error"});
  linear.holdout_error = find_number(entry, {"holdout_error"});
  linear.rtn_error = find_number(entry, {"rtn_error"});
  return linear;
}

// Adds to the share of that label, or begins one.
void add_share(
    std::vector<StorageShare>& shares,
    const std::string& label,
    bool quantized,
    double bytes,
    double parameters) {
  const auto found = std::find_if(shares.begin(), shares.end(), [&](const StorageShare& share) {
    return share.label == label && share.quantized == quantized;
  });
  if (found == shares.end()) {
    shares.push_back({label, quantized, bytes, parameters});
    return;
  }
  found->bytes += bytes;
  found->parameters += parameters;
}

}  // namespace

const Json* find_json(const Json& document, JsonPath path) {
  const Json* place = &document;
  for (const char* key : path) {
    if (!place->is_object()) {
      return nullptr;
    }
    const auto found = place->find(key);
    if (found == place->end() || found->is_null()) {
      return nullptr;
    }
    place = &*found;
  }
  return place;
}

std::optional<double> find_number(const Json& document, JsonPath path) {
  const Json* value = find_json(document, path);
  if (value == nullptr || !value->is_number()) {
    return std::nullopt;
  }
  const auto number = value->get<double>();
  return std::isfinite(number) ? std::optional(number) : std::nullopt;
}

std::string find_text(const Json& document, JsonPath path) {
  const Json* value = find_json(document, path);
  return value != nullptr && value->is_string() ? value->get<std::string>() : std::string();
}

const Json& find_list(const Json& document, JsonPath path) {
  static const Json kEmpty = Json::array();
  const Json* value = find_json(document, path);
  return value != nullptr && value->is_array() ? *value : kEmpty;
}

std::string plain_value(const Json& value) {
  switch (value.type()) {
    case Json::value_t::null: return "none";
    case Json::value_t::boolean: return value.get<bool>() ? "yes" : "no";
    case Json::value_t::string: return value.get<std::string>();
    case Json::value_t::number_float: return fmt::format("{:.6g}", value.get<double>());
    default: return value.dump(-1, ' ', false, Json::error_handler_t::replace);
  }
}

std::optional<double> LinearFacts::rtn_ratio() const {
  if (!relative_error || !rtn_error || *rtn_error <= 0 || *relative_error < 0) {
    return std::nullopt;
  }
  return *relative_error / *rtn_error;
}

std::vector<LinearFacts> linears_of(const Json& manifest) {
  const Json& list = find_list(manifest, {"linears"});
  std::vector<LinearFacts> linears;
  linears.reserve(list.size());
  std::transform(list.begin(), list.end(), std::back_inserter(linears), linear_of);
  return linears;
}

std::vector<KeptFacts> kept_of(const Json& manifest) {
  std::vector<KeptFacts> kept;
  for (const Json& entry : find_list(manifest, {"kept"})) {
    KeptFacts facts;
    facts.name = find_text(entry, {"name"});
    facts.dtype = find_text(entry, {"dtype"});
    facts.reason = find_text(entry, {"reason"});
    facts.kind = kind_of(facts.name);
    facts.bytes = find_number(entry, {"bytes"}).value_or(0);
    const double bits = bits_of_dtype(facts.dtype);
    facts.parameters = bits > 0 ? facts.bytes * 8 / bits : 0;
    kept.push_back(std::move(facts));
  }
  return kept;
}

std::vector<std::string> roles_of(const std::vector<LinearFacts>& linears) {
  std::vector<std::string> roles;
  const auto add = [&](const std::string& role) {
    if (std::find(roles.begin(), roles.end(), role) == roles.end()) {
      roles.push_back(role);
    }
  };
  for (const std::string_view known : kKnownRoles) {
    if (std::any_of(linears.begin(), linears.end(), [&](const LinearFacts& linear) {
          return linear.role == known;
        })) {
      add(std::string(known));
    }
  }
  for (const LinearFacts& linear : linears) {
    add(linear.role);
  }
  return roles;
}

std::vector<StorageShare> storage_of(const Json& manifest) {
  const std::vector<LinearFacts> linears = linears_of(manifest);
  std::vector<StorageShare> shares;
  for (const std::string& role : roles_of(linears)) {
    for (const LinearFacts& linear : linears) {
      if (linear.role == role && linear.bytes) {
        add_share(shares, role, true, *linear.bytes, linear.parameters);
      }
    }
  }
  for (const KeptFacts& kept : kept_of(manifest)) {
    add_share(shares, kept.kind, false, kept.bytes, kept.parameters);
  }
  double known = 0;
  for (const StorageShare& share : shares) {
    known += share.bytes;
  }
  const double total = find_number(manifest, {"bytes"}).value_or(known);
  if (!shares.empty() && total > known) {
    shares.push_back({"metadata", false, total - known, 0});
  }
  return shares;
}

std::string with_thousands(double value) {
  const std::string digits = fmt::format("{:.0f}", std::fabs(value));
  std::string out = value < 0 ? "-" : "";
  for (std::size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && (digits.size() - i) % 3 == 0) {
      out += ',';
    }
    out += digits[i];
  }
  return out;
}

std::string short_number(double value) {
  return fmt::format("{:.4g}", value);
}

std::string target_of(const Json& manifest) {
  std::string target = find_text(manifest, {"method"});
  const auto append = [&](const std::string& part) {
    target += (target.empty() ? "" : ", ") + part;
  };
  if (const auto bits = find_number(manifest, {"options", "bits"})) {
    append(fmt::format("{:g} bit", *bits));
  }
  if (const auto group = find_number(manifest, {"options", "group_size"})) {
    append(*group > 0 ? fmt::format("groups of {:.0f}", *group) : "one scale a channel");
  }
  if (const std::string format = find_text(manifest, {"format"}); !format.empty()) {
    append(format + " format");
  }
  return target;
}

}  // namespace quern
