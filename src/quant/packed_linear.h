// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "quant/scheme.h"

#include <cstdint>
#include <span>
#include <vector>

namespace quern {

struct KernelTable;

// The one packed form of a quantized matrix W [out_features, in_features] in memory; file formats
// translate to and from it at the edge.
//
// codes   Each row is `row_words` little-endian 32-bit words; code i of a row occupies bits
//         i*bits … i*bits + bits - 1 of the row's bit string (least significant first).
// scales  [out_features][groups] IEEE half, as stored in files.
// zeros   [out_features][groups]; empty when scheme.symmetric.
// group_index  [in_features] group of each column; empty when column i is in group i / group_width
//         (always, but for act-order files of other tools).
//
// W[o][i] = f16(scales[o][g]) * (code[o][i] - zero[o][g]), computed in float.
struct PackedLinear {
  QuantScheme scheme;
  std::int64_t out_features = 0;
  std::int64_t in_features = 0;
  std::int64_t row_words = 0;
  std::vector<std::uint32_t> codes;
  std::vector<std::uint16_t> scales;
  std::vector<std::uint8_t> zeros;
  std::vector<std::int32_t> group_index;

  [[nodiscard]] std::int64_t groups() const noexcept { return scheme.groups(in_features); }

  // An empty (all-zero) matrix with every array of the right size.
  [[nodiscard]] static PackedLinear make(
      const QuantScheme& scheme, std::int64_t out_features, std::int64_t in_features);

  void set_row_codes(std::int64_t row, std::span<const std::uint8_t> row_codes);
  void get_row_codes(
      const KernelTable& kernels, std::int64_t row, std::span<std::uint8_t> row_codes) const;
  // Zero point of (row, group): the stored one, or 2^(bits-1) when symmetric.
  [[nodiscard]] int zero(std::int64_t row, std::int64_t group) const noexcept;

  // Row `row` as floats; `scratch` and `out` have in_features elements.
  void dequantize_row(
      const KernelTable& kernels,
      std::int64_t row,
      std::span<std::uint8_t> scratch,
      std::span<float> out) const;
  // The whole matrix, row-major.
  [[nodiscard]] std::vector<float> dequantize(const KernelTable& kernels) const;
};

}  // namespace quern
