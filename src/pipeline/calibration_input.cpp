// SPDX-License-Identifier: Apache-2.0
#include "pipeline/calibration_input.h"

#include "base/error.h"
#include "format/safetensors.h"
#include "tensor/checkpoint.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <utility>

namespace quern {
namespace {

void check_ids(const CalibrationSet& set, std::int64_t vocab) {
  for (const auto& sequence : set.sequences) {
    for (const std::int32_t id : sequence) {
      if (id < 0 || id >= vocab) {
        throw UsageError(
            "a calibration token is outside the vocabulary",
            "--calibration",
            fmt::format("expected 0 to {}, found {}", vocab - 1, id),
            "use token ids of this model's tokenizer");
      }
    }
  }
}

const TensorView& find_input_ids(const SafetensorsStore& store, const std::filesystem::path& path) {
  const TensorView* view = store.find("input_ids");
  if (view == nullptr || view->shape.size() != 2 || view->shape[0] < 1 || view->shape[1] < 1 ||
      (view->dtype != DType::kI32 && view->dtype != DType::kI64)) {
    throw ParseError(
        "no usable token ids in the file",
        path.string(),
        "expected input_ids [n, length], I32 or I64, not empty",
        "see quern quantize --help");
  }
  return *view;
}

bool is_ids_file(const CalibrationOptions& options) {
  return options.files.size() == 1 && options.files.front().first.extension() == ".safetensors";
}

}  // namespace

CalibrationExtent calibration_extent(const CalibrationOptions& options) {
  if (!is_ids_file(options)) {
    return {options.samples, options.length};
  }
  const std::filesystem::path& path = options.files.front().first;
  const auto store = SafetensorsStore::open(path);
  const Shape& shape = find_input_ids(*store, path).shape;
  return {std::min(options.samples, shape[0]), shape[1]};
}

std::vector<std::vector<std::int32_t>> read_input_ids(const std::filesystem::path& path) {
  const auto store = SafetensorsStore::open(path);
  const TensorView& view = find_input_ids(*store, path);
  std::vector<std::vector<std::int32_t>> rows(static_cast<std::size_t>(view.shape[0]));
  const std::size_t size = dtype_size(view.dtype);
  const std::byte* at = view.bytes.data();
  for (auto& row : rows) {
    row.resize(static_cast<std::size_t>(view.shape[1]));
    for (std::int32_t& id : row) {
      std::int64_t value = 0;
      std::memcpy(&value, at, size);  // little-endian: the low bytes
      if (size == 4) {
        value = static_cast<std::int32_t>(value);
      }
      if (value < 0 || value > INT32_MAX) {
        throw ParseError(
            "a token id is out of range",
            path.string(),
            fmt::format("found {}", value),
            "check the file");
      }
      id = static_cast<std::int32_t>(value);
      at += size;
    }
  }
  return rows;
}

CalibrationSet load_calibration(
    const CalibrationOptions& options, const PreparedRun& run, std::uint64_t seed) {
  CalibrationSet set;
  if (is_ids_file(options)) {
    const std::filesystem::path& path = options.files.front().first;
    std::vector<std::vector<std::int32_t>> rows = read_input_ids(path);
    if (options.samples > 0 && rows.size() > static_cast<std::size_t>(options.samples)) {
      rows.resize(static_cast<std::size_t>(options.samples));
    }
    set = calibration_set_of(std::move(rows), {path.filename().string()});
  } else {
    std::vector<CalibrationText> texts;
    for (const auto& [path, weight] : options.files) {
      if (path.extension() == ".safetensors") {
        throw UsageError(
            "token ids and text cannot be mixed",
            "--calibration " + path.string(),
            "a .safetensors file stands alone",
            "give only that file");
      }
      texts.push_back(read_calibration_text(path, weight));
    }
    if (texts.empty()) {
      texts.push_back(
          {"default mix", 1, parse_calibration_jsonl(default_calibration_jsonl(), "default mix")});
    }
    const Tokenizer tokenizer = load_tokenizer(run.source->directory());
    set = make_calibration_set(texts, tokenizer, options.samples, options.length, seed);
  }
  check_ids(set, run.graph.config.vocab_size);
  return set;
}

}  // namespace quern
