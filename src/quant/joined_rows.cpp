// SPDX-License-Identifier: Apache-2.0
#include "quant/joined_rows.h"

#include "base/error.h"

#include <fmt/format.h>

#include <array>
#include <set>
#include <utility>

namespace quern {
namespace {

constexpr std::array<const char*, 2> kParts = {"first", "second"};

// One of the two matrices, saved as GgmlMatrix saves itself but under the name `part`.
GgmlMatrix restore_part(
    const char* part,
    std::int64_t in_features,
    const JsonReader& parameters,
    const PartReader& parts,
    const std::string& where) {
  const TensorView* view = parts(part);
  const std::int64_t rows = view == nullptr || view->shape.size() != 2 ? 0 : view->shape[0];
  const PartReader renamed = [&](const std::string&) { return view; };
  const auto matrix = GgmlMatrix::restore(
      rows, in_features, parameters.get_object(part), renamed, where + "." + part);
  return dynamic_cast<const GgmlMatrix&>(*matrix);
}

}  // namespace

void JoinedRows::dequantize_row(
    const KernelTable& kernels,
    std::int64_t row,
    std::span<std::uint8_t> scratch,
    std::span<float> out) const {
  const std::int64_t from = rows[static_cast<std::size_t>(row)];
  if (from < first.out_features) {
    first.dequantize_row(kernels, from, scratch, out);
  } else {
    second.dequantize_row(kernels, from - first.out_features, scratch, out);
  }
}

Json JoinedRows::parameters() const {
  return {{kParts[0], first.parameters()}, {kParts[1], second.parameters()}};
}

std::vector<MatrixPart> JoinedRows::parts() const {
  std::vector<MatrixPart> all;
  for (const GgmlMatrix* matrix : {&first, &second}) {
    MatrixPart part = std::move(matrix->parts().front());
    part.name = kParts[all.size()];
    all.push_back(std::move(part));
  }
  all.push_back({"rows", DType::kI64, {out_features}, bytes_of(rows)});
  return all;
}

std::shared_ptr<const QuantizedMatrix> JoinedRows::restore(
    std::int64_t out_features,
    std::int64_t in_features,
    const JsonReader& parameters,
    const PartReader& parts,
    const std::string& where) {
  auto matrix = std::make_shared<JoinedRows>();
  matrix->out_features = out_features;
  matrix->in_features = in_features;
  matrix->first = restore_part(kParts[0], in_features, parameters, parts, where);
  matrix->second = restore_part(kParts[1], in_features, parameters, parts, where);
  matrix->rows =
      copy_values<std::int64_t>(require_part(parts, "rows", DType::kI64, {out_features}, where));
  const std::set<std::int64_t> distinct(matrix->rows.begin(), matrix->rows.end());
  if (matrix->first.out_features + matrix->second.out_features != out_features ||
      static_cast<std::int64_t>(distinct.size()) != out_features || *distinct.begin() != 0 ||
      *distinct.rbegin() != out_features - 1) {
    throw ParseError(
        "rows of a matrix that do not make up the whole",
        where + ".rows",
        fmt::format("expected each of {} rows once", out_features),
        "make the checkpoint again");
  }
  return matrix;
}

}  // namespace quern
