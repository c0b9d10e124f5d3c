// SPDX-License-Identifier: Apache-2.0
#include "quant/quantized_matrix.h"

#include "base/error.h"
#include "quant/billm_matrix.h"
#include "quant/fp8_matrix.h"
#include "quant/ggml_matrix.h"
#include "quant/joined_rows.h"
#include "quant/mixed_rows.h"
#include "quant/packed_linear.h"

#include <fmt/format.h>

#include <array>

namespace quern {
namespace {

struct MatrixKind {
  std::string_view name;
  std::shared_ptr<const QuantizedMatrix> (*restore)(
      std::int64_t out_features,
      std::int64_t in_features,
      const JsonReader& parameters,
      const PartReader& parts,
      const std::string& where);
};

// One line a kind.
constexpr std::array kKinds = {
    MatrixKind{PackedLinear::kKind, PackedLinear::restore},
    MatrixKind{MixedRows::kKind, MixedRows::restore},
    MatrixKind{GgmlMatrix::kKind, GgmlMatrix::restore},
    MatrixKind{BillmMatrix::kKind, BillmMatrix::restore},
    MatrixKind{Fp8Matrix::kKind, Fp8Matrix::restore},
    MatrixKind{JoinedRows::kKind, JoinedRows::restore},
};

}  // namespace

std::vector<float> QuantizedMatrix::dequantize(const KernelTable& kernels) const {
  std::vector<float> values(static_cast<std::size_t>(out_features * in_features));
  std::vector<std::uint8_t> scratch(static_cast<std::size_t>(in_features));
  for (std::int64_t row = 0; row < out_features; ++row) {
    dequantize_row(
        kernels,
        row,
        scratch,
        std::span(values).subspan(
            static_cast<std::size_t>(row * in_features), static_cast<std::size_t>(in_features)));
  }
  return values;
}

std::uint64_t QuantizedMatrix::stored_bytes() const {
  std::uint64_t total = 0;
  for (const MatrixPart& part : parts()) {
    total += part.bytes.size();
  }
  return total;
}

std::shared_ptr<const QuantizedMatrix> restore_matrix(
    std::string_view kind,
    std::int64_t out_features,
    std::int64_t in_features,
    const JsonReader& parameters,
    const PartReader& parts,
    const std::string& where) {
  for (const MatrixKind& each : kKinds) {
    if (each.name == kind) {
      return each.restore(out_features, in_features, parameters, parts, where);
    }
  }
  throw UnsupportedError(
      "a kind of quantized matrix that quern does not know",
      where,
      "found " + printable(std::string(kind), 60),
      "use a newer version of quern");
}

const TensorView& require_part(
    const PartReader& parts,
    const std::string& name,
    DType dtype,
    const Shape& shape,
    const std::string& where) {
  const TensorView* view = parts(name);
  if (view == nullptr || view->dtype != dtype || view->shape != shape) {
    throw ParseError(
        "a part of a quantized matrix is missing or has the wrong form",
        where + "." + name,
        fmt::format(
            "expected {} {}, found {}",
            dtype_name(dtype),
            shape_text(shape),
            view == nullptr
                ? "nothing"
                : fmt::format("{} {}", dtype_name(view->dtype), shape_text(view->shape))),
        "make the checkpoint again");
  }
  return *view;
}

}  // namespace quern
