// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "quant/ggml_matrix.h"

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace quern {

// A matrix whose rows lie in two matrices of blocks, maybe of different types: Qwen3-Next's
// in_proj_qkvz in GGUF files (format/gguf_names.h).
struct JoinedRows : QuantizedMatrix {
  GgmlMatrix first;
  GgmlMatrix second;
  // [out_features] row of `first`, or that of `second` behind all those of `first`.
  std::vector<std::int64_t> rows;

  void dequantize_row(
      const KernelTable& kernels,
      std::int64_t row,
      std::span<std::uint8_t> scratch,
      std::span<float> out) const override;

  static constexpr std::string_view kKind = "joined_rows";
  [[nodiscard]] std::string_view kind() const override { return kKind; }
  [[nodiscard]] Json parameters() const override;
  // "first" and "second" U8 [rows, row bytes], "rows" I64 [out_features].
  [[nodiscard]] std::vector<MatrixPart> parts() const override;
  [[nodiscard]] static std::shared_ptr<const QuantizedMatrix> restore(
      std::int64_t out_features,
      std::int64_t in_features,
      const JsonReader& parameters,
      const PartReader& parts,
      const std::string& where);
};

}  // namespace quern
