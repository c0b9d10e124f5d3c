// SPDX-License-Identifier: Apache-2.0
#include "format/safetensors_writer.h"

#include "base/checked.h"
#include "base/error.h"
#include "base/json.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string_view>
#include <utility>

namespace quern {
namespace {

constexpr std::uint64_t kLengthBytes = 8;
constexpr std::uint64_t kHeaderAlignment = 8;
constexpr const char* kIndexName = "model.safetensors.index.json";

[[noreturn]] void misuse(const std::string& name, const std::string& problem) {
  throw std::logic_error("SafetensorsWriter: tensor " + name + ": " + problem);
}

std::string quoted(const std::string& text) {
  return Json(text).dump(-1, ' ', false, Json::error_handler_t::strict);
}

std::uint64_t tensor_bytes(const TensorDeclaration& tensor) {
  std::int64_t bytes = static_cast<std::int64_t>(dtype_size(tensor.dtype));
  for (const std::int64_t extent : tensor.shape) {
    const auto product = checked_mul(bytes, extent);
    if (extent < 0 || !product) {
      misuse(tensor.name, "impossible shape " + shape_text(tensor.shape));
    }
    bytes = *product;
  }
  return static_cast<std::uint64_t>(bytes);
}

std::string header_entry(const TensorDeclaration& tensor, std::uint64_t begin, std::uint64_t end) {
  return fmt::format(
      R"({}:{{"dtype":"{}","shape":[{}],"data_offsets":[{},{}]}})",
      quoted(tensor.name),
      dtype_name(tensor.dtype),
      fmt::join(tensor.shape, ","),
      begin,
      end);
}

std::string header_start(const SafetensorsOptions& options) {
  std::string text = "{";
  if (!options.metadata.empty()) {
    text += "\"__metadata__\":" + Json(options.metadata).dump();
  }
  return text;
}

std::uint64_t padded(std::uint64_t bytes) {
  return ceil_div(bytes, kHeaderAlignment) * kHeaderAlignment;
}

// The tensors of one file with their sizes.
struct FilePlan {
  std::vector<std::size_t> members;
  std::uint64_t data_bytes = 0;
};

// Fills files in order. Offsets are counted at their greatest length, so that a file keeps within
// the limit whatever order its tensors end up in.
std::vector<FilePlan> split(
    const std::vector<TensorDeclaration>& tensors,
    const std::vector<std::uint64_t>& sizes,
    const SafetensorsOptions& options) {
  const std::uint64_t limit = options.max_file_bytes;
  const std::uint64_t start = header_start(options).size();
  std::vector<FilePlan> files(1);
  std::uint64_t header = start;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const std::uint64_t entry = 1 + header_entry(tensors[i], limit, limit).size();
    const std::uint64_t data = files.back().data_bytes + sizes[i];
    if (!files.back().members.empty() && kLengthBytes + padded(header + entry + 1) + data > limit) {
      files.emplace_back();
      header = start;
    }
    header += entry;
    files.back().members.push_back(i);
    files.back().data_bytes += sizes[i];
  }
  return files;
}

bool is_aligned(
    const std::vector<std::size_t>& members,
    const std::vector<TensorDeclaration>& tensors,
    const std::vector<std::uint64_t>& sizes) {
  std::uint64_t offset = 0;
  for (const std::size_t i : members) {
    if (offset % dtype_size(tensors[i].dtype) != 0) {
      return false;
    }
    offset += sizes[i];
  }
  return true;
}

std::string file_name(std::size_t index, std::size_t count) {
  return count == 1 ? "model.safetensors"
                    : fmt::format("model-{:05}-of-{:05}.safetensors", index + 1, count);
}

std::string with_length(std::string json) {
  json.resize(padded(json.size()), ' ');
  const std::uint64_t length = json.size();
  std::string header(kLengthBytes, '\0');
  std::memcpy(header.data(), &length, kLengthBytes);
  return header + json;
}

std::string index_text(const SafetensorsLayout& layout) {
  Json map = Json::object();
  auto& members = map.get_ref<Json::object_t&>();
  for (const auto& [name, slot] : layout.slots) {
    members.emplace_back(name, layout.files[slot.file].name);  // the names are unique and sorted
  }
  Json index;
  index["metadata"]["total_size"] = layout.tensor_bytes;
  index["weight_map"] = std::move(map);
  return index.dump(2) + "\n";
}

}  // namespace

