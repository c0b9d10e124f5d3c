// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/context.h"
#include "model/graph.h"
#include "tensor/checkpoint.h"

#include <cstdint>

namespace quern {

// Bytes of anonymous memory, at most, that a forward pass holds at once.

// In block_forward over `rows` tokens, besides x and the weights.
[[nodiscard]] std::uint64_t block_forward_memory(
    const Context& ctx, const ModelConfig& config, const Block& block, std::int64_t rows);

// In Decoder::for_logits, besides the rows and the weights.
[[nodiscard]] std::uint64_t logits_memory(
    const Context& ctx, const ModelConfig& config, std::int64_t rows);

// The weights of a linear once loaded: nothing for what stays in the mapped file.
[[nodiscard]] std::uint64_t loaded_linear_memory(
    const Linear& linear, const Checkpoint& checkpoint);

}  // namespace quern
