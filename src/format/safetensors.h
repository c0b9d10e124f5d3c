// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/mapped_file.h"
#include "tensor/tensor.h"

#include <cstddef>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace quern {

// One safetensors file:
//
//   u64 little-endian   length of the header, at most 100 MB
//   header              JSON object: tensor name -> {"dtype", "shape", "data_offsets": [begin,
//   end]},
//                       and optionally "__metadata__": string -> string; may end in spaces
//   data                the tensors, offsets counted from here; they cover it without hole or
//   overlap
//
// A tensor may start at any byte: readers copy, they do not cast.
struct SafetensorsContent {
  std::map<std::string, TensorView> tensors;  // the views point into the parsed bytes
  std::map<std::string, std::string> metadata;
};

// A pure function of untrusted bytes; `where` names the file for messages. Throws ParseError when
// anything in the description above does not hold.
[[nodiscard]] SafetensorsContent parse_safetensors(
    std::span<const std::byte> file, const std::string& where);

// model.safetensors.index.json: {"weight_map": {tensor name -> file name}}. File names are checked
// to be plain names of .safetensors files, so that an index cannot point outside its directory.
[[nodiscard]] std::map<std::string, std::string> parse_safetensors_index(
    std::string_view text, const std::string& where);

// The tensors of one .safetensors file, or of a directory: those of the files that
// model.safetensors.index.json names, or of model.safetensors. Files are mapped read-only.
class SafetensorsStore : public TensorStore {
 public:
  // Throws ParseError for broken files, IoError for missing ones, and UnsupportedError for a
  // directory that only holds weights in another container.
  [[nodiscard]] static std::unique_ptr<SafetensorsStore> open(const std::filesystem::path& path);

  [[nodiscard]] const TensorView* find(const std::string& name) const override;
  [[nodiscard]] const std::map<std::string, TensorView>& tensors() const override {
    return tensors_;
  }
  void release(const TensorView& view) const override;

  [[nodiscard]] const std::vector<MappedFile>& files() const noexcept { return files_; }

 private:
  SafetensorsStore() = default;
  void add_file(const std::filesystem::path& path);
  void add_indexed_files(const std::filesystem::path& index);

  std::vector<MappedFile> files_;
  std::map<std::string, TensorView> tensors_;
};

}  // namespace quern
