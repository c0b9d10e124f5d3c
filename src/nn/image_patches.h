// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/context.h"
#include "image/image.h"
#include "model/vision.h"
#include "nn/image_prompt.h"

#include <string>
#include <utility>
#include <vector>

namespace quern {

// A picture scaled to whole patches, still in bytes.
struct PreparedImage {
  Image scaled;
  std::int64_t rows = 0;  // of patches
  std::int64_t columns = 0;

  [[nodiscard]] std::int64_t patches() const noexcept { return rows * columns; }
  [[nodiscard]] ImageGrid grid(const VisionConfig& config) const noexcept {
    return {rows / config.merge_size, columns / config.merge_size};
  }
};

// {height, width} to which a picture is scaled: multiples of `factor` with an area within the
// bounds, the sides' ratio kept as well as they allow. Throws UnsupportedError, naming `where`,
// when one side is more than 200 times the other.
[[nodiscard]] std::pair<std::int64_t, std::int64_t> smart_resize(
    std::int64_t height,
    std::int64_t width,
    std::int64_t factor,
    std::int64_t min_pixels,
    std::int64_t max_pixels,
    const std::string& where);

[[nodiscard]] PreparedImage prepare_image(
    const Context& ctx, const VisionConfig& config, const Image& image, const std::string& where);

// The tower's input [patches, patch_values]: values of a patch by channel, frame, row and column;
// the patches of a merged token follow each other.
[[nodiscard]] std::vector<float> image_patches(
    const Context& ctx, const VisionConfig& config, const PreparedImage& image);

}  // namespace quern
