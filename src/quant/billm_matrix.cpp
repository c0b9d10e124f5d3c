// SPDX-License-Identifier: Apache-2.0
#include "quant/billm_matrix.h"

#include "base/error.h"

#include <algorithm>
#include <cmath>
#include <optional>

namespace quern {
namespace {

constexpr std::int64_t kLevels = BillmLevels::kCount;
constexpr std::int64_t kLargestBlock = std::int64_t{1} << 20U;

bool bit(const std::uint8_t* bits, std::int64_t index) {
  return ((bits[index / 8] >> (index % 8)) & 1) != 0;
}

}  // namespace

BillmMatrix BillmMatrix::make(
    std::int64_t out_features, std::int64_t in_features, std::int64_t block) {
  BillmMatrix matrix;
  matrix.out_features = out_features;
  matrix.in_features = in_features;
  matrix.block = block;
  matrix.salient.resize(static_cast<std::size_t>(matrix.row_bytes()));
  matrix.signs.resize(static_cast<std::size_t>(out_features * matrix.row_bytes()));
  matrix.seconds.resize(matrix.signs.size());
  matrix.levels.resize(static_cast<std::size_t>(out_features * matrix.blocks()));
  return matrix;
}

void BillmMatrix::dequantize_row(
    const KernelTable& /*kernels*/,
    std::int64_t row,
    std::span<std::uint8_t> /*scratch*/,
    std::span<float> out) const {
  const std::uint8_t* sign = signs.data() + row * row_bytes();
  const std::uint8_t* second = seconds.data() + row * row_bytes();
  for (std::int64_t b = 0; b < blocks(); ++b) {
    const BillmLevels& level = levels[static_cast<std::size_t>(row * blocks() + b)];
    const std::int64_t end = std::min((b + 1) * block, in_features);
    for (std::int64_t j = b * block; j < end; ++j) {
      out[static_cast<std::size_t>(j)] = level.value(is_salient(j), bit(sign, j), bit(second, j));
    }
  }
}

Json BillmMatrix::parameters() const {
  return {{"block", block}};
}

std::vector<MatrixPart> BillmMatrix::empty_parts(
    std::int64_t out_features, std::int64_t in_features, std::int64_t block) {
  const std::int64_t row = (in_features + 7) / 8;
  const std::int64_t blocks = (in_features + block - 1) / block;
  return {
      {"salient", DType::kU8, {row}, {}},
      {"signs", DType::kU8, {out_features, row}, {}},
      {"seconds", DType::kU8, {out_features, row}, {}},
      {"levels", DType::kF16, {out_features, blocks, kLevels}, {}}};
}

std::vector<MatrixPart> BillmMatrix::parts() const {
  std::vector<float> values;
  values.reserve(levels.size() * kLevels);
  for (const BillmLevels& level : levels) {
    values.insert(values.end(), level.values.begin(), level.values.end());
  }
  std::vector<MatrixPart> parts = empty_parts(out_features, in_features, block);
  parts[0].bytes = bytes_of(salient);
  parts[1].bytes = bytes_of(signs);
  parts[2].bytes = bytes_of(seconds);
  parts[3].bytes = from_float(values, DType::kF16);
  return parts;
}

std::shared_ptr<const QuantizedMatrix> BillmMatrix::restore(
    std::int64_t out_features,
    std::int64_t in_features,
    const JsonReader& parameters,
    const PartReader& parts,
    const std::string& where) {
  auto matrix = std::make_shared<BillmMatrix>();
  matrix->out_features = out_features;
  matrix->in_features = in_features;
  matrix->block = parameters.get_int_in("block", 1, kLargestBlock);
  const std::vector<MatrixPart> expected = empty_parts(out_features, in_features, matrix->block);
  const auto part = [&](std::size_t i) -> const TensorView& {
    return require_part(parts, expected[i].name, expected[i].dtype, expected[i].shape, where);
  };
  matrix->salient = copy_values<std::uint8_t>(part(0));
  matrix->signs = copy_values<std::uint8_t>(part(1));
  matrix->seconds = copy_values<std::uint8_t>(part(2));
  const std::vector<float> values = to_float(part(3));
  if (!std::all_of(values.begin(), values.end(), [](float v) { return std::isfinite(v); })) {
    throw ParseError(
        "a level is not a finite number",
        where + ".levels",
        "found infinity or NaN",
        "make the checkpoint again");
  }
  matrix->levels.resize(values.size() / kLevels);
  for (std::size_t i = 0; i < values.size(); ++i) {
    matrix->levels[i / kLevels].values[i % kLevels] = values[i];
  }
  return matrix;
}

}  // namespace quern
