// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/json.h"
#include "model/graph.h"
#include "plan/quant_plan.h"
#include "tensor/checkpoint.h"

namespace quern {

// What makes a model hard to quantize: a list of {id, severity, facts, advice}, from configuration
// and tensors alone. Of a checkpoint that is quantized the facts tell in what form it holds them.
//
//   vocabulary       share of the embedding table in the file, and how it is stored
//   qkv_bias         biases beside quantized products: number and largest
//   swiglu_outliers  largest weight of each down_proj over its RMS, on sampled rows
//   tied_embeddings  one table at both ends
[[nodiscard]] Json model_hazards(const Checkpoint& checkpoint, const ModelGraph& graph);

// The same for a run, each with `handled`: what the plan does about it.
[[nodiscard]] Json run_hazards(
    const Checkpoint& source, const ModelGraph& graph, const QuantPlan& plan);

}  // namespace quern