std::uint64_t SafetensorsLayout::total_bytes() const noexcept {
  return std::accumulate(
      files.begin(),
      files.end(),
      static_cast<std::uint64_t>(index.size()),
      [](std::uint64_t sum, const File& file) { return sum + file.bytes; });
}

SafetensorsLayout plan_safetensors(
    const std::vector<TensorDeclaration>& tensors, const SafetensorsOptions& options) {
  std::vector<std::uint64_t> sizes;
  sizes.reserve(tensors.size());
  for (const TensorDeclaration& tensor : tensors) {
    sizes.push_back(tensor_bytes(tensor));
  }
  std::vector<FilePlan> plans = split(tensors, sizes, options);
  SafetensorsLayout layout;
  for (std::size_t index = 0; index < plans.size(); ++index) {
    FilePlan& plan = plans[index];
    if (!is_aligned(plan.members, tensors, sizes)) {
      std::stable_sort(plan.members.begin(), plan.members.end(), [&](std::size_t a, std::size_t b) {
        return dtype_size(tensors[a].dtype) > dtype_size(tensors[b].dtype);
      });
    }
    std::string header = header_start(options);
    std::uint64_t offset = 0;
    for (const std::size_t i : plan.members) {
      header += header.size() > 1 ? "," : "";
      header += header_entry(tensors[i], offset, offset + sizes[i]);
      if (!layout.slots.emplace(tensors[i].name, SafetensorsLayout::Slot{index, offset, sizes[i]})
               .second) {
        misuse(tensors[i].name, "declared twice");
      }
      offset += sizes[i];
    }
    SafetensorsLayout::File file;
    file.name = file_name(index, plans.size());
    file.header = with_length(header + "}");
    file.bytes = file.header.size() + offset;
    layout.files.push_back(std::move(file));
    layout.tensor_bytes += offset;
  }
  for (auto& [name, slot] : layout.slots) {
    slot.offset += layout.files[slot.file].header.size();
  }
  if (layout.files.size() > 1) {
    layout.index = index_text(layout);
  }
  return layout;
}

SafetensorsWriter::SafetensorsWriter(
    const std::filesystem::path& directory, SafetensorsLayout layout)
    : directory_(directory), layout_(std::move(layout)) {
  std::error_code code;
  for (const auto& entry : std::filesystem::directory_iterator(directory, code)) {
    const std::string name = entry.path().filename().string();
    if (name == kIndexName || (entry.path().extension() == ".safetensors" && name[0] != '.')) {
      throw UsageError(
          "the output directory already holds weights",
          entry.path().string(),
          "expected a directory without safetensors files, found this one",
          "name another directory, or remove the old weights");
    }
  }
  for (const auto& [name, slot] : layout_.slots) {
    planned_.plan(name, slot.bytes);
  }
  for (const SafetensorsLayout::File& file : layout_.files) {
    files_.push_back(std::make_unique<AtomicFile>(directory / file.name));
    files_.back()->reserve(file.bytes);
    files_.back()->write_at(0, std::as_bytes(std::span(file.header.data(), file.header.size())));
  }
}

void SafetensorsWriter::write(const std::string& name, std::span<const std::byte> bytes) {
  planned_.write(name, bytes.size());
  write_at(name, 0, bytes);
}

void SafetensorsWriter::append(const std::string& name, std::span<const std::byte> bytes) {
  write_at(name, planned_.append(name, bytes.size()), bytes);
}

void SafetensorsWriter::write_at(
    const std::string& name, std::uint64_t begin, std::span<const std::byte> bytes) {
  const SafetensorsLayout::Slot& slot = layout_.slots.at(name);
  files_.at(slot.file)->write_at(slot.offset + begin, bytes);
}

void SafetensorsWriter::finish() {
  planned_.check_complete();
  for (const auto& file : files_) {
    file->commit();
  }
  if (!layout_.index.empty()) {
    write_file(directory_ / kIndexName, layout_.index);
  }
}

}  // namespace quern
