// SPDX-License-Identifier: Apache-2.0
#include "format/packing.h"

#include "base/checked.h"
#include "base/error.h"

#include <fmt/format.h>

#include <cmath>

namespace quern {
namespace {

constexpr const char* kWrongConfig =
    "check that the quantization configuration belongs to these weights";

}  // namespace

std::int64_t words_for(std::int64_t codes, int bits) {
  return ceil_div(codes * bits, std::int64_t{32});
}

bool fills_words(int bits) {
  return bits == 1 || bits == 2 || bits == 4 || bits == 8;
}

std::uint32_t stream_code(const std::uint32_t* words, std::int64_t index, int bits) {
  const std::int64_t bit = index * bits;
  const std::int64_t word = bit / 32;
  const auto shift = static_cast<int>(bit % 32);
  std::uint64_t window = words[word];
  if (shift + bits > 32) {
    window |= static_cast<std::uint64_t>(words[word + 1]) << 32U;
  }
  return static_cast<std::uint32_t>(window >> shift) & ((1U << bits) - 1U);
}

void put_stream_code(std::uint32_t* words, std::int64_t index, int bits, std::uint32_t code) {
  const std::int64_t bit = index * bits;
  const std::uint64_t shifted = static_cast<std::uint64_t>(code) << (bit % 32);
  words[bit / 32] |= static_cast<std::uint32_t>(shifted);
  if ((shifted >> 32U) != 0) {
    words[bit / 32 + 1] |= static_cast<std::uint32_t>(shifted >> 32U);
  }
}

void require_form(
    const TensorView& view, DType dtype, const Shape& shape, const std::string& where) {
  if (view.dtype != dtype) {
    throw ParseError(
        "a tensor of a quantized module has the wrong type",
        where,
        fmt::format("expected {}, found {}", dtype_name(dtype), dtype_name(view.dtype)),
        kWrongConfig);
  }
  if (view.shape != shape) {
    throw ParseError(
        "a tensor of a quantized module has the wrong shape",
        where,
        fmt::format("expected {}, found {}", shape_text(shape), shape_text(view.shape)),
        kWrongConfig);
  }
}

void require_sizes(std::int64_t out_features, std::int64_t in_features, const std::string& where) {
  if (out_features < 1 || in_features < 1 || out_features > INT32_MAX || in_features > INT32_MAX) {
    throw ParseError(
        "a module of impossible size",
        where,
        fmt::format(
            "expected sizes from 1 to 2^31 - 1, found out {}, in {}", out_features, in_features),
        kWrongConfig);
  }
}

std::vector<float> read_scales(
    const TensorView& view, const Shape& shape, const std::string& where) {
  require_form(view, is_16_or_32_bit_float(view.dtype) ? view.dtype : DType::kF16, shape, where);
  std::vector<float> scales = to_float(view);
  for (const float scale : scales) {
    if (!std::isfinite(scale)) {
      throw ParseError(
          "a scale is not a finite number",
          where,
          fmt::format("expected finite values, found {}", scale),
          "download the file again, or quantize the model again");
    }
  }
  return scales;
}

std::vector<float> read_transposed_scales(
    const TensorView& view, std::int64_t groups, std::int64_t out, const std::string& where) {
  const std::vector<float> values = read_scales(view, {groups, out}, where);
  std::vector<float> scales(values.size());
  transpose<float>(
      reinterpret_cast<const std::byte*>(values.data()),
      groups,
      out,
      reinterpret_cast<std::byte*>(scales.data()));
  return scales;
}

std::vector<std::int32_t> read_group_index(
    const TensorView& view, const QuantScheme& scheme, std::int64_t in, const std::string& where) {
  require_form(view, DType::kI32, {in}, where);
  std::vector<std::int32_t> index = copy_values<std::int32_t>(view);
  const std::int64_t groups = scheme.groups(in);
  bool natural = true;
  for (std::int64_t i = 0; i < in; ++i) {
    const std::int32_t group = index[static_cast<std::size_t>(i)];
    if (group < 0 || group >= groups) {
      throw ParseError(
          "a group index is out of range",
          where,
          fmt::format("expected 0 to {} for column {}, found {}", groups - 1, i, group),
          kWrongConfig);
    }
    natural = natural && group == i / scheme.group_width(in);
  }
  return natural ? std::vector<std::int32_t>() : index;
}

void clear_row_ends(PackedLinear& packed) {
  const auto used = static_cast<int>((packed.in_features * packed.scheme.bits) % 32);
  if (used != 0) {
    for (std::int64_t row = 1; row <= packed.out_features; ++row) {
      packed.codes[static_cast<std::size_t>(row * packed.row_words - 1)] &= (1U << used) - 1U;
    }
  }
}

void drop_middle_zeros(PackedLinear& packed) {
  const auto middle = static_cast<std::uint8_t>(packed.scheme.symmetric_zero());
  packed.scheme.symmetric = std::all_of(
      packed.zeros.begin(), packed.zeros.end(), [&](std::uint8_t zero) { return zero == middle; });
  if (packed.scheme.symmetric) {
    packed.zeros.clear();
  }
}

std::vector<std::byte> exact_scales(
    std::span<const float> scales, DType dtype, const std::string& where) {
  std::vector<std::byte> stored = from_float(scales, dtype);
  const Shape shape = {static_cast<std::int64_t>(scales.size())};
  const std::vector<float> back = to_float({dtype, shape, stored});
  for (std::size_t i = 0; i < scales.size(); ++i) {
    if (back[i] != scales[i]) {
      throw UnsupportedError(
          "a scale does not fit in the type that the format stores",
          where,
          fmt::format("expected values of {}, found {}", dtype_name(dtype), scales[i]),
          "write compressed-tensors, or quantize again");
    }
  }
  return stored;
}

void require_natural_groups(const PackedLinear& packed, const std::string& where) {
  if (!packed.group_index.empty()) {
    throw UnsupportedError(
        "quern does not write act-order checkpoints",
        where,
        "expected columns in their natural groups, found a group index, which vLLM refuses",
        "--format quern holds it; quantize with --order group-aware, which needs no index");
  }
}

std::string extended(const std::string& where, const char* tensor) {
  return where + "." + tensor;
}

}  // namespace quern
