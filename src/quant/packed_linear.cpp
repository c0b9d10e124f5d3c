// SPDX-License-Identifier: Apache-2.0
#include "quant/packed_linear.h"

#include "base/error.h"
#include "kernels/kernels.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>

namespace quern {
namespace {

// Scales are finite and zero points are codes.
void check_cells(const PackedLinear& packed, const std::string& where) {
  const bool finite = std::all_of(
      packed.scales.begin(), packed.scales.end(), [](float scale) { return std::isfinite(scale); });
  const bool in_range = std::all_of(packed.zeros.begin(), packed.zeros.end(), [&](int zero) {
    return zero <= packed.scheme.max_code();
  });
  if (!finite || !in_range) {
    throw ParseError(
        finite ? "a zero point is out of range" : "a scale is not a finite number",
        where + (finite ? ".zeros" : ".scales"),
        fmt::format("expected finite scales and zero points up to {}", packed.scheme.max_code()),
        "make the checkpoint again");
  }
}

}  // namespace

PackedLinear PackedLinear::make(
    const QuantScheme& scheme,
    std::int64_t out_features,
    std::int64_t in_features,
    DType scale_dtype) {
  PackedLinear packed;
  packed.scale_dtype = scale_dtype;
  packed.scheme = scheme;
  packed.out_features = out_features;
  packed.in_features = in_features;
  packed.row_words = (in_features * scheme.bits + 31) / 32;
  packed.codes.assign(static_cast<std::size_t>(out_features * packed.row_words), 0);
  packed.scales.assign(static_cast<std::size_t>(out_features * packed.groups()), 0.0F);
  if (!scheme.symmetric) {
    packed.zeros.assign(packed.scales.size(), 0);
  }
  return packed;
}

void PackedLinear::set_row_codes(std::int64_t row, std::span<const std::uint8_t> row_codes) {
  std::uint32_t* words = codes.data() + row * row_words;
  std::fill_n(words, row_words, 0U);
  const auto bits = static_cast<std::uint64_t>(scheme.bits);
  for (std::size_t i = 0; i < row_codes.size(); ++i) {
    const std::uint64_t bit = i * bits;
    const std::uint64_t shifted = static_cast<std::uint64_t>(row_codes[i]) << (bit & 31U);
    words[bit >> 5U] |= static_cast<std::uint32_t>(shifted);
    if ((shifted >> 32U) != 0) {
      words[(bit >> 5U) + 1] |= static_cast<std::uint32_t>(shifted >> 32U);
    }
  }
}

void PackedLinear::get_row_codes(
    const KernelTable& kernels, std::int64_t row, std::span<std::uint8_t> row_codes) const {
  kernels.unpack_codes(
      codes.data() + row * row_words, scheme.bits, 0, in_features, row_codes.data());
}

int PackedLinear::zero(std::int64_t row, std::int64_t group) const noexcept {
  return zeros.empty() ? scheme.symmetric_zero()
                       : zeros[static_cast<std::size_t>(row * groups() + group)];
}

void PackedLinear::dequantize_row(
    const KernelTable& kernels,
    std::int64_t row,
    std::span<std::uint8_t> scratch,
    std::span<float> out) const {
  get_row_codes(kernels, row, scratch);
  const std::int64_t group_count = groups();
  const float* row_scales = scales.data() + row * group_count;
  if (!group_index.empty()) {
    for (std::int64_t i = 0; i < in_features; ++i) {
      const std::int64_t group = group_index[static_cast<std::size_t>(i)];
      out[static_cast<std::size_t>(i)] =
          row_scales[group] *
          static_cast<float>(
              static_cast<int>(scratch[static_cast<std::size_t>(i)]) - zero(row, group));
    }
    return;
  }
  const std::int64_t width = scheme.group_width(in_features);
  for (std::int64_t group = 0; group < group_count; ++group) {
    const std::int64_t begin = group * width;
    kernels.dequantize_group(
        scratch.data() + begin,
        row_scales[group],
        static_cast<float>(zero(row, group)),
        out.data() + begin,
        std::min(width, in_features - begin));
  }
}

Json PackedLinear::parameters() const {
  return {
      {"bits", scheme.bits},
      {"symmetric", scheme.symmetric},
      {"group_size", scheme.group_size == 0 ? -1 : scheme.group_size},
      {"scale_dtype", dtype_name(scale_dtype)}};
}

std::vector<MatrixPart> PackedLinear::parts() const {
  const Shape cells = {out_features, groups()};
  std::vector<MatrixPart> parts = {
      {"codes", DType::kU32, {out_features, row_words}, bytes_of(codes)},
      {"scales", scale_dtype, cells, from_float(scales, scale_dtype)}};
  if (!zeros.empty()) {
    parts.push_back({"zeros", DType::kU8, cells, bytes_of(zeros)});
  }
  if (!group_index.empty()) {
    parts.push_back({"group_index", DType::kI32, {in_features}, bytes_of(group_index)});
  }
  return parts;
}

std::shared_ptr<const QuantizedMatrix> PackedLinear::restore(
    std::int64_t out_features,
    std::int64_t in_features,
    const JsonReader& parameters,
    const PartReader& parts,
    const std::string& where) {
  QuantScheme scheme;
  scheme.bits = static_cast<int>(parameters.get_int_in("bits", 1, 8));
  scheme.symmetric = parameters.get_bool_or("symmetric", true);
  const std::int64_t group_size = parameters.get_int_in("group_size", -1, 1 << 20);
  scheme.group_size = group_size < 0 ? 0 : group_size;
  const std::string name = parameters.get_string("scale_dtype");
  const std::optional<DType> dtype = dtype_from_name(name);
  if (!dtype || !is_16_or_32_bit_float(*dtype)) {
    throw ParseError(
        "scales of an unknown type",
        parameters.place("scale_dtype"),
        "expected F16, BF16 or F32, found " + printable(name, 20),
        "make the checkpoint again");
  }
  auto packed = std::make_shared<PackedLinear>();
  packed->scheme = scheme;
  packed->scale_dtype = *dtype;
  packed->out_features = out_features;
  packed->in_features = in_features;
  packed->row_words = (in_features * scheme.bits + 31) / 32;
  const Shape cells = {out_features, packed->groups()};
  packed->codes = copy_values<std::uint32_t>(
      require_part(parts, "codes", DType::kU32, {out_features, packed->row_words}, where));
  packed->scales = to_float(require_part(parts, "scales", *dtype, cells, where));
  if (!scheme.symmetric) {
    packed->zeros =
        copy_values<std::uint8_t>(require_part(parts, "zeros", DType::kU8, cells, where));
  }
  check_cells(*packed, where);
  if (parts("group_index") != nullptr) {
    packed->group_index = copy_values<std::int32_t>(
        require_part(parts, "group_index", DType::kI32, {in_features}, where));
    for (const std::int32_t group : packed->group_index) {
      if (group < 0 || group >= packed->groups()) {
        throw ParseError(
            "a group index is out of range",
            where + ".group_index",
            fmt::format("expected 0 to {}, found {}", packed->groups() - 1, group),
            "make the checkpoint again");
      }
    }
  }
  return packed;
}

const PackedLinear& as_packed(const QuantizedMatrix& matrix, const std::string& where) {
  const auto* packed = dynamic_cast<const PackedLinear*>(&matrix);
  if (packed == nullptr) {
    throw UnsupportedError(
        "the matrix is not on a uniform grid",
        where,
        fmt::format("expected integer codes with scales, found the form {}", matrix.kind()),
        "write it with --format quern, which holds every form");
  }
  return *packed;
}

}  // namespace quern
