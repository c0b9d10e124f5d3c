// SPDX-License-Identifier: Apache-2.0
//
// Special tokens as the small configuration files name them.
#include "base/error.h"
#include "base/json.h"
#include "tokenizer/sources.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <unordered_set>
#include <utility>

namespace quern {
namespace {

// An absent file reads as an empty object. `json` keeps what the reader looks at.
JsonReader read_config(
    const TokenizerFiles& files, const std::string& name, const std::string& where, Json& json) {
  const auto file = files.find(name);
  json = file == files.end() ? Json::object() : parse_json(file->second, where + name);
  return {json, where + name};
}

// A token is named by its text or by an object that has it as `content`.
std::optional<std::string> token_name(const JsonReader& config, const std::string& key) {
  if (!config.has(key)) {
    return std::nullopt;
  }
  return config.json().at(key).is_object() ? config.get_object(key).get_string("content")
                                           : config.get_string(key);
}

// {"151643": {"content": ..., "special": ...}, ...}
std::vector<AddedToken> read_added_decoder(const JsonReader& config) {
  std::vector<AddedToken> added;
  const JsonReader tokens = config.get_object("added_tokens_decoder");
  for (const auto& [key, value] : tokens.json().items()) {
    const JsonReader token(value, tokens.place(key));
    std::int32_t id = -1;
    const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), id);
    if (error != std::errc() || end != key.data() + key.size() || id < 0 || id > kMaxTokenId) {
      throw ParseError(
          "the id of an added token is out of range",
          token.where(),
          fmt::format("expected 0 to {}, found \"{}\"", kMaxTokenId, printable(key, 60)),
          "check the file");
    }
    added.push_back(
        {id,
         token.get_string("content"),
         token.get_bool_or("special", false),
         token.get_bool_or("normalized", false),
         token.get_bool_or("lstrip", false),
         token.get_bool_or("rstrip", false),
         token.get_bool_or("single_word", false)});
  }
  return added;
}

// added_tokens.json has only names and ids; those that the configuration names are special.
std::vector<AddedToken> read_added_names(const JsonReader& names, const JsonReader& config) {
  std::unordered_set<std::string> special;
  for (const char* key : {"bos_token", "eos_token", "pad_token", "unk_token"}) {
    if (const auto name = token_name(config, key)) {
      special.insert(*name);
    }
  }
  if (config.has("additional_special_tokens")) {
    for (const Json& name : config.get_array("additional_special_tokens")) {
      special.insert(name.is_string() ? name.get<std::string>() : std::string());
    }
  }
  std::vector<AddedToken> added;
  for (const auto& [content, id] : names.json().items()) {
    const auto value = static_cast<std::int32_t>(names.get_int_in(content, 0, kMaxTokenId));
    added.push_back({value, content, special.contains(content), false, false, false, false});
  }
  return added;
}

std::optional<std::int32_t> find_token(
    const TokenizerParts& parts, const JsonReader& config, const std::string& key) {
  const std::optional<std::string> name = token_name(config, key);
  if (!name || name->empty()) {
    return std::nullopt;
  }
  for (const AddedToken& token : parts.added) {
    if (token.content == *name) {
      return token.id;
    }
  }
  const std::int32_t id = parts.model.vocabulary.find(*name);
  if (id < 0) {
    throw ParseError(
        "a special token is not in the vocabulary",
        config.place(key),
        fmt::format("found \"{}\"", printable(*name, 60)),
        "check that the tokenizer files belong together");
  }
  return id;
}

