// SPDX-License-Identifier: Apache-2.0
#include "model/families.h"

namespace quern {

// Qwen3 dense: RMSNorm over each head of q and k, no biases; 0.6B to 4B tie the embeddings.
ModelGraph build_qwen3(const JsonReader& config) {
  DecoderDefaults defaults;
  defaults.sliding_by_layer = true;
  defaults.default_head_dim = 128;
  DecoderOptions options;
  options.qkv_bias = config.get_bool_or("attention_bias", false);
  options.output_bias = options.qkv_bias;
  options.qk_norm = true;
  return decoder_graph(read_decoder_config(config, defaults), options);
}

}  // namespace quern
