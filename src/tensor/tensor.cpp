// SPDX-License-Identifier: Apache-2.0
#include "tensor/tensor.h"

#include "base/error.h"
#include "base/half.h"

#include <fmt/format.h>

#include <array>
#include <cstring>
#include <utility>

namespace quern {
namespace {

struct DTypeInfo {
  DType dtype;
  std::string_view name;
  std::size_t size;
};

// clang-format off
constexpr std::array<DTypeInfo, 15> kDTypes = {{
    {DType::kBool, "BOOL", 1}, {DType::kU8, "U8", 1},   {DType::kI8, "I8", 1},
    {DType::kI16, "I16", 2},   {DType::kU16, "U16", 2}, {DType::kI32, "I32", 4},
    {DType::kU32, "U32", 4},   {DType::kI64, "I64", 8}, {DType::kU64, "U64", 8},
    {DType::kF8E4M3, "F8_E4M3", 1}, {DType::kF8E5M2, "F8_E5M2", 1},
    {DType::kF16, "F16", 2},   {DType::kBF16, "BF16", 2}, {DType::kF32, "F32", 4}, {DType::kF64, "F64", 8},
}};
// clang-format on

}  // namespace

std::size_t dtype_size(DType dtype) noexcept {
  return kDTypes[static_cast<std::size_t>(dtype)].size;
}

std::string_view dtype_name(DType dtype) noexcept {
  return kDTypes[static_cast<std::size_t>(dtype)].name;
}

std::optional<DType> dtype_from_name(std::string_view name) noexcept {
  for (const DTypeInfo& info : kDTypes) {
    if (info.name == name) {
      return info.dtype;
    }
  }
  return std::nullopt;
}

bool is_16_or_32_bit_float(DType dtype) noexcept {
  return dtype == DType::kF16 || dtype == DType::kBF16 || dtype == DType::kF32;
}

std::string shape_text(const Shape& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

std::int64_t TensorView::count() const noexcept {
  std::int64_t n = 1;
  for (const std::int64_t extent : shape) {
    n *= extent;
  }
  return n;
}

TensorView TensorView::rows(std::int64_t begin, std::int64_t end) const {
  const std::size_t row = static_cast<std::size_t>(shape.at(1)) * dtype_size(dtype);
  return {
      dtype,
      {end - begin, shape.at(1)},
      bytes.subspan(
          static_cast<std::size_t>(begin) * row, static_cast<std::size_t>(end - begin) * row)};
}

void to_float(const TensorView& view, std::span<float> out) {
  const std::byte* data = view.bytes.data();
  switch (view.dtype) {
    case DType::kF32: std::memcpy(out.data(), data, out.size_bytes()); return;
    case DType::kBF16:
    case DType::kF16:
      for (std::size_t i = 0; i < out.size(); ++i) {
        std::uint16_t bits = 0;
        std::memcpy(&bits, data + 2 * i, 2);
        out[i] = view.dtype == DType::kBF16 ? bf16_to_float(bits) : f16_to_float(bits);
      }
      return;
    default:
      throw UnsupportedError(
          "a tensor is not of a float type that quern computes with",
          "",
          fmt::format("expected F16, BF16 or F32, found {}", dtype_name(view.dtype)),
          "use the BF16 release of the model");
  }
}

std::vector<float> to_float(const TensorView& view) {
  std::vector<float> out(static_cast<std::size_t>(view.count()));
  to_float(view, out);
  return out;
}

std::vector<std::byte> from_float(std::span<const float> values, DType dtype) {
  std::vector<std::byte> out(values.size() * dtype_size(dtype));
  switch (dtype) {
    case DType::kF32: std::memcpy(out.data(), values.data(), values.size_bytes()); return out;
    case DType::kBF16:
    case DType::kF16:
      for (std::size_t i = 0; i < values.size(); ++i) {
        const std::uint16_t bits =
            dtype == DType::kBF16 ? float_to_bf16(values[i]) : float_to_f16(values[i]);
        std::memcpy(out.data() + 2 * i, &bits, 2);
      }
      return out;
    default: throw std::logic_error("from_float: not a float type of checkpoints");
  }
}

const TensorView& TensorStore::require(const std::string& name, const Shape& shape) const {
  const TensorView* view = find(name);
  if (view == nullptr) {
    throw ParseError(
        "a tensor is missing",
        name,
        "the configuration asks for it, no file holds it",
        "check that every shard is there and complete");
  }
  if (view->shape != shape) {
    throw ParseError(
        "a tensor has the wrong shape",
        name,
        fmt::format("expected {}, found {}", shape_text(shape), shape_text(view->shape)),
        "check that config.json belongs to these weights");
  }
  return *view;
}

const TensorView& TensorStore::require_float(const std::string& name, const Shape& shape) const {
  const TensorView& view = require(name, shape);
  if (!is_16_or_32_bit_float(view.dtype)) {
    throw UnsupportedError(
        "a tensor is not of a float type that quern computes with",
        name,
        fmt::format("expected BF16, F16 or F32, found {}", dtype_name(view.dtype)),
        "use the BF16 release of the model");
  }
  return view;
}

}  // namespace quern
