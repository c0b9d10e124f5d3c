// SPDX-License-Identifier: Apache-2.0
#include "format/gguf_tokenizer.h"

#include "base/error.h"
#include "base/file.h"
#include "format/gguf_file.h"
#include "tokenizer/sources.h"
#include "tokenizer/vocab_reader.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace quern {
namespace {

enum TokenType : std::int32_t {
  kNormal = 1,
  kUnknown = 2,
  kControl = 3,
  kUserDefined = 4,
  kUnused = 5
};

// A split pattern by its names in tokenizer.ggml.pre; the first is the one that is written.
struct SplitName {
  std::string_view name;
  SplitFamily family;
};

constexpr std::array<SplitName, 8> kSplitNames = {{
    {"qwen2", SplitFamily::kQwen2},
    {"deepseek-r1-qwen", SplitFamily::kQwen2},
    {"qwen35", SplitFamily::kQwen35},
    {"llama-bpe", SplitFamily::kLlama3},
    {"llama3", SplitFamily::kLlama3},
    {"llama-v3", SplitFamily::kLlama3},
    {"gpt-2", SplitFamily::kGpt2},
    {"gpt2", SplitFamily::kGpt2},
}};

// llama.cpp tells split patterns apart by what they do to this text (get_vocab_base_pre in
// conversion/base.py); with emoji, digits in runs, marks that combine and contractions it divides
// those above.
constexpr std::string_view kProbe =
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶‍🌫️ (multiple "
    "emojis "
    "concatenated) ✅ 🦙🦙 3 33 "
    "333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 "
    "?我想在apple工作1314151天～ ------======= "
    "нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you "
    "sure? 'M not "
    "sure I'll make it, 'D you like some tea? We'Ve a'lL";

// Beside those of the tokenizer's files these end a turn or a text, as in llama.cpp.
constexpr std::array<std::string_view, 4> kEndings = {
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>"};

[[noreturn]] void unsupported(const std::string& where, const std::string& reason) {
  throw UnsupportedError(
      "a tokenizer that GGUF readers would run differently",
      where,
      reason,
      "write a safetensors format instead");
}

std::vector<std::string> pieces_of(const PreTokenizer& pre_tokenizer) {
  std::vector<std::string> pieces;
  PreTokenizer::Run run(pre_tokenizer);
  run.split(kProbe, [&](std::string_view piece) { pieces.emplace_back(piece); });
  return pieces;
}

std::string_view split_name(const TokenizerParts& parts, const std::string& where) {
  const std::vector<std::string> pieces = pieces_of(parts.pre_tokenizer);
  for (const SplitName& each : kSplitNames) {
    TokenizerParts known;
    set_byte_level(known, each.family);
    if (pieces_of(known.pre_tokenizer) == pieces) {
      return each.name;
    }
  }
  unsupported(where, "expected the split pattern of Qwen, Llama 3 or GPT-2, found another one");
}

bool looks_special(std::string_view token) {
  return token.size() > 4 && token.starts_with("<|") && token.ends_with("|>");
}

void add_tokens(GgufMetadata& metadata, const Tokenizer& tokenizer, std::int64_t vocab_size) {
  std::vector<std::string> tokens;
  std::vector<std::int32_t> types;
  for (std::int32_t id = 0; id < vocab_size; ++id) {
    const std::string_view text = tokenizer.token_text(id);
    if (text.empty()) {
      tokens.push_back(fmt::format("[PAD{}]", id));
      types.push_back(kUnused);
      continue;
    }
    tokens.emplace_back(text);
    const bool is_control = tokenizer.is_special(id) || looks_special(text);
    types.push_back(!tokenizer.is_added(id) ? kNormal : is_control ? kControl : kUserDefined);
  }
  metadata.add("tokenizer.ggml.tokens", GgufArray(std::move(tokens)));
  metadata.add("tokenizer.ggml.token_type", GgufArray(std::move(types)));
}

void add_merges(GgufMetadata& metadata, const BpeModel& model, const std::string& where) {
  std::vector<std::string> merges;
  std::optional<std::uint32_t> last;
  for (const MergeTable::Pair& pair : model.merges.pairs()) {
    if (last == pair.rank) {
      unsupported(where, "expected merges, found a rank file; add the model's tokenizer.json");
    }
    last = pair.rank;
    merges.push_back(
        fmt::format("{} {}", model.vocabulary.text(pair.left), model.vocabulary.text(pair.right)));
  }
  metadata.add("tokenizer.ggml.merges", GgufArray(std::move(merges)));
}

Json read_beside(const std::filesystem::path& directory, const char* name) {
  const std::filesystem::path path = directory / name;
  return std::filesystem::exists(path) ? read_json(path) : Json::object();
}

// The id of a token that tokenizer_config.json names by its text, or by an object that has it as
// `content`.
std::optional<std::int64_t> named_id(
    const JsonReader& config, const std::string& key, const Tokenizer& tokenizer) {
  if (!config.has(key)) {
    return std::nullopt;
  }
  const std::string text = config.json().at(key).is_object()
                               ? config.get_object(key).get_string("content")
                               : config.get_string(key);
  return tokenizer.find(text);
}

// In the order of llama.cpp's SpecialVocab: what the tokenizer's files name, then config.json.
void add_special_ids(
    GgufMetadata& metadata,
    const Tokenizer& tokenizer,
    const JsonReader& tokenizer_config,
    const JsonReader& config,
    std::int64_t vocab_size) {
  struct Special {
    const char* key;  // in GGUF
    const char* name;  // in the other files
    std::optional<std::int64_t> id;
  };
  std::array<Special, 4> all = {{
      {"eos", "eos", tokenizer.eos_id()},
      {"unknown", "unk", named_id(tokenizer_config, "unk_token", tokenizer)},
      {"padding", "pad", named_id(tokenizer_config, "pad_token", tokenizer)},
      {"bos", "bos", tokenizer.bos_id()},
  }};
  for (Special& special : all) {
    const std::string key = std::string(special.name) + "_token_id";
    if (!special.id && config.has(key) && config.json().at(key).is_number_integer()) {
      special.id = config.get_int(key);
    }
    if (special.id && *special.id >= 0 && *special.id < vocab_size) {
      metadata.add(
          fmt::format("tokenizer.ggml.{}_token_id", special.key),
          static_cast<std::uint32_t>(*special.id));
    }
  }
}

// chat_template.jinja, else the template in tokenizer_config.json (of several, the default one).
std::string read_chat_template(
    const std::filesystem::path& directory, const JsonReader& tokenizer_config) {
  constexpr std::uint64_t kMaxTemplate = std::uint64_t{4} << 20U;
  const std::filesystem::path path = directory / "chat_template.jinja";
  if (std::filesystem::exists(path)) {
    return read_file(path, kMaxTemplate);
  }
  const auto found = tokenizer_config.json().find("chat_template");
  if (found == tokenizer_config.json().end() || !found->is_array()) {
    return tokenizer_config.get_string_or("chat_template", "");
  }
  for (const Json& member : *found) {
    const JsonReader named(member, tokenizer_config.place("chat_template"));
    if (named.get_string("name") == "default") {
      return named.get_string("template");
    }
  }
  return "";
}

[[noreturn]] void refuse(const std::string& what, const std::string& place, std::string reason) {
  throw ParseError(what, place, std::move(reason), "convert the model again");
}

SplitFamily family_of(const GgufMetadata& metadata) {
  const std::string model = metadata.get_string("tokenizer.ggml.model");
  const std::string pre = metadata.get_string_or("tokenizer.ggml.pre", "default");
  const auto found =
      std::find_if(kSplitNames.begin(), kSplitNames.end(), [&](const SplitName& each) {
        return each.name == pre;
      });
  if (model != "gpt2" || found == kSplitNames.end()) {
    const char* key = model == "gpt2" ? "tokenizer.ggml.pre" : "tokenizer.ggml.model";
    throw UnsupportedError(
        "a tokenizer that quern does not read from GGUF",
        metadata.place(key),
        fmt::format(
            "expected gpt2 with qwen2, qwen35, llama-bpe or gpt-2, found {} with {}",
            printable(model, 40),
            printable(pre, 40)),
        "use the safetensors release of the model");
  }
  return found->family;
}

void read_tokens(const GgufMetadata& metadata, TokenizerParts& parts) {
  const std::string tokens_key = "tokenizer.ggml.tokens";
  const std::string types_key = "tokenizer.ggml.token_type";
  const std::vector<std::string>& tokens = metadata.get_strings(tokens_key);
  std::vector<std::int64_t> types(tokens.size(), kNormal);
  if (metadata.has(types_key)) {
    types = metadata.get_ints(types_key);
  }
  if (types.size() != tokens.size()) {
    refuse(
        "the tokens and their types do not belong together",
        metadata.place(types_key),
        fmt::format("expected {} types, found {}", tokens.size(), types.size()));
  }
  for (std::size_t id = 0; id < tokens.size(); ++id) {
    if (types[id] == kUnused || tokens[id].empty()) {
      continue;
    }
    if (types[id] == kControl || types[id] == kUserDefined || types[id] == kUnknown) {
      parts.added.push_back({static_cast<std::int32_t>(id), tokens[id], types[id] != kUserDefined});
    } else {
      parts.model.vocabulary.add(
          tokens[id], static_cast<std::int64_t>(id), metadata.place(tokens_key));
    }
  }
}

std::optional<std::int32_t> read_id(const GgufMetadata& metadata, const char* name) {
  const std::string key = fmt::format("tokenizer.ggml.{}_token_id", name);
  return metadata.has(key)
             ? std::optional(static_cast<std::int32_t>(metadata.get_int_in(key, 0, kMaxTokenId)))
             : std::nullopt;
}

void read_special_ids(const GgufMetadata& metadata, SplitFamily family, TokenizerParts& parts) {
  parts.bos = read_id(metadata, "bos");
  parts.eos = read_id(metadata, "eos");
  if (const auto turn = read_id(metadata, "eot")) {
    parts.stop.push_back(*turn);
  }
  for (const AddedToken& token : parts.added) {
    if (token.special &&
        std::find(kEndings.begin(), kEndings.end(), token.content) != kEndings.end()) {
      parts.stop.push_back(token.id);
    }
  }
  // Without the key, llama.cpp puts BOS before the text for Llama 3 only.
  const bool by_default = family == SplitFamily::kLlama3 && parts.bos;
  if (metadata.get_bool_or("tokenizer.ggml.add_bos_token", by_default)) {
    if (!parts.bos) {
      refuse(
          "the tokenizer wants a token that it does not name",
          metadata.place("tokenizer.ggml.add_bos_token"),
          "true, but there is no bos_token_id");
    }
    parts.prefix = {*parts.bos};
  }
  if (metadata.get_bool_or("tokenizer.ggml.add_eos_token", false) && parts.eos) {
    parts.suffix = {*parts.eos};
  }
}

}  // namespace

void add_gguf_tokenizer(
    GgufMetadata& metadata,
    const std::filesystem::path& directory,
    const Json& config,
    std::int64_t vocab_size) {
  const std::string where = directory.string();
  const Tokenizer tokenizer = load_tokenizer(directory);
  const TokenizerParts& parts = tokenizer.parts();
  if (!parts.model.byte_level) {
    unsupported(where, "expected a byte-level vocabulary, found one of characters");
  }
  if (tokenizer.vocab_size() > vocab_size) {
    unsupported(
        where,
        fmt::format(
            "expected at most {} tokens, the rows of the embedding, found {}",
            vocab_size,
            tokenizer.vocab_size()));
  }
  metadata.add("tokenizer.ggml.model", std::string("gpt2"));
  metadata.add("tokenizer.ggml.pre", std::string(split_name(parts, where)));
  add_tokens(metadata, tokenizer, vocab_size);
  add_merges(metadata, parts.model, where);
  const Json tokenizer_config = read_beside(directory, "tokenizer_config.json");
  const JsonReader reader(tokenizer_config, (directory / "tokenizer_config.json").string());
  add_special_ids(metadata, tokenizer, reader, JsonReader(config, "config.json"), vocab_size);
  metadata.add("tokenizer.ggml.add_bos_token", tokenizer.adds_bos());
  if (parts.eos && !parts.suffix.empty() && parts.suffix.back() == *parts.eos) {
    metadata.add("tokenizer.ggml.add_eos_token", true);
  }
  if (std::string text = read_chat_template(directory, reader); !text.empty()) {
    metadata.add("tokenizer.chat_template", std::move(text));
  }
}

Tokenizer tokenizer_from_gguf(const GgufMetadata& metadata) {
  const SplitFamily family = family_of(metadata);
  TokenizerParts parts;
  set_byte_level(parts, family);
  // As llama.cpp does for Llama 3: a word that is a token is not built from merges.
  parts.model.ignore_merges = family == SplitFamily::kLlama3;
  read_tokens(metadata, parts);
  const std::string key = "tokenizer.ggml.merges";
  MergeList merges;
  for (const std::string& line : metadata.get_strings(key)) {
    merges.add_line(line, metadata.place(key));
  }
  merges.resolve(parts.model, metadata.place(key));
  read_special_ids(metadata, family, parts);
  return {std::move(parts), metadata.where()};
}

Tokenizer open_tokenizer(const std::filesystem::path& path) {
  return path.extension() == ".gguf" ? tokenizer_from_gguf(GgufFile::open(path)->metadata())
                                     : load_tokenizer(path);
}

Tokenizer open_tokenizer(const Checkpoint& checkpoint) {
  const std::vector<std::filesystem::path> files = checkpoint.self_contained_files();
  return open_tokenizer(files.empty() ? checkpoint.directory() : files.front());
}

}  // namespace quern
