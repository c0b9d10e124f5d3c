// SPDX-License-Identifier: Apache-2.0
#include "quant/packed_linear.h"

#include "base/half.h"
#include "kernels/kernels.h"

#include <algorithm>

namespace quern {

PackedLinear PackedLinear::make(
    const QuantScheme& scheme, std::int64_t out_features, std::int64_t in_features) {
  PackedLinear packed;
  packed.scheme = scheme;
  packed.out_features = out_features;
  packed.in_features = in_features;
  packed.row_words = (in_features * scheme.bits + 31) / 32;
  packed.codes.assign(static_cast<std::size_t>(out_features * packed.row_words), 0);
  packed.scales.assign(static_cast<std::size_t>(out_features * packed.groups()), 0);
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
  const std::uint16_t* row_scales = scales.data() + row * group_count;
  if (!group_index.empty()) {
    for (std::int64_t i = 0; i < in_features; ++i) {
      const std::int64_t group = group_index[static_cast<std::size_t>(i)];
      out[static_cast<std::size_t>(i)] =
          f16_to_float(row_scales[group]) *
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
        f16_to_float(row_scales[group]),
        static_cast<float>(zero(row, group)),
        out.data() + begin,
        std::min(width, in_features - begin));
  }
}

std::vector<float> PackedLinear::dequantize(const KernelTable& kernels) const {
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

}  // namespace quern
