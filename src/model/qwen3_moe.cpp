// SPDX-License-Identifier: Apache-2.0
#include "model/families.h"

namespace quern {

// Qwen3-MoE: the attention of Qwen3, mixtures without a shared expert.
ModelGraph build_qwen3_moe(const JsonReader& config) {
  DecoderDefaults defaults;
  defaults.sliding_by_layer = true;
  defaults.mixture = true;
  DecoderOptions options;
  options.qkv_bias = config.get_bool_or("attention_bias", false);
  options.output_bias = options.qkv_bias;
  options.qk_norm = true;
  return decoder_graph(read_decoder_config(config, defaults), options);
}

}  // namespace quern
