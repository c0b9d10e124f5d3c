// SPDX-License-Identifier: Apache-2.0
#include "format/checkpoint.h"

#include "base/error.h"
#include "base/file.h"
#include "format/formats.h"

#include <fmt/format.h>

#include <algorithm>
#include <system_error>
#include <utility>

namespace quern {
namespace {

constexpr std::uint64_t kMaxConfigBytes = 64U << 20U;

bool is_there(const std::filesystem::path& path) {
  std::error_code code;
  return std::filesystem::exists(path, code);
}

// GPTQ files of old tools name no method; their keys are plain enough.
std::string method_of(const JsonReader& quantization) {
  const std::string fallback =
      quantization.get_string_or("method", quantization.has("bits") ? "gptq" : "unnamed");
  std::string method = quantization.get_string_or("quant_method", fallback);
  std::transform(method.begin(), method.end(), method.begin(), [](unsigned char c) {
    return static_cast<char>(c >= 'A' && c <= 'Z' ? c + 'a' - 'A' : c);
  });
  return method;
}

// Multimodal models may keep the block of their language model one level down.
const Json* find_quantization(const Json& config, std::string& where) {
  const auto member = [](const Json& object, const char* key) -> const Json* {
    const auto found = object.find(key);
    return found == object.end() || found->is_null() ? nullptr : &*found;
  };
  if (const Json* block = member(config, "quantization_config")) {
    where += ": quantization_config";
    return block;
  }
  if (const Json* text = member(config, "text_config"); text != nullptr && text->is_object()) {
    if (const Json* block = member(*text, "quantization_config")) {
      where += ": text_config.quantization_config";
      return block;
    }
  }
  return nullptr;
}

CheckpointSource read_source(const std::filesystem::path& path) {
  CheckpointSource source;
  std::error_code code;
  source.weights = path;
  source.directory = std::filesystem::is_directory(path, code) ? path : path.parent_path();
  std::filesystem::directory_iterator(source.directory, code);
  if (code == std::errc::permission_denied) {
    throw IoError(
        "cannot read the model",
        path.string(),
        code.message(),
        "check the permissions of the directory");
  }
  if (!is_there(path)) {
    throw IoError(
        "no such model",
        path.string(),
        "expected a directory with config.json and safetensors files, found nothing",
        "check the path");
  }
  const std::filesystem::path config = source.directory / "config.json";
  if (!is_there(config)) {
    throw IoError(
        "config.json is missing",
        source.directory.string(),
        "expected a directory with config.json and safetensors files, found no config.json",
        "check the path and that the download is complete");
  }
  source.config = read_json(config, kMaxConfigBytes);
  (void)JsonReader(source.config, config.string());  // must be an object

  std::string where = config.string();
  const Json* block = find_quantization(source.config, where);
  const std::filesystem::path separate = source.directory / "quantize_config.json";
  const bool has_separate = is_there(separate);
  if (block != nullptr) {
    source.quantization = *block;
    source.quantization_where = where;
    if (has_separate) {
      source.second = read_json(separate, kMaxConfigBytes);
      source.second_where = separate.string();
    }
  } else if (has_separate) {
    source.quantization = read_json(separate, kMaxConfigBytes);
    source.quantization_where = separate.string();
  }
  if (block != nullptr || has_separate) {
    source.method = method_of(JsonReader(source.quantization, source.quantization_where));
  }
  return source;
}

}  // namespace

std::unique_ptr<Checkpoint> open_checkpoint(const std::filesystem::path& path) {
  if (path.extension() == ".gguf") {
    return open_gguf(path);
  }
  // A directory into which quern wrote GGUF.
  if (!is_there(path / "config.json") && is_there(path / kGgufInDirectory)) {
    return open_gguf(path / kGgufInDirectory);
  }
  CheckpointSource source = read_source(path);
  std::string known;
  for (const CheckpointFormat& format : checkpoint_formats()) {
    if (format.probe(source)) {
      return format.open(std::move(source));
    }
    known += (known.empty() ? "" : ", ") + std::string(format.name);
  }
  throw UnsupportedError(
      "a quantization method that quern does not read",
      source.quantization_where,
      fmt::format("expected one of {}, found {}", known, printable(source.method, 60)),
      "use the BF16 release of the model, or one in these formats");
}

}  // namespace quern
