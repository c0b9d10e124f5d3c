// SPDX-License-Identifier: Apache-2.0
#include "quant/fp8_matrix.h"

#include "base/checked.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

namespace quern {
namespace {

constexpr std::int64_t kMaxBlock = 1 << 20;

std::array<float, 256> make_table() {
  constexpr int kBias = 7;
  constexpr int kFractionBits = 3;
  std::array<float, 256> table{};
  for (int bits = 0; bits < 256; ++bits) {
    const int exponent = (bits >> kFractionBits) & 0xf;
    const int fraction = bits & 0x7;
    const float magnitude =
        (bits & 0x7f) == 0x7f ? std::numeric_limits<float>::quiet_NaN()
        : exponent == 0
            ? std::ldexp(static_cast<float>(fraction), 1 - kBias - kFractionBits)
            : std::ldexp(static_cast<float>(8 + fraction), exponent - kBias - kFractionBits);
    table[static_cast<std::size_t>(bits)] = (bits & 0x80) != 0 ? -magnitude : magnitude;
  }
  return table;
}

const std::array<float, 256>& table() {
  static const std::array<float, 256> kTable = make_table();
  return kTable;
}

}  // namespace

float fp8_e4m3_to_float(std::uint8_t bits) noexcept {
  return table()[bits];
}

Shape Fp8Matrix::scale_shape() const {
  return {ceil_div(out_features, block_rows), ceil_div(in_features, block_columns)};
}

void Fp8Matrix::dequantize_row(
    const KernelTable& kernels,
    std::int64_t row,
    std::span<std::uint8_t> scratch,
    std::span<float> out) const {
  (void)kernels;
  (void)scratch;
  decode_row(row, out);
}

void Fp8Matrix::decode_row(std::int64_t row, std::span<float> out) const {
  const std::array<float, 256>& decoded = table();
  const std::byte* from = values.data() + row * in_features;
  const float* scale = scales.data() + row / block_rows * ceil_div(in_features, block_columns);
  for (std::int64_t begin = 0; begin < in_features; begin += block_columns, ++scale) {
    const std::int64_t end = std::min(begin + block_columns, in_features);
    for (std::int64_t i = begin; i < end; ++i) {
      out[static_cast<std::size_t>(i)] = decoded[static_cast<std::size_t>(from[i])] * *scale;
    }
  }
}

Json Fp8Matrix::parameters() const {
  return {{"block_rows", block_rows}, {"block_columns", block_columns}};
}

std::vector<MatrixPart> Fp8Matrix::parts() const {
  std::vector<MatrixPart> all;
  all.push_back(
      {"values", DType::kF8E4M3, {out_features, in_features}, {values.begin(), values.end()}});
  all.push_back({"scales", DType::kF32, scale_shape(), bytes_of(scales)});
  return all;
}

std::shared_ptr<const QuantizedMatrix> Fp8Matrix::restore(
    std::int64_t out_features,
    std::int64_t in_features,
    const JsonReader& parameters,
    const PartReader& parts,
    const std::string& where) {
  auto matrix = std::make_shared<Fp8Matrix>();
  matrix->out_features = out_features;
  matrix->in_features = in_features;
  matrix->block_rows = parameters.get_int_in("block_rows", 1, kMaxBlock);
  matrix->block_columns = parameters.get_int_in("block_columns", 1, kMaxBlock);
  const TensorView& values =
      require_part(parts, "values", DType::kF8E4M3, {out_features, in_features}, where);
  matrix->owner =
      std::make_shared<const std::vector<std::byte>>(values.bytes.begin(), values.bytes.end());
  matrix->values = *matrix->owner;
  matrix->scales =
      copy_values<float>(require_part(parts, "scales", DType::kF32, matrix->scale_shape(), where));
  return matrix;
}

}  // namespace quern
