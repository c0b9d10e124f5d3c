// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

namespace quern {

// Reads a whole file. Throws IoError when it cannot be read, ParseError above `limit` bytes.
[[nodiscard]] std::string read_file(
    const std::filesystem::path& path, std::uint64_t limit = std::uint64_t{1} << 32U);

// A file that appears under its name only when commit() has written, synced and renamed it; before
// that it is `.NAME.partial` beside it. Destroyed without commit, the partial file is removed.
class AtomicFile {
 public:
  explicit AtomicFile(std::filesystem::path target);
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  ~AtomicFile();

  void write(std::span<const std::byte> bytes);
  void write(std::string_view text);
  void write_at(std::uint64_t offset, std::span<const std::byte> bytes);
  // Takes the disk space for `bytes` bytes now (where the file system can), so that a full
  // disk is found before the work and not after it.
  void reserve(std::uint64_t bytes);
  // Syncs, renames to the target and syncs the directory.
  void commit();
  [[nodiscard]] const std::filesystem::path& target() const noexcept { return target_; }

 private:
  std::filesystem::path target_;
  std::filesystem::path partial_;
  int descriptor_ = -1;
};

// Writes `text` as the whole content of `path`, by AtomicFile.
void write_file(const std::filesystem::path& path, std::string_view text);

// Makes a rename or a new entry in `directory` durable.
void sync_directory(const std::filesystem::path& directory);

// SHA-256 as 64 lower-case hex digits.
class Sha256 {
 public:
  Sha256();
  Sha256(const Sha256&) = delete;
  Sha256& operator=(const Sha256&) = delete;
  ~Sha256();
  void update(std::span<const std::byte> bytes);
  void update(std::string_view text);
  [[nodiscard]] std::string hex();

 private:
  void* state_;
};

[[nodiscard]] std::string sha256_of_file(const std::filesystem::path& path);

}  // namespace quern
