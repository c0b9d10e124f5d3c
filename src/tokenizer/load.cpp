// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "base/file.h"
#include "tokenizer/sources.h"

#include <algorithm>
#include <system_error>

namespace quern {
namespace {

constexpr std::uint64_t kMaxFile = std::uint64_t{128} << 20U;
constexpr std::uint64_t kMaxConfig = std::uint64_t{4} << 20U;

bool ends_with(const std::string& text, std::string_view suffix) {
  return text.size() >= suffix.size() &&
         std::string_view(text).substr(text.size() - suffix.size()) == suffix;
}

bool is_rank_file(const std::string& name) {
  return name == "tokenizer.model" || ends_with(name, ".tiktoken");
}

[[noreturn]] void none_found(const std::string& where) {
  throw IoError(
      "no tokenizer found",
      where,
      "expected tokenizer.json, vocab.json with merges.txt, tokenizer.model or *.tiktoken",
      "name the directory that holds the model's tokenizer files");
}

std::string find_rank_file(const std::filesystem::path& directory) {
  std::string found;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(directory, error)) {
    const std::string name = entry.path().filename().string();
    // tokenizer.model first, then the alphabet decides: not the order of the file system.
    if (is_rank_file(name) && (found.empty() || name == "tokenizer.model" ||
                               (found != "tokenizer.model" && name < found))) {
      found = name;
    }
  }
  return found;
}

// The files that make the tokenizer of `directory`, in the order of preference.
std::vector<std::string> main_files(const std::filesystem::path& directory) {
  if (std::filesystem::exists(directory / "tokenizer.json")) {
    return {"tokenizer.json"};
  }
  if (std::filesystem::exists(directory / "vocab.json") &&
      std::filesystem::exists(directory / "merges.txt")) {
    return {"vocab.json", "merges.txt"};
  }
  const std::string ranks = find_rank_file(directory);
  if (ranks.empty()) {
    none_found(directory.string());
  }
  return {ranks};
}

}  // namespace

Tokenizer make_tokenizer(const TokenizerFiles& files, const std::string& where) {
  const std::string place = where.empty() || where.back() == '/' ? where : where + "/";
  const TokenizerHints hints = read_hints(files, place);
  TokenizerParts parts;
  std::string main;
  const auto ranks = std::find_if(
      files.begin(), files.end(), [](const auto& file) { return is_rank_file(file.first); });
  if (const auto json = files.find("tokenizer.json"); json != files.end()) {
    main = "tokenizer.json";
    parts = parse_tokenizer_json(json->second, place + main);
  } else if (files.contains("vocab.json") && files.contains("merges.txt")) {
    main = "vocab.json";
    parts = parse_vocab_and_merges(files.at("vocab.json"), files.at("merges.txt"), hints, place);
  } else if (ranks != files.end()) {
    main = ranks->first;
    parts = parse_tiktoken(ranks->second, main, hints, place);
  } else {
    none_found(where);
  }
  set_special_ids(parts, files, hints, place);
  return {std::move(parts), place + main};
}

Tokenizer load_tokenizer(const std::filesystem::path& directory_or_file) {
  std::filesystem::path directory = directory_or_file;
  std::vector<std::string> names;
  if (std::filesystem::is_directory(directory_or_file)) {
    names = main_files(directory);
  } else {
    const std::string name = directory_or_file.filename().string();
    directory = directory_or_file.parent_path();
    if (name == "vocab.json" || name == "merges.txt") {
      names = {"vocab.json", "merges.txt"};
    } else if (name == "tokenizer.json" || is_rank_file(name)) {
      names = {name};
    } else {
      none_found(directory_or_file.string());
    }
  }
  TokenizerFiles files;
  for (const std::string& name : names) {
    files[name] = read_file(directory / name, kMaxFile);
  }
  for (const char* name :
       {"tokenizer_config.json", "added_tokens.json", "generation_config.json", "config.json"}) {
    if (std::filesystem::exists(directory / name)) {
      files[name] = read_file(directory / name, kMaxConfig);
    }
  }
  return make_tokenizer(files, directory.string());
}

}  // namespace quern
