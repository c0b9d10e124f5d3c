// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/file.h"
#include "format/planned_bytes.h"
#include "tensor/tensor.h"

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace quern {

// What a writer is told before any value exists.
struct TensorDeclaration {
  std::string name;
  DType dtype = DType::kF32;
  Shape shape;
};

struct SafetensorsOptions {
  std::uint64_t max_file_bytes = 5'000'000'000;  // a larger single tensor gets a file of its own
  std::map<std::string, std::string> metadata = {{"format", "pt"}};
};

// The files that a list of tensors becomes, to the byte. Files are filled in the order of the list.
// Inside a file tensors stand as declared, unless that would put one at an address that is not a
// multiple of its value size (torch refuses to map those): then wider types come first.
struct SafetensorsLayout {
  struct Slot {
    std::size_t file = 0;
    std::uint64_t offset = 0;  // in the file
    std::uint64_t bytes = 0;
  };
  struct File {
    std::string name;  // model.safetensors, or model-00001-of-0000N.safetensors
    std::string header;  // the length field and the JSON, padded with spaces to a multiple of 8
    std::uint64_t bytes = 0;
  };
  std::vector<File> files;
  std::map<std::string, Slot> slots;
  std::string index;  // text of model.safetensors.index.json; empty when there is one file
  std::uint64_t tensor_bytes = 0;

  // Every byte that the writer will put on disk.
  [[nodiscard]] std::uint64_t total_bytes() const noexcept;
};

// Throws std::logic_error for a name that is declared twice or a negative extent.
[[nodiscard]] SafetensorsLayout plan_safetensors(
    const std::vector<TensorDeclaration>& tensors, const SafetensorsOptions& options = {});

// Writes tensors at their planned places, in any order, without keeping them. Until finish() the
// files carry names that no reader takes; finish() renames them and writes the index last, so that
// a killed job leaves nothing that looks finished.
class SafetensorsWriter {
 public:
  // Reserves the disk space. Throws UsageError when `directory` already holds weights,
  // ResourceError when the disk is full, IoError when it cannot be written.
  SafetensorsWriter(const std::filesystem::path& directory, SafetensorsLayout layout);

  // The whole tensor at once. std::logic_error for an undeclared name, another size, or a second
  // write of the same tensor.
  void write(const std::string& name, std::span<const std::byte> bytes);
  // A large tensor piece by piece: the pieces follow each other from its first byte to its last.
  void append(const std::string& name, std::span<const std::byte> bytes);

  // std::logic_error when a declared tensor was not written completely.
  void finish();

  [[nodiscard]] const SafetensorsLayout& layout() const noexcept { return layout_; }

 private:
  void write_at(const std::string& name, std::uint64_t begin, std::span<const std::byte> bytes);

  std::filesystem::path directory_;
  SafetensorsLayout layout_;
  std::vector<std::unique_ptr<AtomicFile>> files_;
  PlannedBytes planned_;
};

}  // namespace quern
