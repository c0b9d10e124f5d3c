// SPDX-License-Identifier: Apache-2.0
// The tensors of one compressed-tensors module with arbitrary contents and, sometimes, wrong shapes
// or types. What can be read must be written to the same values, or refused.
#include "base/error.h"
#include "dealer.h"
#include "format/compressed_tensors.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

namespace {

quern::CompressedParts parts_of(
    const std::vector<quern::TensorDeclaration>& declared,
    const std::vector<std::vector<std::byte>>& contents) {
  quern::CompressedParts parts;
  for (std::size_t i = 0; i < declared.size(); ++i) {
    const quern::TensorView view{declared[i].dtype, declared[i].shape, contents[i]};
    const std::string& name = declared[i].name;
    if (name.ends_with("weight_scale")) {
      parts.scale = view;
    } else if (name.ends_with("zero_point")) {
      parts.zero_point = view;
    } else if (name.ends_with("shape")) {
      parts.shape = view;
    } else if (name.ends_with("g_idx")) {
      parts.group_index = view;
    } else if (!name.ends_with("input_scale")) {
      parts.weight = view;
    }
  }
  return parts;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  quern::fuzz::Dealer dealer({reinterpret_cast<const std::byte*>(data), size});
  quern::CompressedForm form;
  form.scheme.bits = 1 + dealer.byte() % 8;
  form.scheme.group_size = std::array<std::int64_t, 4>{0, 8, 32, 20}[dealer.byte() % 4U];
  const std::uint8_t flags = dealer.byte();
  form.scheme.symmetric = (flags & 1U) != 0;
  form.layout =
      (flags & 2U) != 0 ? quern::CompressedLayout::kInteger : quern::CompressedLayout::kPacked;
  form.per_tensor = (flags & 4U) != 0;
  form.activation.bits = (flags & 8U) != 0 ? 8 : 16;
  form.scale_dtype = (flags & 16U) != 0 ? quern::DType::kF32 : quern::DType::kBF16;
  const std::int64_t out = dealer.byte() % 80;
  const std::int64_t in = dealer.byte() % 80;
  const std::uint8_t lie = dealer.byte();
  try {
    if (in == 0) {
      return 0;  // no shape follows from it
    }
    auto declared = quern::compressed_declarations("m", form, out, in);
    if ((flags & 32U) != 0) {
      declared.push_back({"m.weight_g_idx", quern::DType::kI32, {in}});
    }
    if (lie < declared.size()) {
      declared[lie].shape.back() += 1 + dealer.byte() % 8;
    } else if (lie < 2 * declared.size()) {
      declared[lie - declared.size()].dtype = quern::DType::kI8;
    }
    std::vector<std::vector<std::byte>> contents;
    for (const quern::TensorDeclaration& declaration : declared) {
      contents.push_back(dealer.contents(declaration));
      if (declaration.name.ends_with("weight_shape") && lie >= 2 * declared.size()) {
        contents.back() = quern::bytes_of(std::vector<std::int64_t>{out, in});
      }
    }
    const quern::PackedLinear packed =
        quern::unpack_compressed(parts_of(declared, contents), form, out, in, "input");
    quern::CompressedForm written = form;
    written.scheme = packed.scheme;
    written.per_tensor = false;
    written.scale_dtype = quern::DType::kF32;
    const auto tensors = quern::pack_compressed(packed, written, "input");
    const auto names = quern::compressed_declarations("m", written, out, in);
    const quern::PackedLinear again =
        quern::unpack_compressed(parts_of(names, tensors), written, out, in, "written");
    if (again.codes != packed.codes || again.zeros != packed.zeros ||
        again.scales != packed.scales) {
      std::abort();
    }
  } catch (const quern::Error& error) {
    (void)error.three_lines();
  }
  return 0;
}
