// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "model/graph.h"

#include <optional>

namespace quern {

// The draft layer among the checkpoint's tensors mtp.*; nothing when it has none, or one that quern
// does not run. Its experts may be fused or separate, whatever those of the other layers are.
[[nodiscard]] std::optional<MtpLayer> find_mtp(
    const ModelConfig& config, const Checkpoint& checkpoint);

// The draft layer, its tensors checked. Throws UnsupportedError, with what is there instead, where
// find_mtp() gives nothing, and ParseError naming a tensor that is missing or has another shape.
[[nodiscard]] const MtpLayer& require_mtp(const ModelGraph& graph, const Checkpoint& checkpoint);

}  // namespace quern
