// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "quant/ggml_types.h"
#include "quant/quantized_matrix.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace quern {

// A matrix whose rows are blocks of a ggml type: owned, or lying in a mapped GGUF file.
struct GgmlMatrix : QuantizedMatrix {
  GgmlType type = GgmlType::kF32;
  // [out_features] rows of whole blocks. They belong to `owner`, or to somebody who outlives this.
  std::span<const std::byte> bytes;
  std::shared_ptr<std::vector<std::byte>> owner;
  // [out_features] where row r of the matrix stands in `bytes`; empty: at r (GGUF files of Llama
  // models interleave the rows of queries and keys).
  std::vector<std::int64_t> stored_rows;
  // [in_features] where column c of the matrix stands in a stored row; empty: at c (out_proj of
  // Qwen3.5's DeltaNet).
  std::vector<std::int64_t> stored_columns;

  // A matrix that owns its bytes. std::logic_error when they are not out_features rows.
  [[nodiscard]] static GgmlMatrix make(
      GgmlType type,
      std::int64_t out_features,
      std::int64_t in_features,
      std::vector<std::byte> bytes);

  [[nodiscard]] std::size_t row_bytes() const noexcept;
  [[nodiscard]] std::span<const std::byte> row(std::int64_t row) const noexcept;

  void dequantize_row(
      const KernelTable& kernels,
      std::int64_t row,
      std::span<std::uint8_t> scratch,
      std::span<float> out) const override;

  static constexpr std::string_view kKind = "ggml";
  [[nodiscard]] std::string_view kind() const override { return kKind; }
  [[nodiscard]] Json parameters() const override;
  // "blocks" U8 [out_features, row_bytes], rows in the order of the matrix; "columns" I64
  // [in_features] where those stand in another.
  [[nodiscard]] std::vector<MatrixPart> parts() const override;
  [[nodiscard]] static std::shared_ptr<const QuantizedMatrix> restore(
      std::int64_t out_features,
      std::int64_t in_features,
      const JsonReader& parameters,
      const PartReader& parts,
      const std::string& where);
};

}  // namespace quern
