// SPDX-License-Identifier: Apache-2.0
#include "format/compressed_tensors.h"

#include "base/checked.h"
#include "base/error.h"
#include "format/packing.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <utility>

namespace quern {
namespace {

constexpr std::int64_t kBlock = 32;  // codes that fill whole words at any width

// Words of a row in the older layout, which lets no code cross a word.
std::int64_t old_words_for(std::int64_t codes, int bits) {
  return ceil_div(codes, std::int64_t{32 / bits});
}

// Code `index` of the older layout.
std::uint32_t old_code(const std::uint32_t* words, std::int64_t index, int bits) {
  const std::int64_t in_word = 32 / bits;
  return (words[index / in_word] >> (bits * (index % in_word))) & ((1U << bits) - 1U);
}

[[noreturn]] void throw_wrong(
    const char* what, const std::string& where, const std::string& reason) {
  throw ParseError(
      what, where, reason, "check that the quantization configuration belongs to these weights");
}

// Whether weight_packed has the older layout.
bool has_old_layout(const TensorView& packed, int bits, std::int64_t in, const std::string& where) {
  const std::int64_t words = packed.shape.size() == 2 ? packed.shape[1] : 0;
  const std::int64_t dense = words_for(in, bits);
  if (fills_words(bits) || words != old_words_for(in, bits)) {
    return false;
  }
  if (words == dense && in * bits > 32) {
    throw UnsupportedError(
        "the layout of the codes cannot be told",
        where,
        fmt::format(
            "expected rows that have another length in the older layout, found {} codes of {} bits "
            "in {} words, which both have",
            in,
            bits,
            words),
        "write the checkpoint again with a current compressed-tensors");
  }
  return words != dense;
}

void check_shape(
    const TensorView& shape, std::int64_t out, std::int64_t in, const std::string& where) {
  const bool wide = shape.dtype == DType::kI64;
  require_form(shape, wide ? DType::kI64 : DType::kI32, {2}, where);
  std::vector<std::int64_t> extents;
  if (wide) {
    extents = copy_values<std::int64_t>(shape);
  } else {
    const auto narrow = copy_values<std::int32_t>(shape);
    extents.assign(narrow.begin(), narrow.end());
  }
  if (extents != Shape{out, in}) {
    throw_wrong(
        "a weight has another shape than the model says",
        where,
        fmt::format("expected {}, found {}", shape_text({out, in}), shape_text(extents)));
  }
}

void read_packed_codes(
    const TensorView& view, bool old_layout, PackedLinear& packed, const std::string& where) {
  const int bits = packed.scheme.bits;
  const std::int64_t in = packed.in_features;
  const std::int64_t words = old_layout ? old_words_for(in, bits) : words_for(in, bits);
  require_form(view, DType::kI32, {packed.out_features, words}, where);
  packed.codes = copy_values<std::uint32_t>(view);
  if (old_layout) {
    std::vector<std::uint32_t> dense(
        static_cast<std::size_t>(packed.out_features * packed.row_words));
    for (std::int64_t row = 0; row < packed.out_features; ++row) {
      for (std::int64_t i = 0; i < in; ++i) {
        put_stream_code(
            dense.data() + row * packed.row_words,
            i,
            bits,
            old_code(packed.codes.data() + row * words, i, bits));
      }
    }
    packed.codes = std::move(dense);
  }
  clear_row_ends(packed);
}

// A range value as a code; throws when it is out of the range of its width.
std::uint8_t code_of(std::byte stored, int bits, const std::string& where) {
  const int value = static_cast<std::int8_t>(stored);
  const int half = 1 << (bits - 1);
  if (value < -half || value >= half) {
    throw_wrong(
        "a value is out of the range of its width",
        where,
        fmt::format("expected {} to {} at {} bits, found {}", -half, half - 1, bits, value));
  }
  return static_cast<std::uint8_t>(value + half);
}

void read_integer_codes(const TensorView& view, PackedLinear& packed, const std::string& where) {
  const std::int64_t in = packed.in_features;
  require_form(view, DType::kI8, {packed.out_features, in}, where);
  packed.codes.resize(static_cast<std::size_t>(packed.out_features * packed.row_words));
  std::vector<std::uint8_t> row(static_cast<std::size_t>(in));
  for (std::int64_t r = 0; r < packed.out_features; ++r) {
    const auto stored = view.bytes.subspan(static_cast<std::size_t>(r * in), row.size());
    std::transform(stored.begin(), stored.end(), row.begin(), [&](std::byte value) {
      return code_of(value, packed.scheme.bits, where);
    });
    packed.set_row_codes(r, row);
  }
}

// Zero points as [out][groups].
std::vector<std::uint8_t> read_zeros(
    const TensorView& view,
    const CompressedForm& form,
    bool old_layout,
    std::int64_t out,
    std::int64_t groups,
    const std::string& where) {
  const int bits = form.scheme.bits;
  std::vector<std::uint8_t> zeros(static_cast<std::size_t>(out * groups));
  if (form.per_tensor) {
    require_form(view, DType::kI8, {1}, where);
    std::fill(zeros.begin(), zeros.end(), code_of(view.bytes[0], bits, where));
    return zeros;
  }
  if (form.layout == CompressedLayout::kInteger || view.dtype == DType::kI8) {
    require_form(view, DType::kI8, {out, groups}, where);
    std::transform(view.bytes.begin(), view.bytes.end(), zeros.begin(), [&](std::byte value) {
      return code_of(value, bits, where);
    });
    return zeros;
  }
  const std::int64_t words = old_layout ? old_words_for(out, bits) : words_for(out, bits);
  require_form(view, DType::kI32, {words, groups}, where);
  std::vector<std::uint32_t> columns(static_cast<std::size_t>(words * groups));
  transpose<std::uint32_t>(
      view.bytes.data(), words, groups, reinterpret_cast<std::byte*>(columns.data()));
  for (std::int64_t group = 0; group < groups; ++group) {
    const std::uint32_t* column = columns.data() + group * words;
    for (std::int64_t o = 0; o < out; ++o) {
      zeros[static_cast<std::size_t>(o * groups + group)] = static_cast<std::uint8_t>(
          old_layout ? old_code(column, o, bits) : stream_code(column, o, bits));
    }
  }
  return zeros;
}

void read_zero_points(
    const CompressedParts& parts,
    const CompressedForm& form,
    bool old_layout,
    PackedLinear& packed,
    const std::string& where) {
  if (!parts.zero_point) {
    if (!form.scheme.symmetric) {
      throw_wrong(
          "a tensor of a quantized module is missing",
          where,
          "expected it because the scheme is asymmetric, found nothing");
    }
    return;
  }
  packed.zeros =
      read_zeros(*parts.zero_point, form, old_layout, packed.out_features, packed.groups(), where);
  if (form.scheme.symmetric) {
    drop_middle_zeros(packed);
    if (!packed.scheme.symmetric) {
      throw_wrong(
          "a symmetric module has zero points",
          where,
          "expected none, or zero everywhere, found other values");
    }
  }
}

// A 1-D or 2-D scale as [out][groups].
std::vector<float> read_weight_scales(
    const TensorView& view,
    const CompressedForm& form,
    std::int64_t out,
    std::int64_t groups,
    const std::string& where) {
  if (!form.per_tensor) {
    return read_scales(view, {out, groups}, where);
  }
  const Shape one = view.shape.empty() ? Shape{} : Shape{1};
  const std::vector<float> scale = read_scales(view, one, where);
  std::vector<float> repeated(static_cast<std::size_t>(out * groups), scale.front());
  return repeated;
}

void read_groups(
    const CompressedParts& parts,
    const CompressedForm& form,
    PackedLinear& packed,
    const std::string& where) {
  if (!parts.group_index) {
    if (form.act_order) {
      throw_wrong(
          "a tensor of a quantized module is missing",
          where,
          "expected it because of actorder: group, found nothing");
    }
    return;
  }
  require_form(*parts.group_index, DType::kI32, {packed.in_features}, where);
  const auto index = copy_values<std::int32_t>(*parts.group_index);
  if (std::find(index.begin(), index.end(), -1) == index.end()) {
    packed.group_index =
        read_group_index(*parts.group_index, packed.scheme, packed.in_features, where);
  }
}

std::vector<std::byte> pack_zeros(const PackedLinear& packed) {
  const int bits = packed.scheme.bits;
  const std::int64_t groups = packed.groups();
  const std::int64_t words = words_for(packed.out_features, bits);
  std::vector<std::uint32_t> columns(static_cast<std::size_t>(groups * words));
  for (std::int64_t o = 0; o < packed.out_features; ++o) {
    for (std::int64_t group = 0; group < groups; ++group) {
      put_stream_code(
          columns.data() + group * words,
          o,
          bits,
          static_cast<std::uint32_t>(packed.zero(o, group)));
    }
  }
  std::vector<std::byte> bytes(columns.size() * sizeof(std::uint32_t));
  transpose<std::uint32_t>(
      reinterpret_cast<const std::byte*>(columns.data()), groups, words, bytes.data());
  return bytes;
}

std::vector<std::byte> integer_codes(const PackedLinear& packed) {
  const std::int64_t in = packed.in_features;
  const int half = packed.scheme.symmetric_zero();
  std::vector<std::int8_t> values(static_cast<std::size_t>(packed.out_features * in));
  for (std::int64_t row = 0; row < packed.out_features; ++row) {
    const std::uint32_t* words = packed.codes.data() + row * packed.row_words;
    for (std::int64_t i = 0; i < in; ++i) {
      values[static_cast<std::size_t>(row * in + i)] = static_cast<std::int8_t>(
          static_cast<int>(stream_code(words, i, packed.scheme.bits)) - half);
    }
  }
  return bytes_of(values);
}

void check_integer_holds(const CompressedForm& form, const std::string& where) {
  const QuantScheme& scheme = form.scheme;
  if (!scheme.symmetric || (scheme.bits != 4 && scheme.bits != 8) ||
      (scheme.bits == 8 && scheme.group_size != 0)) {
    throw UnsupportedError(
        "no engine runs such weights with integer inputs",
        where,
        fmt::format(
            "expected symmetric weights, 8 bits by channel or 4 bits, found {} bits, group {}, {}",
            scheme.bits,
            scheme.group_size,
            scheme.symmetric ? "symmetric" : "asymmetric"),
        "--bits 8 --group-size channel --symmetric, or keep the inputs in floats");
  }
  if (form.activation.bits != 4 && form.activation.bits != 8) {
    throw UnsupportedError(
        "no engine runs inputs of this width",
        where,
        fmt::format("expected 4 or 8 bits, found {}", form.activation.bits),
        "--activation-bits 8");
  }
}

}  // namespace

PackedLinear unpack_compressed(
    const CompressedParts& parts,
    const CompressedForm& form,
    std::int64_t out_features,
    std::int64_t in_features,
    const std::string& where) {
  require_sizes(out_features, in_features, where);
  PackedLinear packed;
  packed.scheme = form.scheme;
  packed.scheme.group_size = form.per_tensor ? 0 : form.scheme.group_size;
  packed.out_features = out_features;
  packed.in_features = in_features;
  packed.row_words = words_for(in_features, form.scheme.bits);
  packed.scale_dtype = parts.scale.dtype;
  packed.scales = read_weight_scales(
      parts.scale, form, out_features, packed.groups(), extended(where, "weight_scale"));
  bool old_layout = false;
  if (form.layout == CompressedLayout::kPacked) {
    const std::string place = extended(where, "weight_packed");
    if (!parts.shape) {
      throw_wrong(
          "a tensor of a quantized module is missing",
          extended(where, "weight_shape"),
          "expected it beside weight_packed, found nothing");
    }
    check_shape(*parts.shape, out_features, in_features, extended(where, "weight_shape"));
    old_layout = has_old_layout(parts.weight, form.scheme.bits, in_features, place);
    read_packed_codes(parts.weight, old_layout, packed, place);
  } else {
    read_integer_codes(parts.weight, packed, extended(where, "weight"));
  }
  read_zero_points(parts, form, old_layout, packed, extended(where, "weight_zero_point"));
  read_groups(parts, form, packed, extended(where, "weight_g_idx"));
  return packed;
}

void check_compressed_holds(
    const CompressedForm& form,
    std::int64_t out_features,
    std::int64_t in_features,
    const std::string& where) {
  const QuantScheme& scheme = form.scheme;
  if (scheme.bits < 2 || scheme.bits > 8) {
    throw UnsupportedError(
        "compressed-tensors does not hold this width",
        where,
        fmt::format("expected 2 to 8 bits, found {}", scheme.bits),
        "--format quern");
  }
  if (form.layout == CompressedLayout::kInteger) {
    check_integer_holds(form, where);
  }
  if (out_features < 1 || in_features < 1 || in_features % scheme.group_width(in_features) != 0) {
    throw UnsupportedError(
        "compressed-tensors has whole groups only",
        where,
        fmt::format(
            "expected inputs in multiples of {}, found out {}, in {}",
            scheme.group_width(in_features),
            out_features,
            in_features),
        "another --group-size, or make a plan with quern plan and keep this linear");
  }
  if (form.layout == CompressedLayout::kPacked && !fills_words(scheme.bits) &&
      in_features % kBlock != 0) {
    throw UnsupportedError(
        "readers could not tell how the codes are laid out",
        where,
        fmt::format(
            "expected inputs in multiples of {} at {} bits, found {}",
            kBlock,
            scheme.bits,
            in_features),
        "--bits 4 or --bits 8, or make a plan with quern plan and keep this linear");
  }
}

std::vector<TensorDeclaration> compressed_declarations(
    const std::string& module,
    const CompressedForm& form,
    std::int64_t out_features,
    std::int64_t in_features) {
  const QuantScheme& scheme = form.scheme;
  const std::int64_t groups = scheme.groups(in_features);
  std::vector<TensorDeclaration> tensors;
  if (form.layout == CompressedLayout::kInteger) {
    tensors = {
        {module + ".weight", DType::kI8, {out_features, in_features}},
        {module + ".weight_scale", form.scale_dtype, {out_features, groups}}};
    if (!form.activation.dynamic) {
      tensors.push_back({module + ".input_scale", DType::kF32, {1}});
    }
    return tensors;
  }
  tensors = {
      {module + ".weight_packed", DType::kI32, {out_features, words_for(in_features, scheme.bits)}},
      {module + ".weight_scale", form.scale_dtype, {out_features, groups}},
      {module + ".weight_shape", DType::kI64, {2}}};
  if (!scheme.symmetric) {
    tensors.push_back(
        {module + ".weight_zero_point",
         DType::kI32,
         {words_for(out_features, scheme.bits), groups}});
  }
  return tensors;
}

std::vector<std::vector<std::byte>> pack_compressed(
    const PackedLinear& packed, const CompressedForm& form, const std::string& where) {
  check_compressed_holds(form, packed.out_features, packed.in_features, where);
  require_natural_groups(packed, where);
  std::vector<std::vector<std::byte>> tensors;
  const bool integer = form.layout == CompressedLayout::kInteger;
  tensors.push_back(integer ? integer_codes(packed) : bytes_of(packed.codes));
  tensors.push_back(exact_scales(packed.scales, form.scale_dtype, where));
  if (integer) {
    if (!form.activation.dynamic) {
      tensors.push_back(bytes_of(std::vector<float>{form.activation.scale}));
    }
    return tensors;
  }
  tensors.push_back(bytes_of(std::vector<std::int64_t>{packed.out_features, packed.in_features}));
  if (!form.scheme.symmetric) {
    tensors.push_back(pack_zeros(packed));
  }
  return tensors;
}

}  // namespace quern
