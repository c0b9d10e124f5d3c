// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

namespace quern {

// Types of ggml tensors, by their number in GGUF files (ggml/include/ggml.h): kQ40 is Q4_0.
enum class GgmlType : std::uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ40 = 2,
  kQ41 = 3,
  kQ50 = 6,
  kQ51 = 7,
  kQ80 = 8,
  kQ81 = 9,
  kQ2K = 10,
  kQ3K = 11,
  kQ4K = 12,
  kQ5K = 13,
  kQ6K = 14,
  kQ8K = 15,
  kIQ2XXS = 16,
  kIQ2XS = 17,
  kIQ3XXS = 18,
  kIQ1S = 19,
  kIQ4NL = 20,
  kIQ3S = 21,
  kIQ2S = 22,
  kIQ4XS = 23,
  kI8 = 24,
  kI16 = 25,
  kI32 = 26,
  kI64 = 27,
  kF64 = 28,
  kIQ1M = 29,
  kBF16 = 30,
  kTQ10 = 34,
  kTQ20 = 35,
  kMXFP4 = 39,
  kNVFP4 = 40,
  kQ10 = 41
};

// Elements are stored in blocks along the row; a row holds whole blocks.
struct GgmlTypeInfo {
  GgmlType type = GgmlType::kF32;
  std::string_view name;  // "Q4_K"
  std::int64_t block = 1;  // elements of one block
  std::int64_t bytes = 4;  // of one block
};

// Null for a number that no type has (any more).
[[nodiscard]] const GgmlTypeInfo* find_ggml_type(std::uint32_t number) noexcept;
[[nodiscard]] const GgmlTypeInfo& ggml_type_info(GgmlType type) noexcept;
[[nodiscard]] std::optional<GgmlType> ggml_type_from_name(std::string_view name) noexcept;
// F32, F16, BF16, MXFP4 and the types of ggml_layout().
[[nodiscard]] bool can_dequantize(GgmlType type) noexcept;

// `row` as floats, exactly the values of ggml's dequantize_row_*: `out` is a multiple of the type's
// block and `row` has that many blocks (std::logic_error otherwise, or for types that
// can_dequantize() denies).
void dequantize_row(GgmlType type, std::span<const std::byte> row, std::span<float> out);

// How the blocks of a type are divided (ggml/src/ggml-quants.c). A group is a run of elements that
// share a scale and a minimum; for element e of group g in block b
//
//   x[e] = scale[g] * values[code[e]] - minimum[g]
//   scale[g] = f16(d[b]) * sub_scale[g]        minimum[g] = f16(dmin[b]) * sub_minimum[g]
//
//   type    block  group  codes  values       sub_scale   sub_minimum
//   Q4_0       32     32     16  c - 8        1           0: no minimum
//   Q4_1       32     32     16  c            1           -1 (the file adds its m)
//   Q5_0       32     32     32  c - 16       1           0
//   Q5_1       32     32     32  c            1           -1
//   Q8_0       32     32    256  c - 128      1           0; code 0 is readable, not written
//   Q2_K      256     16      4  c            0..15       0..15
//   Q3_K      256     16      8  c - 4        -32..31     0
//   Q4_K      256     32     16  c            0..63       0..63
//   Q5_K      256     32     32  c            0..63       0..63
//   Q6_K      256     16     64  c - 32       -128..127   0
//   IQ4_NL     32     32     16  table        1           0
//   IQ4_XS    256     32     16  table        -32..31     0
//
// All computed in float, the product of scale and value first.
struct GgmlLayout {
  GgmlType type = GgmlType::kQ40;
  int block = 32;
  int group = 32;
  std::span<const float> values;  // of each code, ascending
  bool linear = true;  // values[c] = c + values[0]
  int lowest_code = 0;  // that a writer uses
  int scale_low = 1;  // range of sub_scale
  int scale_high = 1;
  int minimum_low = 0;  // range of sub_minimum
  int minimum_high = 0;

  [[nodiscard]] int codes() const noexcept { return static_cast<int>(values.size()); }
  [[nodiscard]] int groups() const noexcept { return block / group; }  // of a block
  [[nodiscard]] bool has_minimum() const noexcept {
    return minimum_low != minimum_high || minimum_low != 0;
  }
  // The block has a super-scale that its groups take multiples of.
  [[nodiscard]] bool has_sub_scales() const noexcept { return scale_low != scale_high; }
};

// Null for types that are not in the table above.
[[nodiscard]] const GgmlLayout* ggml_layout(GgmlType type) noexcept;

// A row of n elements taken apart: what is stored, and the scales that follow from it. A solver
// that keeps the stored part chooses `codes` against `scale` and `minimum`, and packs.
struct GgmlRow {
  std::vector<std::uint8_t> codes;  // [n]
  std::vector<std::uint16_t> d;  // [n / block] half bits
  std::vector<std::uint16_t> dmin;  // [n / block] half bits; empty without a minimum
  std::vector<std::int8_t> sub_scale;  // [n / group]
  std::vector<std::int8_t> sub_minimum;  // [n / group]
  std::vector<float> scale;  // [n / group]
  std::vector<float> minimum;  // [n / group]

  // All zero, every array of its size. `n` is a multiple of the block.
  [[nodiscard]] static GgmlRow make(const GgmlLayout& layout, std::size_t n);
  // Computes `scale` and `minimum` of block `b` from what is stored.
  void apply_scales(const GgmlLayout& layout, std::size_t b) noexcept;
};

// Both need a type of ggml_layout(); std::logic_error otherwise, or when sizes disagree. Every row
// of bytes is restored by pack_row to the bit.
[[nodiscard]] GgmlRow unpack_row(GgmlType type, std::span<const std::byte> bytes);
// Uses codes, d, dmin, sub_scale and sub_minimum, all within the ranges of the layout.
void pack_row(GgmlType type, const GgmlRow& row, std::span<std::byte> bytes);

}  // namespace quern
