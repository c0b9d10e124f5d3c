// SPDX-License-Identifier: Apache-2.0
#include "format/side_files.h"

#include "base/error.h"
#include "base/file.h"
#include "base/mapped_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <string_view>
#include <system_error>

namespace quern {
namespace {

// Vocabularies of large tokenizers reach some 40 MB as text; nothing else comes near.
constexpr std::uintmax_t kMaxBytes = 256U << 20U;

template <std::size_t kCount>
bool is_one_of(const std::array<std::string_view, kCount>& list, std::string_view text) {
  return std::find(list.begin(), list.end(), text) != list.end();
}

// Why a file stays behind; empty when it is copied.
std::string_view reason_to_skip(const std::filesystem::directory_entry& entry) {
  static constexpr std::array<std::string_view, 15> kWeights = {
      ".safetensors",
      ".bin",
      ".pt",
      ".pth",
      ".ckpt",
      ".gguf",
      ".ggml",
      ".h5",
      ".msgpack",
      ".npz",
      ".npy",
      ".pkl",
      ".pickle",
      ".onnx",
      ".tflite"};
  static constexpr std::array<std::string_view, 5> kCode = {".py", ".pyc", ".ipynb", ".so", ".sh"};
  static constexpr std::array<std::string_view, 6> kRewritten = {
      "config.json",
      "quantize_config.json",
      "quant_config.json",
      "quantization_manifest.json",
      "quant_log.csv",
      "hf_quant_config.json"};
  const std::string name = entry.path().filename().string();
  const std::string extension = entry.path().extension().string();
  std::error_code code;
  if (name.front() == '.') {
    return "hidden";
  }
  if (!entry.is_regular_file(code)) {
    return "not a regular file";
  }
  if (is_one_of(kWeights, extension)) {
    return "weights";
  }
  if (is_one_of(kCode, extension)) {
    return "code: the result must load without running any";
  }
  if (is_one_of(kRewritten, name) || name.ends_with(".index.json")) {
    return "describes the weights of the source";
  }
  if (name.starts_with("README")) {
    return "describes the source";
  }
  if (entry.file_size(code) > kMaxBytes || code) {
    return "larger than any tokenizer";
  }
  return {};
}

}  // namespace

SideFiles copy_side_files(
    const std::filesystem::path& source, const std::filesystem::path& target) {
  SideFiles files;
  std::error_code code;
  if (std::filesystem::equivalent(source, target, code)) {
    throw UsageError(
        "source and output are the same directory",
        target.string(),
        "expected two directories, found one",
        "name another output directory");
  }
  std::vector<std::filesystem::directory_entry> entries;
  for (const auto& entry : std::filesystem::directory_iterator(source, code)) {
    entries.push_back(entry);
  }
  if (code) {
    throw IoError(
        "cannot list the directory", source.string(), code.message(), "check its permissions");
  }
  std::sort(entries.begin(), entries.end());
  for (const std::filesystem::directory_entry& entry : entries) {
    const std::string name = entry.path().filename().string();
    const std::string_view reason = reason_to_skip(entry);
    if (!reason.empty()) {
      files.skipped.push_back({name, std::string(reason)});
      continue;
    }
    const MappedFile content(entry.path());
    AtomicFile copy(target / name);
    copy.write(content.bytes());
    copy.commit();
    files.copied.push_back(name);
  }
  return files;
}

}  // namespace quern
