// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "quant/quantized_matrix.h"
#include "quant/scheme.h"

#include <cstdint>
#include <span>
#include <vector>

namespace quern {

// The packed form of every uniform grid (integer codes, a scale and an integer zero point for each
// group); file formats translate to and from it at the edge.
//
// codes   Each row is `row_words` little-endian 32-bit words; code i of a row occupies bits
//         i*bits … i*bits + bits - 1 of the row's bit string (least significant first).
// scales  [out_features][groups]; each is exactly representable in scale_dtype, the type that the
//         file stores them in (F16, BF16 or F32).
// zeros   [out_features][groups]; empty when scheme.symmetric.
// group_index  [in_features] group of each column; empty when column i is in group i / group_width
//         (always, but for act-order files of other tools).
//
// W[o][i] = scales[o][g] * (code[o][i] - zero[o][g]), computed in float.
struct PackedLinear : QuantizedMatrix {
  QuantScheme scheme;
  DType scale_dtype = DType::kF16;
  std::int64_t row_words = 0;
  std::vector<std::uint32_t> codes;
  std::vector<float> scales;
  std::vector<std::uint8_t> zeros;
  std::vector<std::int32_t> group_index;

  [[nodiscard]] std::int64_t groups() const noexcept { return scheme.groups(in_features); }

  // An empty (all-zero) matrix with every array of the right size.
  [[nodiscard]] static PackedLinear make(
      const QuantScheme& scheme,
      std::int64_t out_features,
      std::int64_t in_features,
      DType scale_dtype = DType::kF16);

  void set_row_codes(std::int64_t row, std::span<const std::uint8_t> row_codes);
  void get_row_codes(
      const KernelTable& kernels, std::int64_t row, std::span<std::uint8_t> row_codes) const;
  // Zero point of (row, group): the stored one, or 2^(bits-1) when symmetric.
  [[nodiscard]] int zero(std::int64_t row, std::int64_t group) const noexcept;

  void dequantize_row(
      const KernelTable& kernels,
      std::int64_t row,
      std::span<std::uint8_t> scratch,
      std::span<float> out) const override;

  static constexpr std::string_view kKind = "packed";
  [[nodiscard]] std::string_view kind() const override { return kKind; }
  [[nodiscard]] Json parameters() const override;
  [[nodiscard]] std::vector<MatrixPart> parts() const override;
  [[nodiscard]] static std::shared_ptr<const QuantizedMatrix> restore(
      std::int64_t out_features,
      std::int64_t in_features,
      const JsonReader& parameters,
      const PartReader& parts,
      const std::string& where);
};

// The packed grid behind a matrix; throws UnsupportedError, with `where`, when it is of another
// kind.
[[nodiscard]] const PackedLinear& as_packed(
    const QuantizedMatrix& matrix, const std::string& where);

}  // namespace quern
