// SPDX-License-Identifier: Apache-2.0
//
// tokenizer.json of the `tokenizers` library: component by component, each either built exactly or
// refused by name.
#include "base/error.h"
#include "base/json.h"
#include "tokenizer/sources.h"
#include "tokenizer/unicode.h"
#include "tokenizer/utf8.h"
#include "tokenizer/vocab_reader.h"

#include <fmt/format.h>

#include <functional>
#include <utility>

namespace quern {
namespace {

constexpr std::size_t kMaxSteps = 32;
// Normalizers add a few characters in place of one; the limit keeps a text from being blown up.
constexpr std::size_t kMaxReplacement = 64;

[[noreturn]] void unsupported(const std::string& what, const std::string& where) {
  throw UnsupportedError(
      "the tokenizer has a component that quern does not know",
      where,
      fmt::format("found {}", printable(what)),
      "use a tokenizer of the Qwen, Llama 3 or Llama 2 (BPE) families");
}

[[noreturn]] void refuse(const std::string& what, const std::string& where, std::string reason) {
  throw ParseError(what, where, std::move(reason), "get tokenizer.json again");
}

// Calls `visit` for a component or, nested sequences laid flat, for each of their members.
void each_component(
    const JsonReader& component,
    const char* members,
    const std::function<void(const std::string& type, const JsonReader&)>& visit) {
  const std::string type = component.get_string("type");
  if (type != "Sequence") {
    visit(type, component);
    return;
  }
  std::size_t index = 0;
  for (const Json& member : component.get_array(members)) {
    each_component(
        JsonReader(member, component.place(fmt::format("{}[{}]", members, index++))),
        members,
        visit);
  }
}

void check_steps(std::size_t steps, const std::string& where) {
  if (steps > kMaxSteps) {
    refuse("too many components", where, fmt::format("expected at most {}", kMaxSteps));
  }
}

// {"String": "..."}; a regular expression is refused here.
std::string string_pattern(const JsonReader& component) {
  const JsonReader pattern = component.get_object("pattern");
  if (!pattern.has("String")) {
    unsupported("a replacement by regular expression", pattern.where());
  }
  std::string text = pattern.get_string("String");
  if (text.empty()) {
    refuse("a replacement has an empty pattern", pattern.where(), "found \"\"");
  }
  return text;
}

std::string short_text(const JsonReader& component, const char* key) {
  std::string text = component.get_string(key);
  if (text.size() > kMaxReplacement) {
    refuse(
        "a replacement is too long",
        component.place(key),
        fmt::format("expected at most {} bytes, found {}", kMaxReplacement, text.size()));
  }
  return text;
}

void read_normalizer(const JsonReader& root, Normalizer& normalizer) {
  if (!root.has("normalizer")) {
    return;
  }
  each_component(
      root.get_object("normalizer"),
      "normalizers",
      [&](const std::string& type, const JsonReader& component) {
        if (type == "NFC") {
          normalizer.add_nfc();
        } else if (type == "Prepend") {
          normalizer.add_prepend(short_text(component, "prepend"));
        } else if (type == "Replace") {
          normalizer.add_replace(string_pattern(component), short_text(component, "content"));
        } else {
          unsupported("normalizer " + type, component.where());
        }
        check_steps(normalizer.steps(), component.where());
      });
}

Regex split_regex(const JsonReader& component) {
  const std::string behavior = component.get_string("behavior");
  if (behavior != "Isolated" || component.get_bool_or("invert", false)) {
    unsupported(
        fmt::format(
            "pre-tokenizer Split with behavior {}{}",
            behavior,
            behavior == "Isolated" ? ", inverted" : ""),
        component.where());
  }
  const JsonReader pattern = component.get_object("pattern");
  if (!pattern.has("Regex")) {
    unsupported("pre-tokenizer Split by a literal string", component.where());
  }
  return {pattern.get_string("Regex"), pattern.place("Regex")};
}

// Returns whether the pieces are then mapped to the byte alphabet.
bool read_pre_tokenizer(const JsonReader& root, PreTokenizer& pre_tokenizer) {
  bool byte_level = false;
  if (!root.has("pre_tokenizer")) {
    return byte_level;
  }
  each_component(
      root.get_object("pre_tokenizer"),
      "pretokenizers",
      [&](const std::string& type, const JsonReader& component) {
        if (byte_level) {
          unsupported("pre-tokenizer " + type + " after ByteLevel", component.where());
        }
        if (type == "Split") {
          pre_tokenizer.add_split(split_regex(component));
        } else if (type == "Digits") {
          const bool single = component.get_bool_or("individual_digits", false);
          pre_tokenizer.add_split(Regex(single ? R"(\p{N})" : R"(\p{N}+)", component.where()));
        } else if (type == "ByteLevel") {
          byte_level = true;
          if (component.get_bool_or("add_prefix_space", true)) {
            pre_tokenizer.add_prefix_space();
          }
          if (component.get_bool_or("use_regex", true)) {
            pre_tokenizer.add_split(Regex(kGpt2Split, component.where()));
          }
        } else {
          unsupported("pre-tokenizer " + type, component.where());
        }
        check_steps(pre_tokenizer.steps(), component.where());
      });
  return byte_level;
}

void read_decoder(const JsonReader& root, DecoderSteps& decoder) {
  if (!root.has("decoder")) {
    unsupported("no decoder", root.place("decoder"));
  }
  bool joined = false;
  using Kind = DecoderSteps::Kind;
  each_component(
      root.get_object("decoder"),
      "decoders",
      [&](const std::string& type, const JsonReader& component) {
        if (joined && type != "Strip" && type != "Fuse") {
          unsupported("decoder " + type + " on joined text", component.where());
        }
        if (type == "ByteLevel") {
          decoder.each_token.push_back({Kind::kByteLevel, {}, {}});
          joined = true;
        } else if (type == "ByteFallback") {
          decoder.each_token.push_back({Kind::kByteFallback, {}, {}});
        } else if (type == "Fuse") {
          joined = true;
        } else if (type == "Replace") {
          std::string from = string_pattern(component);
          std::string to = component.get_string("content");
          if (to.size() > from.size()) {
            unsupported("decoder Replace that lengthens its text", component.where());
          }
          decoder.each_token.push_back({Kind::kReplace, std::move(from), std::move(to)});
        } else if (type == "Strip") {
          const std::string content = component.get_string("content");
          if (!joined || !decoder.strip.empty() || component.get_int_or("stop", 0) != 0) {
            unsupported("decoder Strip of single tokens, or at the end", component.where());
          }
          if (content.empty() || code_point_at(content, 0).length != content.size()) {
            refuse(
                "decoder Strip does not name one character",
                component.place("content"),
                printable(content));
          }
          decoder.strip = content;
          decoder.strip_count =
              static_cast<std::size_t>(component.get_int_in_or("start", 0, kMaxSteps, 0));
        } else {
          unsupported("decoder " + type, component.where());
        }
        check_steps(decoder.each_token.size(), component.where());
      });
}

std::vector<std::int32_t> template_ids(const JsonReader& processor, const std::string& name) {
  std::vector<std::int32_t> ids;
  const JsonReader token = processor.get_object("special_tokens").get_object(name);
  for (const Json& id : token.get_array("ids")) {
    if (!id.is_number_integer() || id.get<std::int64_t>() < 0 ||
        id.get<std::int64_t>() > kMaxTokenId) {
      refuse(
          "the id of a special token is out of range",
          token.place("ids"),
          fmt::format("expected 0 to {}, found {}", kMaxTokenId, printable(id.dump(), 60)));
    }
    ids.push_back(id.get<std::int32_t>());
  }
  return ids;
}

void read_template(const JsonReader& processor, TokenizerParts& parts) {
  int texts = 0;
  std::size_t index = 0;
  for (const Json& member : processor.get_array("single")) {
    const JsonReader item(member, processor.place(fmt::format("single[{}]", index++)));
    if (item.has("Sequence")) {
      ++texts;
      continue;
    }
    std::vector<std::int32_t>& place = texts == 0 ? parts.prefix : parts.suffix;
    const std::vector<std::int32_t> ids =
        template_ids(processor, item.get_object("SpecialToken").get_string("id"));
    place.insert(place.end(), ids.begin(), ids.end());
    check_steps(place.size(), item.where());
  }
  if (texts != 1) {
    refuse(
        "the template does not have the text once",
        processor.place("single"),
        fmt::format("found it {} times", texts));
  }
}

void read_post_processor(const JsonReader& root, TokenizerParts& parts) {
  if (!root.has("post_processor")) {
    return;
  }
  bool has_template = false;
  each_component(
      root.get_object("post_processor"),
      "processors",
      [&](const std::string& type, const JsonReader& component) {
        if (type == "TemplateProcessing" && !has_template) {
          has_template = true;
          read_template(component, parts);
        } else if (type != "ByteLevel") {  // that one only moves offsets
          unsupported("post-processor " + type, component.where());
        }
      });
}

void read_added_tokens(const JsonReader& root, std::vector<AddedToken>& added) {
  if (!root.has("added_tokens")) {
    return;
  }
  std::size_t index = 0;
  for (const Json& member : root.get_array("added_tokens")) {
    const JsonReader token(member, root.place(fmt::format("added_tokens[{}]", index++)));
    added.push_back(
        {static_cast<std::int32_t>(token.get_int_in("id", 0, kMaxTokenId)),
         token.get_string("content"),
         token.get_bool_or("special", false),
         token.get_bool_or("normalized", true),
         token.get_bool_or("lstrip", false),
         token.get_bool_or("rstrip", false),
         token.get_bool_or("single_word", false)});
  }
}

void read_model(const JsonReader& model, TokenizerJson& json, BpeModel& out) {
  const std::string type = model.get_string_or("type", "BPE");
  if (type != "BPE") {
    unsupported("model " + type, model.place("type"));
  }
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (!model.get_string_or(key, "").empty()) {
      unsupported(fmt::format("a {}", key), model.place(key));
    }
  }
  if (model.get_number_or("dropout", 0) != 0) {
    unsupported("merge dropout", model.place("dropout"));
  }
  if (!json.has_vocabulary || !json.has_merges) {
    const char* key = json.has_vocabulary ? "merges" : "vocab";
    refuse(
        "a part of the model is missing",
        model.place(key),
        json.has_vocabulary ? "expected an array of merges" : "expected an object of token ids");
  }
  out.vocabulary = std::move(json.vocabulary);
  json.merges.resolve(out, model.place("merges"));
  out.byte_fallback = model.get_bool_or("byte_fallback", false);
  out.ignore_merges = model.get_bool_or("ignore_merges", false);
  out.fuse_unknown = model.get_bool_or("fuse_unk", false);
  if (model.has("unk_token")) {
    const std::string unknown = model.get_string("unk_token");
    out.unknown = out.vocabulary.find(unknown);
    if (out.unknown < 0) {
      refuse(
          "the unknown token is not in the vocabulary",
          model.place("unk_token"),
          fmt::format("found \"{}\"", printable(unknown, 60)));
    }
  }
}

}  // namespace

TokenizerParts parse_tokenizer_json(std::string_view text, const std::string& where) {
  TokenizerJson json = read_tokenizer_json(text, where);
  const JsonReader root(json.rest, where);
  TokenizerParts parts;
  read_model(root.get_object("model"), json, parts.model);
  read_normalizer(root, parts.normalizer);
  parts.model.byte_level = read_pre_tokenizer(root, parts.pre_tokenizer);
  if (parts.model.byte_level && parts.model.byte_fallback) {
    unsupported("byte_fallback in a byte-level model", root.place("model"));
  }
  read_decoder(root, parts.decoder);
  read_post_processor(root, parts);
  read_added_tokens(root, parts.added);
  return parts;
}

}  // namespace quern
