// SPDX-License-Identifier: Apache-2.0
#include "format/gptq.h"

#include "base/error.h"
#include "format/packing.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <span>
#include <utility>

namespace quern {
namespace {

constexpr std::int64_t kBlock = 32;  // codes that fill whole words at any width
constexpr const char* kWrongConfig =
    "check that the quantization configuration belongs to these weights";

struct VersionName {
  GptqVersion version;
  std::string_view name;
};
constexpr std::array<VersionName, 3> kVersions = {{
    {GptqVersion::kV1, "gptq"},
    {GptqVersion::kV2, "gptq_v2"},
    {GptqVersion::kPlanar, "gptq_p"},
}};

// Rewrites a row of planar blocks as a stream, in place.
void planar_to_stream(std::uint32_t* words, std::int64_t blocks, int bits) {
  for (std::int64_t block = 0; block < blocks; ++block, words += bits) {
    std::array<std::uint32_t, kBlock> codes{};
    int done = 0;  // planes so far are `done` bits, and as many words
    for (const int width : {4, 2, 1}) {
      if ((bits & width) == 0) {
        continue;
      }
      const int in_word = 32 / width;
      for (int i = 0; i < kBlock; ++i) {
        const std::uint32_t field = words[done + i / in_word] >> (width * (i % in_word));
        codes[static_cast<std::size_t>(i)] |= (field & ((1U << width) - 1U)) << done;
      }
      done += width;
    }
    std::fill_n(words, bits, 0U);
    for (int i = 0; i < kBlock; ++i) {
      put_stream_code(words, i, bits, codes[static_cast<std::size_t>(i)]);
    }
  }
}

// [groups, words] to zero points [out][groups].
std::vector<std::uint8_t> read_zeros(
    const TensorView& view,
    int bits,
    GptqVersion version,
    std::int64_t groups,
    std::int64_t out,
    const std::string& where) {
  const std::int64_t words = words_for(out, bits);
  require_form(view, DType::kI32, {groups, words}, where);
  const bool whole_word = version == GptqVersion::kV1 && fills_words(bits);
  const std::uint32_t field_add = version == GptqVersion::kV1 && !whole_word ? 1 : 0;
  const std::uint32_t mask = (1U << bits) - 1U;
  const std::uint32_t word_add = whole_word ? 0xffffffffU / mask : 0;  // a 1 in every field
  std::vector<std::uint32_t> row(static_cast<std::size_t>(words));
  std::vector<std::uint8_t> zeros(static_cast<std::size_t>(out * groups));
  for (std::int64_t group = 0; group < groups; ++group) {
    std::memcpy(row.data(), view.bytes.data() + group * words * 4, row.size() * 4);
    for (std::uint32_t& word : row) {
      word += word_add;
    }
    if (version == GptqVersion::kPlanar && !fills_words(bits)) {
      planar_to_stream(row.data(), out / kBlock, bits);
    }
    for (std::int64_t o = 0; o < out; ++o) {
      zeros[static_cast<std::size_t>(o * groups + group)] =
          static_cast<std::uint8_t>((stream_code(row.data(), o, bits) + field_add) & mask);
    }
  }
  return zeros;
}

void check_readable_width(
    int bits, GptqVersion version, std::int64_t out, std::int64_t in, const std::string& where) {
  require_sizes(out, in, where);
  if (bits < 2 || bits > 8 || (version != GptqVersion::kPlanar && bits > 4 && bits < 8)) {
    throw UnsupportedError(
        "GPTQ does not hold this width",
        where,
        fmt::format(
            "expected 2, 3, 4 or 8 bits (gptq_p: 2 to 8), found {} in {}",
            bits,
            gptq_version_name(version)),
        kWrongConfig);
  }
  if (version == GptqVersion::kPlanar && (in % kBlock != 0 || out % kBlock != 0)) {
    throw ParseError(
        "a planar module has partial blocks",
        where,
        fmt::format("expected multiples of {}, found out {}, in {}", kBlock, out, in),
        kWrongConfig);
  }
}

bool is_usual_group_size(std::int64_t size) {
  constexpr std::array<std::int64_t, 8> kSizes = {0, 16, 32, 64, 128, 256, 512, 1024};
  return std::find(kSizes.begin(), kSizes.end(), size) != kSizes.end();
}

std::vector<std::byte> pack_zeros(
    const PackedLinear& packed, GptqVersion version, const std::string& where) {
  const int bits = packed.scheme.bits;
  const std::int64_t groups = packed.groups();
  const std::int64_t words = words_for(packed.out_features, bits);
  const int subtract = version == GptqVersion::kV1 ? 1 : 0;
  std::vector<std::uint32_t> rows(static_cast<std::size_t>(groups * words));
  for (std::int64_t o = 0; o < packed.out_features; ++o) {
    for (std::int64_t group = 0; group < groups; ++group) {
      const int zero = packed.zero(o, group);
      if (zero < subtract) {
        throw UnsupportedError(
            "GPTQ v1 cannot hold a zero point of 0",
            where,
            fmt::format("expected zero points from 1, found 0 in row {}, group {}", o, group),
            "write gptq_v2, or quantize symmetrically");
      }
      put_stream_code(
          rows.data() + group * words, o, bits, static_cast<std::uint32_t>(zero - subtract));
    }
  }
  const auto bytes = std::as_bytes(std::span(rows));
  return {bytes.begin(), bytes.end()};
}

std::vector<std::byte> natural_group_index(const PackedLinear& packed) {
  const std::int64_t width = packed.scheme.group_width(packed.in_features);
  std::vector<std::int32_t> index(static_cast<std::size_t>(packed.in_features));
  for (std::int64_t i = 0; i < packed.in_features; ++i) {
    index[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(i / width);
  }
  const auto bytes = std::as_bytes(std::span(index));
  return {bytes.begin(), bytes.end()};
}

}  // namespace

std::string_view gptq_version_name(GptqVersion version) noexcept {
  return kVersions[static_cast<std::size_t>(version)].name;
}

std::optional<GptqVersion> gptq_version_from_name(std::string_view name) noexcept {
  for (const VersionName& entry : kVersions) {
    if (entry.name == name) {
      return entry.version;
    }
  }
  return std::nullopt;
}

PackedLinear unpack_gptq(
    const GptqTensors& tensors,
    const QuantScheme& scheme,
    GptqVersion version,
    std::int64_t out_features,
    std::int64_t in_features,
    const std::string& where) {
  check_readable_width(scheme.bits, version, out_features, in_features, where);
  const std::int64_t groups = scheme.groups(in_features);
  const std::int64_t words = words_for(in_features, scheme.bits);
  require_form(tensors.qweight, DType::kI32, {words, out_features}, extended(where, "qweight"));

  PackedLinear packed;
  packed.scheme = scheme;
  packed.out_features = out_features;
  packed.in_features = in_features;
  packed.row_words = words;
  packed.scale_dtype = tensors.scales.dtype;
  packed.scales =
      read_transposed_scales(tensors.scales, groups, out_features, extended(where, "scales"));
  packed.zeros = read_zeros(
      tensors.qzeros, scheme.bits, version, groups, out_features, extended(where, "qzeros"));
  if (tensors.g_idx) {
    packed.group_index =
        read_group_index(*tensors.g_idx, scheme, in_features, extended(where, "g_idx"));
  }
  drop_middle_zeros(packed);

  packed.codes.resize(static_cast<std::size_t>(out_features * words));
  transpose<std::uint32_t>(
      tensors.qweight.bytes.data(),
      words,
      out_features,
      reinterpret_cast<std::byte*>(packed.codes.data()));
  if (version == GptqVersion::kPlanar && !fills_words(scheme.bits)) {
    planar_to_stream(packed.codes.data(), out_features * words / scheme.bits, scheme.bits);
  }
  clear_row_ends(packed);
  return packed;
}

void check_gptq_holds(
    const QuantScheme& scheme,
    GptqVersion version,
    std::int64_t out_features,
    std::int64_t in_features,
    const std::string& where) {
  if (version == GptqVersion::kPlanar) {
    throw UnsupportedError(
        "quern does not write gptq_p",
        where,
        "expected gptq or gptq_v2, found gptq_p, which no serving engine reads",
        "use --format gptq or gptq_v2");
  }
  if (!fills_words(scheme.bits) && scheme.bits != 3) {
    throw UnsupportedError(
        "GPTQ does not hold this width",
        where,
        fmt::format("expected 2, 3, 4 or 8 bits, found {}", scheme.bits),
        "--format compressed-tensors or quern holds it, or choose --bits 4 or 8");
  }
  if (!is_usual_group_size(scheme.group_size)) {
    throw UnsupportedError(
        "no GPTQ reader takes this group size",
        where,
        fmt::format(
            "expected 16, 32, 64, 128, 256, 512, 1024 or channel, found {}", scheme.group_size),
        "use one of these group sizes");
  }
  const std::int64_t step = scheme.bits == 3 ? kBlock : kBlock / scheme.bits;
  if (out_features <= 0 || in_features <= 0 || out_features % step != 0 ||
      in_features % step != 0) {
    throw UnsupportedError(
        "GPTQ cannot pack this matrix",
        where,
        fmt::format(
            "expected sizes that are multiples of {} at {} bits, found out {}, in {}",
            step,
            scheme.bits,
            out_features,
            in_features),
        "make a plan with quern plan and set the method of this linear to keep");
  }
}

std::vector<TensorDeclaration> gptq_declarations(
    const std::string& module,
    const QuantScheme& scheme,
    std::int64_t out_features,
    std::int64_t in_features) {
  const std::int64_t groups = scheme.groups(in_features);
  return {
      {module + ".qweight", DType::kI32, {words_for(in_features, scheme.bits), out_features}},
      {module + ".qzeros", DType::kI32, {groups, words_for(out_features, scheme.bits)}},
      {module + ".scales", DType::kF16, {groups, out_features}},
      {module + ".g_idx", DType::kI32, {in_features}},
  };
}

GptqBytes pack_gptq(const PackedLinear& packed, GptqVersion version, const std::string& where) {
  check_gptq_holds(packed.scheme, version, packed.out_features, packed.in_features, where);
  require_natural_groups(packed, where);
  GptqBytes bytes;
  bytes.qweight.resize(packed.codes.size() * sizeof(std::uint32_t));
  transpose<std::uint32_t>(
      reinterpret_cast<const std::byte*>(packed.codes.data()),
      packed.out_features,
      packed.row_words,
      bytes.qweight.data());
  bytes.qzeros = pack_zeros(packed, version, where);
  const std::vector<std::byte> halves = exact_scales(packed.scales, DType::kF16, where);
  bytes.scales.resize(halves.size());
  transpose<std::uint16_t>(
      halves.data(), packed.out_features, packed.groups(), bytes.scales.data());
  bytes.g_idx = natural_group_index(packed);
  return bytes;
}

}  // namespace quern
