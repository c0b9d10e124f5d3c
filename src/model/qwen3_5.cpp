// SPDX-License-Identifier: Apache-2.0
#include "model/families.h"

namespace quern {

namespace {

DecoderDefaults qwen3_5_defaults() {
  DecoderDefaults defaults;
  defaults.default_head_dim = 256;
  defaults.hybrid = true;
  return defaults;
}

}  // namespace

// Qwen3.5, 3.6 and 3.8 dense: three DeltaNet layers to one of gated attention.
ModelGraph build_qwen3_5(const JsonReader& config) {
  return hybrid_graph(config, qwen3_5_defaults());
}

// The same with mixtures, whose router always normalises.
ModelGraph build_qwen3_5_moe(const JsonReader& config) {
  DecoderDefaults defaults = qwen3_5_defaults();
  defaults.mixture = true;
  defaults.shared_expert = true;
  defaults.normalize_experts = true;
  return hybrid_graph(config, defaults);
}

}  // namespace quern
