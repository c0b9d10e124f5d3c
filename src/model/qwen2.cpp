// SPDX-License-Identifier: Apache-2.0
#include "model/families.h"

namespace quern {

// Qwen2 and Qwen2.5 dense: biases on q, k and v (large ones, on k above all), none on o.
ModelGraph build_qwen2(const JsonReader& config) {
  DecoderDefaults defaults;
  defaults.sliding_by_layer = true;
  DecoderOptions options;
  options.qkv_bias = true;
  return decoder_graph(read_decoder_config(config, defaults), options);
}

}  // namespace quern
