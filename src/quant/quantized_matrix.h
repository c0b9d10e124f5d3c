// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/json.h"
#include "tensor/tensor.h"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace quern {

struct KernelTable;

// One stored array of a quantized matrix.
struct MatrixPart {
  std::string name;  // "codes", "scales", …
  DType dtype = DType::kU8;
  Shape shape;
  std::vector<std::byte> bytes;
};

// A weight matrix [out_features, in_features] (a linear, or a table of embeddings) in another form
// than plain floats. What runs, measures or saves a matrix sees only this; what makes or packs one
// knows its kind.
struct QuantizedMatrix {
  std::int64_t out_features = 0;
  std::int64_t in_features = 0;

  QuantizedMatrix() = default;
  QuantizedMatrix(const QuantizedMatrix&) = default;
  QuantizedMatrix(QuantizedMatrix&&) = default;
  QuantizedMatrix& operator=(const QuantizedMatrix&) = default;
  QuantizedMatrix& operator=(QuantizedMatrix&&) = default;
  virtual ~QuantizedMatrix() = default;

  // Row `row` as floats; `scratch` and `out` have in_features elements.
  virtual void dequantize_row(
      const KernelTable& kernels,
      std::int64_t row,
      std::span<std::uint8_t> scratch,
      std::span<float> out) const = 0;

  // What saves it losslessly: the kind (one line of the list in quantized_matrix.cpp), its
  // parameters and its arrays.
  [[nodiscard]] virtual std::string_view kind() const = 0;
  [[nodiscard]] virtual Json parameters() const = 0;
  [[nodiscard]] virtual std::vector<MatrixPart> parts() const = 0;

  // The whole matrix, row-major.
  [[nodiscard]] std::vector<float> dequantize(const KernelTable& kernels) const;
  // Bytes of all parts.
  [[nodiscard]] std::uint64_t stored_bytes() const;
};

// The part of that name; null when there is none.
using PartReader = std::function<const TensorView*(const std::string& name)>;

// The matrix that `kind`, `parameters` and `parts` describe. Throws ParseError, with `where`, for
// what does not fit together.
[[nodiscard]] std::shared_ptr<const QuantizedMatrix> restore_matrix(
    std::string_view kind,
    std::int64_t out_features,
    std::int64_t in_features,
    const JsonReader& parameters,
    const PartReader& parts,
    const std::string& where);

// Helpers of the kinds. The part `name` with this type and shape, or ParseError.
[[nodiscard]] const TensorView& require_part(
    const PartReader& parts,
    const std::string& name,
    DType dtype,
    const Shape& shape,
    const std::string& where);

template <class T>
[[nodiscard]] std::vector<std::byte> bytes_of(const std::vector<T>& values) {
  const auto bytes = std::as_bytes(std::span(values));
  return {bytes.begin(), bytes.end()};
}

template <class T>
[[nodiscard]] std::vector<T> copy_values(const TensorView& view) {
  std::vector<T> values(view.bytes.size() / sizeof(T));
  std::copy(
      view.bytes.begin(), view.bytes.end(), std::as_writable_bytes(std::span(values)).begin());
  return values;
}

}  // namespace quern