// A token id or a list of them.
std::vector<std::int32_t> read_ids(const JsonReader& config, const std::string& key) {
  if (!config.has(key)) {
    return {};
  }
  const Json& value = config.json().at(key);
  const Json list = value.is_array() ? value : Json::array({value});
  std::vector<std::int32_t> ids;
  for (const Json& id : list) {
    if (!id.is_number_integer() || id.get<std::int64_t>() < 0 ||
        id.get<std::int64_t>() > kMaxTokenId) {
      throw ParseError(
          "a token id is out of range",
          config.place(key),
          fmt::format("expected 0 to {}, found {}", kMaxTokenId, printable(id.dump(), 60)),
          "check the file");
    }
    ids.push_back(id.get<std::int32_t>());
  }
  return ids;
}

}  // namespace

TokenizerHints read_hints(const TokenizerFiles& files, const std::string& where) {
  TokenizerHints hints;
  Json tokenizer_json;
  Json names_json;
  Json model_json;
  const JsonReader config = read_config(files, "tokenizer_config.json", where, tokenizer_json);
  const JsonReader names = read_config(files, "added_tokens.json", where, names_json);
  const JsonReader model = read_config(files, "config.json", where, model_json);
  hints.has_tokenizer_config = files.contains("tokenizer_config.json");
  hints.tokenizer_class = config.get_string_or("tokenizer_class", "");
  hints.model_type = model.get_string_or("model_type", "");
  if (config.has("add_bos_token")) {
    hints.add_bos = config.get_bool_or("add_bos_token", false);
  }
  if (config.has("add_eos_token")) {
    hints.add_eos = config.get_bool_or("add_eos_token", false);
  }
  hints.added = config.has("added_tokens_decoder") ? read_added_decoder(config)
                                                   : read_added_names(names, config);
  return hints;
}

void set_special_ids(
    TokenizerParts& parts,
    const TokenizerFiles& files,
    const TokenizerHints& hints,
    const std::string& where) {
  Json tokenizer_json;
  Json generation_json;
  Json model_json;
  const JsonReader config = read_config(files, "tokenizer_config.json", where, tokenizer_json);
  const JsonReader generation =
      read_config(files, "generation_config.json", where, generation_json);
  const JsonReader outer = read_config(files, "config.json", where, model_json);
  const JsonReader model = outer.has("text_config") ? outer.get_object("text_config") : outer;

  if (hints.has_tokenizer_config) {
    // Without a BOS here there is none, whatever the ids of config.json are: Qwen's is a leftover.
    parts.bos = find_token(parts, config, "bos_token");
    if (config.has("eos_token")) {
      parts.eos = find_token(parts, config, "eos_token");
    }
  }
  std::vector<std::int32_t> stop = read_ids(generation, "eos_token_id");
  if (stop.empty()) {
    stop = read_ids(model, "eos_token_id");
  }
  if (stop.empty()) {
    stop = read_ids(outer, "eos_token_id");
  }
  if (!stop.empty()) {
    parts.stop = stop;
    if (!parts.eos) {
      parts.eos = stop.front();
    }
  }

  // A template that begins with one token, where no configuration says anything, names BOS.
  if (!hints.has_tokenizer_config && !parts.bos && !parts.prefix.empty()) {
    parts.bos = parts.prefix.front();
  }
  const bool has_bos = parts.bos && !parts.prefix.empty() && parts.prefix.front() == *parts.bos;
  const bool has_eos = parts.eos && !parts.suffix.empty() && parts.suffix.back() == *parts.eos;
  if (hints.add_bos == true && !has_bos) {
    if (!parts.bos) {
      throw ParseError(
          "the tokenizer wants a token that it does not name",
          where + "tokenizer_config.json: add_bos_token",
          "true, but bos_token is null",
          "set bos_token or add_bos_token: false");
    }
    parts.prefix.insert(parts.prefix.begin(), *parts.bos);
  } else if (hints.add_bos == false && has_bos) {
    parts.prefix.erase(parts.prefix.begin());
  }
  if (hints.add_eos == true && !has_eos && parts.eos) {
    parts.suffix.push_back(*parts.eos);
  } else if (hints.add_eos == false && has_eos) {
    parts.suffix.pop_back();
  }
}

}  // namespace quern
