// SPDX-License-Identifier: Apache-2.0
#include "model/families.h"

namespace quern {

// Mistral, for comparison: as Llama without biases, with an optional sliding window on all layers.
ModelGraph build_mistral(const JsonReader& config) {
  DecoderDefaults defaults;
  defaults.theta_required = false;
  defaults.sliding_by_key = true;
  return decoder_graph(read_decoder_config(config, defaults), DecoderOptions{});
}

}  // namespace quern
