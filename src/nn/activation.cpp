// SPDX-License-Identifier: Apache-2.0
#include "nn/activation.h"

#include <algorithm>
#include <cmath>

namespace quern {

void round_activations(
    const Context& ctx,
    const ActivationScheme& scheme,
    float* X,
    std::int64_t rows,
    std::int64_t width) {
  constexpr float kSmallestExtreme = 1e-5F;
  constexpr std::int64_t kRows = 16;
  const auto highest = static_cast<float>((1 << (scheme.bits - 1)) - 1);
  ctx.pool.for_chunks(rows, kRows, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t t = begin; t < end; ++t) {
      float* x = X + t * width;
      float scale = scheme.scale;
      if (scheme.dynamic) {
        float extreme = kSmallestExtreme;
        for (std::int64_t j = 0; j < width; ++j) {
          extreme = std::max(extreme, std::fabs(x[j]));
        }
        scale = extreme / highest;
      }
      for (std::int64_t j = 0; j < width; ++j) {
        const float code = std::clamp(std::nearbyint(x[j] / scale), -highest - 1.0F, highest);
        x[j] = code * scale;
      }
    }
  });
}

}  // namespace quern
