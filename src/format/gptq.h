// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "format/safetensors_writer.h"
#include "quant/packed_linear.h"
#include "tensor/tensor.h"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace quern {

// The tensors of one GPTQ module M with `in` inputs, `out` outputs, width b and G groups. Words are
// 32 bits, little-endian.
//
//   M.qweight  I32 [ceil(in*b/32), out]  codes of one output, streamed down its column
//   M.qzeros   I32 [G, ceil(out*b/32)]   zero points of one group, streamed along its row
//   M.scales   F16 [G, out]
//   M.g_idx    I32 [in]                  group of each input
//
// A stream lays codes end to end, least significant bit first: code k is bits k*b … k*b + b - 1.
// So a column of qweight is a row of PackedLinear, and translating is a transposition.
enum class GptqVersion {
  kV1,  // "gptq": qzeros hold z - 1
  kV2,  // "gptq_v2": qzeros hold z
  // "gptq_p": as v2, but blocks of 32 codes are split into bit planes of widths that divide 32
  // (3 = 2+1, 5 = 4+1, 6 = 4+2, 7 = 4+2+1, low plane first). Plane of width w: w words, code i of
  // the block in word i / (32/w) at shift w * (i % (32/w)). Read only.
  kPlanar
};

[[nodiscard]] std::string_view gptq_version_name(GptqVersion version) noexcept;
[[nodiscard]] std::optional<GptqVersion> gptq_version_from_name(std::string_view name) noexcept;

// The stored tensors of one module, as they stand in a file.
struct GptqTensors {
  TensorView qweight;
  TensorView qzeros;
  TensorView scales;
  std::optional<TensorView> g_idx;  // absent in files of some tools: natural order
};

// Translates a stored module into the form of memory; the values are the same to the bit. Zero
// points of v1 are restored by adding 1 to every field of the whole word for 2, 4 and 8 bits (the
// inverse of the reference writer, which lets a zero point of 0 borrow from its neighbour), and
// field by field modulo 8 for 3 bits. A group index that says what the group size says is dropped;
// zero points that all are 2^(b-1) make the result symmetric. `scheme.symmetric` is not consulted:
// what the tensors say is what the weights are. Throws ParseError, or UnsupportedError for types
// and widths that are not handled, naming `where`.
[[nodiscard]] PackedLinear unpack_gptq(
    const GptqTensors& tensors,
    const QuantScheme& scheme,
    GptqVersion version,
    std::int64_t out_features,
    std::int64_t in_features,
    const std::string& where);

// Throws UnsupportedError when GPTQ has no form for such a module that other tools read, and says
// what would work: widths other than 2, 3, 4 and 8, unusual group sizes, sizes that do not fill
// whole words, the planar version.
void check_gptq_holds(
    const QuantScheme& scheme,
    GptqVersion version,
    std::int64_t out_features,
    std::int64_t in_features,
    const std::string& where);

// The bytes of a module's four tensors, ready to be written under these declarations.
struct GptqBytes {
  std::vector<std::byte> qweight;
  std::vector<std::byte> qzeros;
  std::vector<std::byte> scales;
  std::vector<std::byte> g_idx;
};

// Names "MODULE.qweight" and so on, in the order of GptqBytes.
[[nodiscard]] std::vector<TensorDeclaration> gptq_declarations(
    const std::string& module,
    const QuantScheme& scheme,
    std::int64_t out_features,
    std::int64_t in_features);

// As check_gptq_holds, and refuses act-order group indexes and, in v1, a zero point of 0.
[[nodiscard]] GptqBytes pack_gptq(
    const PackedLinear& packed, GptqVersion version, const std::string& where);

}  // namespace quern
