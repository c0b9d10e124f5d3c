// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "quant/quantized_matrix.h"

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace quern {

// What the bits of one row in one block of columns stand for; all are halves.
struct BillmLevels {
  enum Index {
    kLowMean,
    kLowScale,
    kHighMean,
    kHighScale,
    kSalientMean,
    kSalientScale,
    kResidualScale,
    kCount
  };
  std::array<float, kCount> values{};

  // The value of a weight with these bits.
  [[nodiscard]] float value(bool salient, bool sign, bool second) const noexcept {
    const auto signed_by = [&](bool positive, Index scale) {
      return positive ? values[scale] : -values[scale];
    };
    if (salient) {
      return values[kSalientMean] + signed_by(sign, kSalientScale) +
             signed_by(second, kResidualScale);
    }
    return second ? values[kHighMean] + signed_by(sign, kHighScale)
                  : values[kLowMean] + signed_by(sign, kLowScale);
  }
};

// BiLLM's form of a matrix (arXiv 2402.04291; methods.md 6). Columns stand in blocks; some columns
// are salient, the same ones in all rows. Every weight has two bits: its sign and, in salient
// columns, the sign of what is left after the first one, elsewhere whether it belongs to the
// weights of low or of high magnitude. With the levels that is 2 + 7 * 16 / block bits a
// weight, 2.875 for blocks of 128: the "1.1 bits" of the paper count neither the membership nor the
// levels.
//
// Bits of a row are in bytes, least significant first; levels are [out_features][blocks].
struct BillmMatrix : QuantizedMatrix {
  std::int64_t block = 128;  // columns
  std::vector<std::uint8_t> salient;  // [row_bytes] one bit a column
  std::vector<std::uint8_t> signs;  // [out_features][row_bytes]
  std::vector<std::uint8_t> seconds;  // [out_features][row_bytes]
  std::vector<BillmLevels> levels;

  // All zero, with every array of the right size.
  [[nodiscard]] static BillmMatrix make(
      std::int64_t out_features, std::int64_t in_features, std::int64_t block);

  [[nodiscard]] std::int64_t row_bytes() const noexcept { return (in_features + 7) / 8; }
  [[nodiscard]] std::int64_t blocks() const noexcept { return (in_features + block - 1) / block; }
  [[nodiscard]] bool is_salient(std::int64_t column) const noexcept {
    return ((salient[static_cast<std::size_t>(column / 8)] >> (column % 8)) & 1) != 0;
  }

  void dequantize_row(
      const KernelTable& kernels,
      std::int64_t row,
      std::span<std::uint8_t> scratch,
      std::span<float> out) const override;

  static constexpr std::string_view kKind = "billm";
  [[nodiscard]] std::string_view kind() const override { return kKind; }
  // The parts of any such matrix, without their bytes.
  [[nodiscard]] static std::vector<MatrixPart> empty_parts(
      std::int64_t out_features, std::int64_t in_features, std::int64_t block);
  // {"block"}; parts "salient", "signs", "seconds" U8 and "levels" F16 [out, blocks, 7].
  [[nodiscard]] Json parameters() const override;
  [[nodiscard]] std::vector<MatrixPart> parts() const override;
  [[nodiscard]] static std::shared_ptr<const QuantizedMatrix> restore(
      std::int64_t out_features,
      std::int64_t in_features,
      const JsonReader& parameters,
      const PartReader& parts,
      const std::string& where);
};

}  // namespace quern
