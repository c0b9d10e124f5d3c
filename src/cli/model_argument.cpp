// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "base/file.h"
#include "cli/verb.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <optional>
#include <string>

namespace quern {
namespace {

namespace fs = std::filesystem;

std::optional<std::string> environment(const char* name) {
  const char* value = std::getenv(name);  // NOLINT(concurrency-mt-unsafe): read at start only
  return value == nullptr || *value == '\0' ? std::nullopt : std::optional<std::string>(value);
}

// Where the hub client keeps its downloads, by its own rules.
fs::path hub_cache() {
  if (const auto cache = environment("HF_HUB_CACHE")) {
    return *cache;
  }
  if (const auto cache = environment("HUGGINGFACE_HUB_CACHE")) {
    return *cache;
  }
  if (const auto home = environment("HF_HOME")) {
    return fs::path(*home) / "hub";
  }
  if (const auto cache = environment("XDG_CACHE_HOME")) {
    return fs::path(*cache) / "huggingface" / "hub";
  }
  return fs::path(environment("HOME").value_or("/")) / ".cache" / "huggingface" / "hub";
}

bool looks_like_hub_id(const std::string& text) {
  const bool plain = text.find_first_not_of(
                         "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./@") ==
                     std::string::npos;
  return plain && text.find("..") == std::string::npos &&
         std::count(text.begin(), text.end(), '/') == 1 && text.front() != '/' &&
         text.front() != '.' && text.back() != '/';
}

fs::path cached_snapshot(const std::string& id) {
  const std::size_t at = id.find('@');
  const std::string name = id.substr(0, at);
  const std::string revision = at == std::string::npos ? "main" : id.substr(at + 1);
  const std::size_t slash = name.find('/');
  const fs::path folder =
      hub_cache() / ("models--" + name.substr(0, slash) + "--" + name.substr(slash + 1));
  const fs::path ref = folder / "refs" / revision;
  std::string commit = revision;
  if (fs::is_regular_file(ref)) {
    commit = read_file(ref, 4096);
    commit.erase(
        std::find_if(commit.begin(), commit.end(), [](char c) { return c == '\n' || c == '\r'; }),
        commit.end());
  }
  const fs::path snapshot = folder / "snapshots" / commit;
  if (!fs::is_directory(snapshot)) {
    throw Error(
        ErrorKind::kNetwork,
        "the model is not in the local hub cache",
        id,
        "looked for " + snapshot.string(),
        "download it with the hub's own client, or give a local directory");
  }
  return snapshot;
}

}  // namespace

fs::path resolve_model(const std::string& text) {
  std::error_code code;
  if (fs::exists(text, code)) {
    return text;
  }
  if (looks_like_hub_id(text)) {
    return cached_snapshot(text);
  }
  throw IoError(
      "no such model",
      text,
      code ? code.message() : "neither a path nor a hub id of the form org/name",
      "check the path");
}

}  // namespace quern
