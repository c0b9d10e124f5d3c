// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

namespace quern {

// Activations of all calibration sequences at one point of a block: `count` matrices of [rows,
// width] floats, in memory or, when the budget does not allow it, in an unnamed file.
class ActivationStore {
 public:
  // `spill_directory` empty: in memory. Throws ResourceError when the disk has no room.
  ActivationStore(
      std::int64_t width,
      std::vector<std::int64_t> rows,
      const std::filesystem::path& spill_directory);
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

  [[nodiscard]] static std::uint64_t bytes(
      std::int64_t width, const std::vector<std::int64_t>& rows);

 private:
  [[nodiscard]] std::int64_t size(std::int64_t index) const { return rows(index) * width_; }

  std::int64_t width_;
  std::vector<std::int64_t> rows_;
  std::vector<std::int64_t> offsets_;  // in floats
  std::vector<float> memory_;
  int descriptor_ = -1;
};

}  // namespace quern
