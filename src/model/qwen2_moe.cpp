// SPDX-License-Identifier: Apache-2.0
#include "model/families.h"

namespace quern {

// Qwen1.5-MoE and Qwen2-MoE: the attention of Qwen2, mixtures with a gated shared expert.
ModelGraph build_qwen2_moe(const JsonReader& config) {
  DecoderDefaults defaults;
  defaults.sliding_by_layer = true;
  defaults.mixture = true;
  defaults.shared_expert = true;
  DecoderOptions options;
  options.qkv_bias = config.get_bool_or("qkv_bias", true);
  return decoder_graph(read_decoder_config(config, defaults), options);
}

}  // namespace quern
