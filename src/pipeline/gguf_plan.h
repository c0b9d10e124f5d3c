// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "format/gguf_file.h"
#include "format/gguf_names.h"
#include "model/graph.h"
#include "plan/quant_plan.h"
#include "tensor/checkpoint.h"

#include <cstdint>
#include <string>
#include <vector>

namespace quern {

// Rows of a tensor of the source in a tensor of the GGUF file.
struct GgufPiece {
  std::string source;
  const PlannedLinear* linear = nullptr;  // rounded; null: copied
  std::vector<std::int64_t> rows;  // of the source, in the order of the file; empty: all of them
  // Heads of columns of the source, in the order of the file; empty: all columns in order.
  std::vector<std::int64_t> column_heads;
};

// A tensor of the GGUF file and where its values come from.
struct GgufEntry {
  GgufDeclaration declaration;
  std::vector<GgufPiece> pieces;  // one below the other, of equal sizes: all experts, or one
  GgufValues change = GgufValues::kSame;
  std::vector<float> values;  // of rotary factors, which have no pieces
};

// A tensor of the source that the file does not hold, and why.
struct GgufSkipped {
  std::string source;
  std::string reason;
};

// A GGUF file before anything is rounded: exact to the byte.
struct GgufPlan {
  GgufMetadata metadata;
  std::vector<GgufEntry> entries;
  std::vector<GgufSkipped> skipped;
  GgufLayout layout;
};

// How many columns of a linear stay together: blocks must divide them. All of them, but for heads
// that GGUF puts in another order.
[[nodiscard]] std::int64_t gguf_columns_together(
    const ModelGraph& graph, const PlannedLinear& linear);

// Why a file of a language model leaves a tensor out; null when it does not.
[[nodiscard]] const char* left_out_of_gguf(const std::string& tensor);

// Matrices are rounded as planned or keep their floats; vectors, routers and convolutions become
// F32, as llama.cpp wants them; the experts of a layer are stacked and must be rounded alike.
// Vision towers and draft layers are left out. `plan` must outlive the result. Throws
// UnsupportedError for what GGUF readers cannot run.
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
