// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/context.h"
#include "base/json.h"
#include "format/engine_rules.h"
#include "model/graph.h"
#include "tensor/checkpoint.h"

#include <filesystem>
#include <string>

namespace quern {

// What engines need to know of a checkpoint (format/engine_rules.h).
[[nodiscard]] EngineModel engine_model(const Checkpoint& checkpoint, const ModelGraph& graph);

// Looks at every tensor of a checkpoint: sizes and types against the configuration, each quantized
// linear unpacked, file hashes against quantization_manifest.json when there is one. With `source`
// also the census: every source tensor must be there unchanged, or quantized; each quantized linear
// is compared with the original weights. `engines` says for each engine whether it would load the
// checkpoint; for the one that is named (empty: none) what stands against it is a problem. Returns
// the document of `quern verify`, whose `problems` is empty when all is well. Throws for a
// checkpoint that cannot be read at all, and UsageError for an unknown engine.
[[nodiscard]] Json verify_checkpoint(
    const Context& ctx,
    const Checkpoint& checkpoint,
    const Checkpoint* source,
    const std::string& engine = {});

}  // namespace quern
