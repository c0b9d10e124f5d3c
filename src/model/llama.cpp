// SPDX-License-Identifier: Apache-2.0
#include "model/families.h"

namespace quern {

// Llama 2 and 3, for comparison. Llama 2 configs may lack rope_theta; 10000 is right there.
ModelGraph build_llama(const JsonReader& config) {
  refuse_unless(config, "pretraining_tp", 1);
  DecoderDefaults defaults;
  defaults.theta_required = false;
  DecoderOptions options;
  options.qkv_bias = config.get_bool_or("attention_bias", false);
  options.output_bias = options.qkv_bias;
  options.mlp_bias = config.get_bool_or("mlp_bias", false);
  return decoder_graph(read_decoder_config(config, defaults), options);
}

}  // namespace quern
