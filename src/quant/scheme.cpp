// SPDX-License-Identifier: Apache-2.0
#include "quant/scheme.h"

#include <bit>

namespace quern {

QuantScheme ggml_scheme(GgmlType type) {
  const GgmlLayout& layout = *ggml_layout(type);
  QuantScheme scheme;
  scheme.bits = std::bit_width(static_cast<unsigned>(layout.codes() - 1));
  scheme.symmetric = !layout.has_minimum();
  scheme.group_size = layout.group;
  scheme.ggml = type;
  return scheme;
}

}  // namespace quern
