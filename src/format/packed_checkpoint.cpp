// SPDX-License-Identifier: Apache-2.0
#include "format/packed_checkpoint.h"

#include "base/error.h"
#include "format/fused_experts.h"

#include <fmt/format.h>

#include <utility>

namespace quern {
namespace {

constexpr const char* kDownloadAgain = "download the model again";

}  // namespace

PackedCheckpoint::PackedCheckpoint(CheckpointSource source)
    : source_(std::move(source)),
      tensors_(split_fused_experts(SafetensorsStore::open(source_.weights))) {}

StoredLinear PackedCheckpoint::load_linear(
    const std::string& module, std::int64_t out_features, std::int64_t in_features) const {
  return is_quantized(module) ? load_quantized(module, out_features, in_features)
                              : load_dense_linear(*tensors_, module, out_features, in_features);
}

std::string PackedCheckpoint::place(const std::string& name) const {
  return source_.weights.string() + ": " + printable(name);
}

const TensorView& PackedCheckpoint::part(const std::string& module, const char* suffix) const {
  const TensorView* view = tensors_->find(module + suffix);
  if (view == nullptr) {
    throw ParseError(
        "a tensor of a quantized module is missing",
        place(module + suffix),
        "expected it beside the packed weights, found nothing",
        kDownloadAgain);
  }
  return *view;
}

std::vector<std::string> PackedCheckpoint::modules_with(std::string_view suffix) const {
  std::vector<std::string> modules;
  for (const auto& [name, view] : tensors_->tensors()) {
    if (name.ends_with(suffix)) {
      modules.push_back(name.substr(0, name.size() - suffix.size()));
    }
  }
  return modules;
}

void PackedCheckpoint::check_packed(const std::string& module, const char* suffix) const {
  const TensorView& packed = part(module, suffix);
  if (packed.shape.size() != 2) {
    throw ParseError(
        "a tensor of a quantized module has the wrong shape",
        place(module + suffix),
        fmt::format("expected two extents, found {}", shape_text(packed.shape)),
        kDownloadAgain);
  }
  if (tensors_->find(module + ".weight") != nullptr) {
    throw ParseError(
        "a module is stored twice",
        place(module),
        fmt::format("expected {} or .weight, found both", suffix),
        "remove the one that does not belong to the model");
  }
}

}  // namespace quern
