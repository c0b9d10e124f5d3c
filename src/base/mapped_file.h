// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>

namespace quern {

// A whole file mapped read-only and advised sequential. Move-only; unmaps at the end of its life.
class MappedFile {
 public:
  MappedFile() = default;
  // Throws IoError when the file cannot be opened, is not a regular file, or cannot be mapped.
  explicit MappedFile(const std::filesystem::path& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile();

  [[nodiscard]] std::span<const std::byte> bytes() const noexcept { return {data_, size_}; }
  [[nodiscard]] const std::filesystem::path& path() const noexcept { return path_; }

  // Gives all pages that a range touches back to the system; they are read again when touched.
  void release(std::span<const std::byte> range) const noexcept;

 private:
  void close() noexcept;

  std::filesystem::path path_;
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

// Asks the system to read a range of a mapped file ahead, and returns at once.
void prefetch_mapped(std::span<const std::byte> range) noexcept;

}  // namespace quern
