// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "tensor/tensor.h"

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <vector>

namespace quern {

// Activations of many sequences at one point of a model: `count` matrices of [rows, width] values,
// in memory or, when the budget does not allow it, in an unnamed file. They are kept as floats, or
// rounded to BF16 in half the room.
class ActivationStore {
 public:
  // `spill_directory` empty: in memory. `dtype` is F32 or BF16. Throws ResourceError when the disk
  // has no room.
  ActivationStore(
      std::int64_t width,
      std::vector<std::int64_t> rows,
      const std::filesystem::path& spill_directory,
      DType dtype = DType::kF32);
  ActivationStore(ActivationStore&& other) noexcept;
  ActivationStore& operator=(ActivationStore&& other) noexcept;
  ActivationStore(const ActivationStore&) = delete;
  ActivationStore& operator=(const ActivationStore&) = delete;
  ~ActivationStore();

  [[nodiscard]] std::int64_t count() const noexcept {
    return static_cast<std::int64_t>(rows_.size());
  }
  [[nodiscard]] std::int64_t rows(std::int64_t index) const {
    return rows_[static_cast<std::size_t>(index)];
  }
  [[nodiscard]] std::int64_t width() const noexcept { return width_; }

  // Matrix `index` to or from `values` (rows * width floats). Reading what was never written gives
  // zeros.
  void read(std::int64_t index, float* values) const;
  void write(std::int64_t index, const float* values);
  // The same to work on: where it stands when it is floats in memory, else read into `buffer`,
  // which grows to it. What was changed counts after write() with the same pointer.
  [[nodiscard]] float* values(std::int64_t index, std::vector<float>& buffer);

  [[nodiscard]] static std::uint64_t bytes(
      std::int64_t width, const std::vector<std::int64_t>& rows, DType dtype = DType::kF32);

 private:
  // Null when it is not floats in memory.
  [[nodiscard]] float* in_place(std::int64_t index);
  [[nodiscard]] std::size_t size(std::int64_t index) const {
    return static_cast<std::size_t>(rows(index) * width_);
  }
  void read_bytes(std::int64_t index, std::span<std::byte> bytes) const;
  void write_bytes(std::int64_t index, std::span<const std::byte> bytes);

  std::int64_t width_;
  std::vector<std::int64_t> rows_;
  DType dtype_;
  std::vector<std::size_t> offsets_;  // in bytes
  std::vector<std::byte> memory_;
  int descriptor_ = -1;
};

}  // namespace quern
