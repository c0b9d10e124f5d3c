// SPDX-License-Identifier: Apache-2.0
#include "quant/activation.h"

#include "base/error.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace quern {
namespace {

constexpr float kSmallestExtreme = 1e-5F;

float highest_code(const ActivationScheme& scheme) {
  return static_cast<float>((1 << (scheme.bits - 1)) - 1);
}

float largest_size(const float* x, std::int64_t count) {
  float extreme = kSmallestExtreme;
  for (std::int64_t j = 0; j < count; ++j) {
    extreme = std::max(extreme, std::fabs(x[j]));
  }
  return extreme;
}

}  // namespace

void round_activations(
    const Context& ctx,
    const ActivationScheme& scheme,
    float* X,
    std::int64_t rows,
    std::int64_t width) {
  constexpr std::int64_t kRows = 16;
  const float highest = highest_code(scheme);
  ctx.pool.for_chunks(rows, kRows, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t t = begin; t < end; ++t) {
      float* x = X + t * width;
      const float scale = scheme.dynamic ? largest_size(x, width) / highest : scheme.scale;
      for (std::int64_t j = 0; j < width; ++j) {
        const float code = std::clamp(std::nearbyint(x[j] / scale), -highest - 1.0F, highest);
        x[j] = code * scale;
      }
    }
  });
}

ActivationScheme with_static_scale(ActivationScheme scheme, std::span<const float> abs_max) {
  if (scheme.active() && !scheme.dynamic) {
    scheme.scale = largest_size(abs_max.data(), static_cast<std::int64_t>(abs_max.size())) /
                   highest_code(scheme);
  }
  return scheme;
}

Json activation_json(const ActivationScheme& scheme) {
  Json json = {{"bits", scheme.bits}, {"dynamic", scheme.dynamic}};
  if (!scheme.dynamic && scheme.scale > 0) {
    json["scale"] = scheme.scale;
  }
  return json;
}

ActivationScheme read_activation(const JsonReader& reader, bool needs_scale) {
  ActivationScheme scheme;
  scheme.bits = static_cast<int>(reader.get_int_in("bits", 2, 8));
  scheme.dynamic = reader.get_bool_or("dynamic", true);
  if (!scheme.dynamic && (needs_scale || reader.has("scale"))) {
    scheme.scale = static_cast<float>(reader.get_number("scale"));
    if (!(scheme.scale > 0) || !std::isfinite(scheme.scale)) {
      throw ParseError(
          "a scale of inputs is not positive",
          reader.place("scale"),
          fmt::format("expected a positive number, found {}", scheme.scale),
          needs_scale ? "make the checkpoint again" : "leave it out: calibration finds it");
    }
  }
  return scheme;
}

}  // namespace quern
