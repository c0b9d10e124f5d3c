// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/context.h"
#include "base/json.h"
#include "tensor/checkpoint.h"

#include <filesystem>
#include <string>

namespace quern {

// Looks at every tensor of a checkpoint: sizes and types against the configuration, each quantized
// linear unpacked, file hashes against quantization_manifest.json when there is one. With `source`
// also the census: every source tensor must be there unchanged, or quantized; each quantized linear
// is compared with the original weights. Returns the document of `quern verify`, whose
// `problems` is empty when all is well. Throws for a checkpoint that cannot be read at all.
[[nodiscard]] Json verify_checkpoint(
    const Context& ctx, const Checkpoint& checkpoint, const Checkpoint* source);

}  // namespace quern
