// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "quant/quantized_matrix.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace quern {

// The value of an 8-bit float with 4 bits of exponent and 3 of fraction (E4M3 without infinities,
// "FP8 formats for deep learning", arXiv:2209.05433, table 1): up to 448; 0x7f and 0xff are NaN.
[[nodiscard]] float fp8_e4m3_to_float(std::uint8_t bits) noexcept;

// A matrix of E4M3 values with one scale for each block of rows and columns; the last blocks may be
// smaller. W = value * scale.
struct Fp8Matrix : QuantizedMatrix {
  std::int64_t block_rows = 0;
  std::int64_t block_columns = 0;
  // [out_features, in_features]; they belong to `owner`, or to somebody who outlives this.
  std::span<const std::byte> values;
  std::shared_ptr<const std::vector<std::byte>> owner;
  std::vector<float> scales;  // [row blocks, column blocks]

  [[nodiscard]] Shape scale_shape() const;
  // Row `row` as floats; `out` has in_features elements.
  void decode_row(std::int64_t row, std::span<float> out) const;

  void dequantize_row(
      const KernelTable& kernels,
      std::int64_t row,
      std::span<std::uint8_t> scratch,
      std::span<float> out) const override;

  static constexpr std::string_view kKind = "fp8";
  [[nodiscard]] std::string_view kind() const override { return kKind; }
  [[nodiscard]] Json parameters() const override;
  // "values" F8_E4M3 [out_features, in_features], "scales" F32 [row blocks, column blocks].
  [[nodiscard]] std::vector<MatrixPart> parts() const override;
  [[nodiscard]] static std::shared_ptr<const QuantizedMatrix> restore(
      std::int64_t out_features,
      std::int64_t in_features,
      const JsonReader& parameters,
      const PartReader& parts,
      const std::string& where);
};

}  // namespace quern
