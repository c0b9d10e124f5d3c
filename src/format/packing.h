// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "quant/packed_linear.h"
#include "tensor/tensor.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

namespace quern {

// What the formats that pack integer codes into 32-bit words (GPTQ, AWQ, compressed-tensors) have
// in common. A stream lays codes end to end, least significant bit first: code k of width b is bits
// k*b … k*b + b - 1 of the little-endian bit string.

// Words of a stream of that many codes.
[[nodiscard]] std::int64_t words_for(std::int64_t codes, int bits);
// Whether no code of this width crosses from one word into the next.
[[nodiscard]] bool fills_words(int bits);

// Code `index` of a stream.
[[nodiscard]] std::uint32_t stream_code(const std::uint32_t* words, std::int64_t index, int bits);
// Adds `code` to a stream of zeros.
void put_stream_code(std::uint32_t* words, std::int64_t index, int bits, std::uint32_t code);

// dst[c][r] = src[r][c], in tiles that fit in the first-level cache. Both may be unaligned bytes.
template <class T>
void transpose(const std::byte* src, std::int64_t rows, std::int64_t columns, std::byte* dst) {
  constexpr std::int64_t kTile = 32;
  for (std::int64_t r0 = 0; r0 < rows; r0 += kTile) {
    const std::int64_t r1 = std::min(rows, r0 + kTile);
    for (std::int64_t c0 = 0; c0 < columns; c0 += kTile) {
      const std::int64_t c1 = std::min(columns, c0 + kTile);
      for (std::int64_t c = c0; c < c1; ++c) {
        for (std::int64_t r = r0; r < r1; ++r) {
          T value;
          std::memcpy(&value, src + (r * columns + c) * std::int64_t{sizeof(T)}, sizeof(T));
          std::memcpy(dst + (c * rows + r) * std::int64_t{sizeof(T)}, &value, sizeof(T));
        }
      }
    }
  }
}

// Checks of stored tensors; `where` names module and tensor. Each throws ParseError.
void require_form(
    const TensorView& view, DType dtype, const Shape& shape, const std::string& where);
void require_sizes(std::int64_t out_features, std::int64_t in_features, const std::string& where);

// F16, BF16 or F32 values of this shape, all of them finite.
[[nodiscard]] std::vector<float> read_scales(
    const TensorView& view, const Shape& shape, const std::string& where);

// The same for a file that stores [groups, out], as [out][groups].
[[nodiscard]] std::vector<float> read_transposed_scales(
    const TensorView& view, std::int64_t groups, std::int64_t out, const std::string& where);

// The group of each column (I32 [in]), or nothing when it says what the group size says.
[[nodiscard]] std::vector<std::int32_t> read_group_index(
    const TensorView& view, const QuantScheme& scheme, std::int64_t in, const std::string& where);

// Clears what lies behind the last code of each row, so that equal weights are equal words.
void clear_row_ends(PackedLinear& packed);
// Zero points that all are in the middle are none.
void drop_middle_zeros(PackedLinear& packed);

// The scales in `dtype`; throws UnsupportedError for a value that it does not hold exactly.
[[nodiscard]] std::vector<std::byte> exact_scales(
    std::span<const float> scales, DType dtype, const std::string& where);
// Throws UnsupportedError when columns are not in their natural groups.
void require_natural_groups(const PackedLinear& packed, const std::string& where);

// "MODULE.tensor" for messages.
[[nodiscard]] std::string extended(const std::string& where, const char* tensor);

}  // namespace quern
