// SPDX-License-Identifier: Apache-2.0
#include "model/families.h"

namespace quern {

// Qwen2 and Qwen2.5 dense: biases on q, k and v (large ones, on k above all), none on o.
ModelGraph build_qwen2(const JsonReader& config) {
  DenseDefaults defaults;
  defaults.sliding_by_layer = true;
  DenseOptions options;
  options.qkv_bias = true;
  return dense_graph(read_dense_config(config, defaults), options);
}

}  // namespace quern
