// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "nn/token_positions.h"

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace quern {

// The tokens of an image, row by row.
struct ImageGrid {
  std::int64_t rows = 0;
  std::int64_t columns = 0;

  [[nodiscard]] std::int64_t tokens() const noexcept { return rows * columns; }
};

// The beginning of a sequence that has images in it. Their tokens have no embeddings: the vision
// tower's features stand in their place.
struct ImagePrompt {
  std::vector<std::int32_t> ids;  // every image has as many image tokens as its grid
  std::vector<std::int64_t> feature_rows;  // [ids] row of `features`; -1: the embedding stays
  std::vector<float> features;  // [image tokens, hidden], one image after another
  TokenPositions positions;

  // Replaces the rows of image tokens in x [rows, hidden], the embeddings of the tokens from
  // `first` on.
  void place_features(std::int64_t first, std::vector<float>& x, std::int64_t hidden) const;
};

// Ids and positions of a prompt whose images have these grids, in order; `features` stay empty. In
// `ids` each image is one image token, or already as many as it has. `axes` is
// VisionGraph::rope_axes. Throws UsageError, naming `where`, for another number of image tokens.
[[nodiscard]] ImagePrompt make_image_prompt(
    std::span<const std::int32_t> ids,
    std::span<const ImageGrid> grids,
    std::int32_t image_token,
    const std::vector<std::uint8_t>& axes,
    const std::string& where);

}  // namespace quern
