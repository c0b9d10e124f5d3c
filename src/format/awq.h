// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/json.h"
#include "format/merged_modules.h"
#include "format/safetensors_writer.h"
#include "quant/packed_linear.h"
#include "tensor/tensor.h"

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace quern {

// The tensors of one AWQ module M ("gemm" version) with `in` inputs, `out` outputs and G groups of
// whole size (AutoAWQ 0.2.9, awq/modules/linear/gemm.py and awq/utils/packing_utils.py):
//
//   M.qweight  I32 [in, out/8]  4-bit codes, packed along the outputs
//   M.qzeros   I32 [G, out/8]   zero points in the same order, as they are
//   M.scales   F16 [G, out]
//
// Word c of a row holds outputs 8c … 8c + 7; output 8c + t is the nibble at shift 4 * R[t] with
// R = 0, 4, 1, 5, 2, 6, 3, 7. Columns are never reordered.
struct AwqTensors {
  TensorView qweight;
  TensorView qzeros;
  TensorView scales;
};

// Translates a stored module into the form of memory, exactly. Zero points that all are 8 make the
// result symmetric. Throws ParseError, naming `where`.
[[nodiscard]] PackedLinear unpack_awq(
    const AwqTensors& tensors,
    const QuantScheme& scheme,
    std::int64_t out_features,
    std::int64_t in_features,
    const std::string& where);

// Throws UnsupportedError, with what would work, for widths other than 4, outputs that do not fill
// whole words and groups that do not divide the inputs.
void check_awq_holds(
    const QuantScheme& scheme,
    std::int64_t out_features,
    std::int64_t in_features,
    const std::string& where);

// The bytes of a module's three tensors.
struct AwqBytes {
  std::vector<std::byte> qweight;
  std::vector<std::byte> qzeros;
  std::vector<std::byte> scales;
};

// Names "MODULE.qweight" and so on, in the order of AwqBytes.
[[nodiscard]] std::vector<TensorDeclaration> awq_declarations(
    const std::string& module,
    const QuantScheme& scheme,
    std::int64_t out_features,
    std::int64_t in_features);

// As check_awq_holds, and refuses group indexes and scales that are no halves.
[[nodiscard]] AwqBytes pack_awq(const PackedLinear& packed, const std::string& where);

// What `quantization_config` says of an AWQ checkpoint, checked.
struct AwqConfig {
  QuantScheme scheme;  // of every quantized module
  std::vector<std::string> unconverted;  // `modules_to_not_convert`: parts of module names
};

// Throws ParseError, and UnsupportedError for other versions than gemm and other widths than 4.
[[nodiscard]] AwqConfig read_awq_config(const Json& json, const std::string& where);

// The object for `quantization_config`. `modules` are all linears of the model. `zero_point` is
// always true, also for symmetric schemes: engines read the stored zero points then, and vLLM runs
// its fast kernel only then. Throws UnsupportedError when modules have different schemes, when a
// merged module is quantized in part, and when the name of a module that keeps 16 bits is a part of
// the name of another.
[[nodiscard]] Json awq_config_json(
    const QuantScheme& scheme,
    std::span<const SchemedModule> modules,
    const Json& meta = Json::object());

}  // namespace quern
