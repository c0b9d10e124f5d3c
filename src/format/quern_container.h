// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/json.h"
#include "format/output_format.h"
#include "format/safetensors_writer.h"

#include <cstddef>
#include <span>
#include <string>
#include <vector>

namespace quern {

// quern's own container: safetensors files in which every quantized module M is saved by the parts
// of its matrix (quant/quantized_matrix.h), so that it holds every form exactly:
//
//   M.PART       each part under its own type and shape, e.g. M.codes U32 [out, words]
//
// and config.json says how to put them together:
//
//   "quantization_config": {
//     "quant_method": "quern", "version": 1,
//     "modules": {M: {"kind", "parameters", "activation"?: {"bits", "dynamic", "scale"?}}}}
inline constexpr int kContainerVersion = 1;

// The tensors of a module that is still to be made, of the kind module.kind. Throws
// UnsupportedError for a kind whose parts are not known beforehand.
[[nodiscard]] std::vector<TensorDeclaration> container_declarations(const OutputModule& module);

// Their bytes. Throws std::logic_error when the matrix has other parts than were declared.
[[nodiscard]] std::vector<std::vector<std::byte>> pack_container(
    const QuantizedMatrix& matrix, const OutputModule& module);

// Throws UnsupportedError for widths other than 1 to 8.
void check_container_holds(const OutputModule& module);

[[nodiscard]] Json container_config_json(
    std::span<const OutputModule> modules, const Json& meta = Json::object());

}  // namespace quern
