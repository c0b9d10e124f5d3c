// SPDX-License-Identifier: Apache-2.0
#include "nn/image_patches.h"

#include "base/error.h"
#include "image/resize.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

namespace quern {
namespace {

constexpr std::int64_t kChannels = 3;

// What a byte of each channel becomes. Scale and normalisation are one step, in float, as in
// transformers' processor.
using PixelValues = std::array<std::array<float, 256>, kChannels>;

PixelValues pixel_values(const ImageProcessing& processing) {
  PixelValues values{};
  const auto scale = static_cast<float>(1.0 / processing.rescale_factor);
  for (std::size_t c = 0; c < kChannels; ++c) {
    const float mean = processing.mean[c] * scale;
    const float deviation = processing.deviation[c] * scale;
    for (std::size_t byte = 0; byte < values[c].size(); ++byte) {
      values[c][byte] = (static_cast<float>(byte) - mean) / deviation;
    }
  }
  return values;
}

}  // namespace

std::pair<std::int64_t, std::int64_t> smart_resize(
    std::int64_t height,
    std::int64_t width,
    std::int64_t factor,
    std::int64_t min_pixels,
    std::int64_t max_pixels,
    const std::string& where) {
  constexpr std::int64_t kMaxRatio = 200;
  if (std::max(height, width) > kMaxRatio * std::min(height, width)) {
    throw UnsupportedError(
        "the image is too long and narrow",
        where,
        fmt::format("expected sides of a ratio up to {}, found {} x {}", kMaxRatio, width, height),
        "cut it into pieces");
  }
  const auto h = static_cast<double>(height);
  const auto w = static_cast<double>(width);
  const auto f = static_cast<double>(factor);
  const auto steps = [&](double count) { return static_cast<std::int64_t>(count) * factor; };
  // nearbyint: halves to even, as Python's round.
  const std::int64_t rows = steps(std::nearbyint(h / f));
  const std::int64_t columns = steps(std::nearbyint(w / f));
  if (rows * columns > max_pixels) {
    const double beta = std::sqrt(h * w / static_cast<double>(max_pixels));
    return {
        std::max(factor, steps(std::floor(h / beta / f))),
        std::max(factor, steps(std::floor(w / beta / f)))};
  }
  if (rows * columns < min_pixels) {
    const double beta = std::sqrt(static_cast<double>(min_pixels) / (h * w));
    return {steps(std::ceil(h * beta / f)), steps(std::ceil(w * beta / f))};
  }
  return {rows, columns};
}

PreparedImage prepare_image(
    const Context& ctx, const VisionConfig& config, const Image& image, const std::string& where) {
  const std::int64_t factor = config.patch_size * config.merge_size;
  const auto [height, width] = smart_resize(
      image.height,
      image.width,
      factor,
      config.processing.min_pixels,
      config.processing.max_pixels,
      where);
  if (width > kMaxImagePixels / height) {
    throw UnsupportedError(
        "the model asks for more pixels than quern scales an image to",
        where,
        fmt::format("expected up to {}, found {} x {}", kMaxImagePixels, width, height),
        "check patch_size and size in the model's configuration");
  }
  PreparedImage prepared;
  prepared.scaled = resize_bicubic(ctx.pool, image, width, height);
  prepared.rows = height / config.patch_size;
  prepared.columns = width / config.patch_size;
  return prepared;
}

std::vector<float> image_patches(
    const Context& ctx, const VisionConfig& config, const PreparedImage& image) {
  const std::int64_t side = config.patch_size;
  const std::int64_t merge = config.merge_size;
  const std::int64_t per_token = config.merged_patches();
  const std::int64_t tokens_across = image.columns / merge;
  const PixelValues values = pixel_values(config.processing);
  std::vector<float> patches(static_cast<std::size_t>(image.patches() * config.patch_values()));
  ctx.pool.for_chunks(image.patches(), 16, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t p = begin; p < end; ++p) {
      const std::int64_t token = p / per_token;
      const std::int64_t cell = p % per_token;
      const std::int64_t top = (token / tokens_across * merge + cell / merge) * side;
      const std::int64_t left = (token % tokens_across * merge + cell % merge) * side;
      float* out = patches.data() + p * config.patch_values();
      for (std::int64_t c = 0; c < kChannels; ++c) {
        const std::array<float, 256>& table = values[static_cast<std::size_t>(c)];
        for (std::int64_t frame = 0; frame < config.frames; ++frame) {
          for (std::int64_t y = 0; y < side; ++y) {
            const std::uint8_t* row =
                image.scaled.rgb.data() + ((top + y) * image.scaled.width + left) * kChannels + c;
            for (std::int64_t x = 0; x < side; ++x) {
              *out++ = table[row[kChannels * x]];
            }
          }
        }
      }
    }
  });
  return patches;
}

}  // namespace quern
