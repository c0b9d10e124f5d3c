// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "tensor/tensor.h"

#include <memory>

namespace quern {

// Qwen3.5-MoE as released holds the experts of a layer in two tensors, NAME.experts.gate_up_proj
// [experts, 2 width, hidden] (gate rows first) and NAME.experts.down_proj [experts, hidden, width].
// The store that is returned shows them as the matrices that they are made of,
// NAME.experts.E.gate_proj.weight and so on: views of the mapped file, nothing is copied. A store
// without such tensors comes back as it is.
[[nodiscard]] std::unique_ptr<TensorStore> split_fused_experts(std::unique_ptr<TensorStore> store);

}  // namespace quern
