// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "format/gguf_file.h"
#include "model/graph.h"
#include "plan/quant_plan.h"
#include "tensor/checkpoint.h"

#include <cstdint>
#include <string>
#include <vector>

namespace quern {

// A tensor of the GGUF file and where its values come from.
struct GgufEntry {
  GgufDeclaration declaration;
  std::string source;  // tensor of the source; empty for rotary factors, which `values` holds
  const PlannedLinear* linear = nullptr;  // rounded; null: copied
  std::vector<std::int64_t> row_order;  // gguf_row_order of gguf_names.h
  std::vector<float> values;
};

// A GGUF file before anything is rounded: exact to the byte.
struct GgufPlan {
  GgufMetadata metadata;
  std::vector<GgufEntry> entries;
  GgufLayout layout;
};

// Matrices are rounded as planned or keep their floats; vectors become F32, as llama.cpp wants
// them. `plan` must outlive the result. Throws UnsupportedError for what GGUF readers cannot run.
[[nodiscard]] GgufPlan plan_gguf_output(
    const Checkpoint& source,
    const ModelGraph& graph,
    const QuantPlan& plan,
    const std::string& name);

// The type whose name is `text` ("Q4_K") and which quern rounds to; throws UsageError with those
// that there are.
[[nodiscard]] GgmlType rounded_ggml_type(const std::string& text);
// The block type of a width: Q2_K … Q6_K, Q8_0.
[[nodiscard]] GgmlType ggml_type_of_bits(int bits);
// `type`, or what llama.cpp takes instead for rows that its blocks do not divide (Q4_K: Q5_0).
[[nodiscard]] GgmlType fitting_ggml_type(GgmlType type, std::int64_t in_features);

}  // namespace quern
