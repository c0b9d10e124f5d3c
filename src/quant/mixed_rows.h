// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "quant/packed_linear.h"

#include <cstdint>
#include <vector>

namespace quern {

// A table of which some rows have more bits than the others: the embeddings of frequent tokens at
// 8, the tail at 4 or 6 (methods.md 11.4; formats.md 5, first way). Only quern's own format holds
// it.
struct MixedRows : QuantizedMatrix {
  PackedLinear hot;
  PackedLinear cold;
  // [out_features] the row of `hot` when kHotBit is set, else of `cold`.
  std::vector<std::uint32_t> row_map;
  static constexpr std::uint32_t kHotBit = 0x80000000U;
  static constexpr int kHotBits = 8;
  static constexpr const char* kHot = "hot";  // names of the two tables
  static constexpr const char* kCold = "cold";

  void dequantize_row(
      const KernelTable& kernels,
      std::int64_t row,
      std::span<std::uint8_t> scratch,
      std::span<float> out) const override;

  static constexpr std::string_view kKind = "mixed_rows";
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

}  // namespace quern
