// SPDX-License-Identifier: Apache-2.0
#include "quant/ggml_matrix.h"

#include "base/error.h"

#include <fmt/format.h>

#include <optional>
#include <stdexcept>
#include <utility>

namespace quern {
namespace {

std::size_t bytes_of_row(GgmlType type, std::int64_t in_features) noexcept {
  const GgmlTypeInfo& info = ggml_type_info(type);
  return static_cast<std::size_t>(in_features / info.block * info.bytes);
}

}  // namespace

GgmlMatrix GgmlMatrix::make(
    GgmlType type,
    std::int64_t out_features,
    std::int64_t in_features,
    std::vector<std::byte> bytes) {
  if (in_features % ggml_type_info(type).block != 0 ||
      bytes.size() != static_cast<std::size_t>(out_features) * bytes_of_row(type, in_features)) {
    throw std::logic_error(fmt::format(
        "{} bytes are no {} x {} {}",
        bytes.size(),
        out_features,
        in_features,
        ggml_type_info(type).name));
  }
  GgmlMatrix matrix;
  matrix.out_features = out_features;
  matrix.in_features = in_features;
  matrix.type = type;
  matrix.owner = std::make_shared<std::vector<std::byte>>(std::move(bytes));
  matrix.bytes = *matrix.owner;
  return matrix;
}

std::size_t GgmlMatrix::row_bytes() const noexcept {
  return bytes_of_row(type, in_features);
}

std::span<const std::byte> GgmlMatrix::row(std::int64_t row) const noexcept {
  const std::int64_t stored =
      stored_rows.empty() ? row : stored_rows[static_cast<std::size_t>(row)];
  return bytes.subspan(static_cast<std::size_t>(stored) * row_bytes(), row_bytes());
}

void GgmlMatrix::dequantize_row(
    const KernelTable& kernels,
    std::int64_t row,
    std::span<std::uint8_t> scratch,
    std::span<float> out) const {
  (void)kernels;
  (void)scratch;
  if (stored_columns.empty()) {
    quern::dequantize_row(type, this->row(row), out);
    return;
  }
  std::vector<float> stored(out.size());
  quern::dequantize_row(type, this->row(row), stored);
  for (std::size_t c = 0; c < out.size(); ++c) {
    out[c] = stored[static_cast<std::size_t>(stored_columns[c])];
  }
}

Json GgmlMatrix::parameters() const {
  return {{"type", std::string(ggml_type_info(type).name)}};
}

std::vector<MatrixPart> GgmlMatrix::parts() const {
  MatrixPart part;
  part.name = "blocks";
  part.dtype = DType::kU8;
  part.shape = {out_features, static_cast<std::int64_t>(row_bytes())};
  part.bytes.reserve(bytes.size());
  for (std::int64_t r = 0; r < out_features; ++r) {
    const std::span<const std::byte> stored = row(r);
    part.bytes.insert(part.bytes.end(), stored.begin(), stored.end());
  }
  std::vector<MatrixPart> all;
  all.push_back(std::move(part));
  if (!stored_columns.empty()) {
    all.push_back({"columns", DType::kI64, {in_features}, bytes_of(stored_columns)});
  }
  return all;
}

std::shared_ptr<const QuantizedMatrix> GgmlMatrix::restore(
    std::int64_t out_features,
    std::int64_t in_features,
    const JsonReader& parameters,
    const PartReader& parts,
    const std::string& where) {
  const std::string name = parameters.get_string("type");
  const std::optional<GgmlType> type = ggml_type_from_name(name);
  if (!type || !can_dequantize(*type) || in_features % ggml_type_info(*type).block != 0) {
    throw ParseError(
        "a type of blocks that does not fit the matrix",
        parameters.place("type"),
        fmt::format(
            "expected one that divides rows of {}, found {}", in_features, printable(name, 40)),
        "make the checkpoint again");
  }
  const auto row_bytes = static_cast<std::int64_t>(bytes_of_row(*type, in_features));
  const TensorView& view =
      require_part(parts, "blocks", DType::kU8, {out_features, row_bytes}, where);
  return std::make_shared<const GgmlMatrix>(
      make(*type, out_features, in_features, copy_values<std::byte>(view)));
}

}  // namespace quern
