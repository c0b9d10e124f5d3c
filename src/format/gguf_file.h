// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/file.h"
#include "base/mapped_file.h"
#include "format/gguf_metadata.h"
#include "format/planned_bytes.h"
#include "quant/ggml_types.h"
#include "tensor/tensor.h"

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace quern {

// A GGUF file (ggml/include/gguf.h), all numbers little-endian:
//
//   "GGUF", u32 version, i64 tensors, i64 pairs
//   pairs     string key, u32 type, value; string: u64 length and bytes; array: u32 type, u64 count
//   tensors   string name (at most 63 bytes), u32 n, i64 extents[n] (n 1 to 4, the fastest first),
//             u32 ggml type, u64 offset from the beginning of the data
//   zeros up to a multiple of the alignment (`general.alignment`, a power of two, else 32)
//   data      the tensors in the order of their infos, each padded to the alignment
//
// Versions 2 and 3 are read (they are the same on little-endian machines), 3 is written.
struct GgufTensor {
  std::string name;
  GgmlType type = GgmlType::kF32;
  Shape shape;  // as in safetensors: the last dimension is contiguous, so a matrix is [out, in]
  std::span<const std::byte> bytes;
};

struct GgufContent {
  std::uint32_t version = 3;
  GgufMetadata metadata;
  std::vector<GgufTensor> tensors;  // in the order of the file; the views point into its bytes
};

// A pure function of untrusted bytes; `where` names the file for messages. Throws ParseError when
// anything in the description above does not hold (tensors that do not follow each other and bytes
// after the last one included), UnsupportedError for version 1, big-endian files, unknown tensor
// types and arrays of arrays.
[[nodiscard]] GgufContent parse_gguf(std::span<const std::byte> file, const std::string& where);

// The number of bytes of a tensor; nothing when the row is not made of whole blocks or the size
// does not fit in 63 bits.
[[nodiscard]] std::optional<std::uint64_t> ggml_tensor_bytes(GgmlType type, const Shape& shape);

// A GGUF model on disk: one file, or all parts NAME-00001-of-0000N.gguf when one of them is named.
// Files are mapped read-only.
class GgufFile {
 public:
  // Throws ParseError for broken files and parts that do not belong together, IoError for missing
  // ones, UnsupportedError as parse_gguf.
  [[nodiscard]] static std::unique_ptr<GgufFile> open(const std::filesystem::path& path);

  [[nodiscard]] const GgufMetadata& metadata() const noexcept { return metadata_; }
  [[nodiscard]] const std::vector<GgufTensor>& tensors() const noexcept { return tensors_; }
  [[nodiscard]] const GgufTensor* find(const std::string& name) const noexcept;
  [[nodiscard]] const std::vector<MappedFile>& files() const noexcept { return files_; }
  [[nodiscard]] std::uint32_t version() const noexcept { return version_; }
  // Gives mapped pages back to the system; a later read maps them again.
  void release(std::span<const std::byte> bytes) const noexcept;

 private:
  GgufFile() = default;
  void add_part(const std::filesystem::path& path, std::size_t index, std::size_t count);

  std::vector<MappedFile> files_;
  std::uint32_t version_ = 3;
  GgufMetadata metadata_;  // of the first part
  std::vector<GgufTensor> tensors_;
  std::map<std::string, std::size_t> places_;
};

// What a writer is told before any value exists.
struct GgufDeclaration {
  std::string name;
  GgmlType type = GgmlType::kF32;
  Shape shape;  // as in GgufTensor
};

// The file that metadata and tensors become, to the byte.
struct GgufLayout {
  struct Slot {
    std::uint64_t offset = 0;  // in the file
    std::uint64_t bytes = 0;
  };
  std::string header;  // everything before the data, padded
  std::map<std::string, Slot> slots;
  std::uint64_t bytes = 0;  // of the file
};

// Tensors stand in the file as declared. Throws std::logic_error for a name that is declared twice,
// empty or longer than 63 bytes, a shape without whole blocks or of other than 1 to 4 extents, and
// metadata that cannot be written (a `general.alignment` that is no u32 power of two).
[[nodiscard]] GgufLayout plan_gguf(
    const GgufMetadata& metadata, const std::vector<GgufDeclaration>& tensors);

// Writes tensors at their planned places, in any order, without keeping them. The file appears
// under its name when finish() has renamed it, so that a killed job leaves nothing that looks
// finished.
class GgufWriter {
 public:
  // Reserves the disk space. Throws ResourceError when the disk is full, IoError when the file
  // cannot be written.
  GgufWriter(const std::filesystem::path& target, GgufLayout layout);

  // The whole tensor at once. std::logic_error for an undeclared name, another size, or a second
  // write of the same tensor.
  void write(const std::string& name, std::span<const std::byte> bytes);
  // A part of a tensor that begins at its byte `offset`; the parts come in any order and make up
  // the whole.
  void write_piece(const std::string& name, std::uint64_t offset, std::span<const std::byte> bytes);
  // A large tensor piece by piece: the pieces follow each other from its first byte to its last.
  void append(const std::string& name, std::span<const std::byte> bytes);

  // std::logic_error when a declared tensor was not written completely.
  void finish();

  [[nodiscard]] const GgufLayout& layout() const noexcept { return layout_; }

 private:
  GgufLayout layout_;
  AtomicFile file_;
  PlannedBytes planned_;
};

}  // namespace quern
