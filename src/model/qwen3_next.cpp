// SPDX-License-Identifier: Apache-2.0
#include "model/families.h"

namespace quern {

// Qwen3-Next: three DeltaNet layers to one of gated attention, mixtures with a gated shared expert,
// DeltaNet projections fused by key head.
ModelGraph build_qwen3_next(const JsonReader& config) {
  DecoderDefaults defaults;
  defaults.default_head_dim = 256;
  defaults.hybrid = true;
  defaults.fused_delta_net = true;
  defaults.mixture = true;
  defaults.shared_expert = true;
  return hybrid_graph(config, defaults);
}

}  // namespace quern
