// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "format/safetensors_writer.h"
#include "quant/packed_linear.h"
#include "tensor/tensor.h"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace quern {

// The integer forms of compressed-tensors (0.20.0, compressors/pack_quantized and naive_quantized)
// for one module M with `in` inputs, `out` outputs, width b and G groups. Codes are range values
// -2^(b-1) … 2^(b-1) - 1; W = scale * (q - zero point).
//
// pack-quantized, weights alone:
//   M.weight_packed      I32 [out, ceil(in*b/32)]  q + 2^(b-1), a stream along each row
//   M.weight_scale       float [out, G]            in the dtype of the model
//   M.weight_zero_point  I32 [ceil(out*b/32), G]   asymmetric only: z + 2^(b-1), a stream down each
//                                                  column
//   M.weight_shape       I64 [2]                   out, in
//
// int-quantized, with integer inputs (naive-quantized is the same layout; read only):
//   M.weight             I8 [out, in]              q
//   M.weight_scale       float [out, G]
//   M.weight_zero_point  I8 [out, G]               asymmetric only
//   M.input_scale        F32 [1]                   static inputs only
//
// Older files are read as well: for 3, 5, 6 and 7 bits they put 32/b (rounded down) codes in a word
// and leave its upper bits unused (before change 3f01c782 of May 2026; told by the width of
// weight_packed); zero points that are not packed (I8 [out, G]) or zero although the scheme is
// symmetric; and act-order groups, M.weight_g_idx I32 [in], where any -1 means natural order.
enum class CompressedLayout { kPacked, kInteger };

// What a configuration says of a module.
struct CompressedForm {
  CompressedLayout layout = CompressedLayout::kPacked;
  QuantScheme scheme;
  DType scale_dtype = DType::kBF16;  // as written; what is read has the dtype of the file
  bool per_tensor = false;  // one scale for the whole matrix, stored as [1]; read only
  bool act_order = false;  // M.weight_g_idx must be there; read only
  ActivationScheme activation;
};

// The stored tensors of one module.
struct CompressedParts {
  TensorView weight;  // weight_packed or weight
  TensorView scale;
  std::optional<TensorView> zero_point;
  std::optional<TensorView> shape;
  std::optional<TensorView> group_index;
};

// Translates a stored module into the form of memory, exactly. Throws ParseError for tensors that
// do not fit the form, and UnsupportedError, naming `where`, when the layout of a width that does
// not divide 32 cannot be told.
[[nodiscard]] PackedLinear unpack_compressed(
    const CompressedParts& parts,
    const CompressedForm& form,
    std::int64_t out_features,
    std::int64_t in_features,
    const std::string& where);

// Throws UnsupportedError, with what would work, for what quern does not write: widths other than 2
// to 8, inputs in partial groups, inputs that are no multiple of 32 at widths that do not divide 32
// (their layout could not be told); with integer inputs: asymmetric weights, widths other than 4
// and 8, and groups at 8 bits, none of which an engine runs.
void check_compressed_holds(
    const CompressedForm& form,
    std::int64_t out_features,
    std::int64_t in_features,
    const std::string& where);

// The tensors of a module, and their bytes in the same order. Packing checks as above and refuses
// group indexes and scales that form.scale_dtype does not hold exactly.
[[nodiscard]] std::vector<TensorDeclaration> compressed_declarations(
    const std::string& module,
    const CompressedForm& form,
    std::int64_t out_features,
    std::int64_t in_features);
[[nodiscard]] std::vector<std::vector<std::byte>> pack_compressed(
    const PackedLinear& packed, const CompressedForm& form, const std::string& where);

}  // namespace quern
