// SPDX-License-Identifier: Apache-2.0
#include "nn/image_prompt.h"

#include "base/error.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

namespace quern {
namespace {

// Appends the positions of text and image tokens, as `next` goes on.
class PositionWriter {
 public:
  explicit PositionWriter(TokenPositions& positions) : positions_(positions) {}

  void text() {
    put(0, 0);
    ++positions_.next;
  }
  void image(const ImageGrid& grid) {
    for (std::int64_t row = 0; row < grid.rows; ++row) {
      for (std::int64_t column = 0; column < grid.columns; ++column) {
        put(row, column);
      }
    }
    positions_.next += std::max(grid.rows, grid.columns);
  }

 private:
  void put(std::int64_t row, std::int64_t column) {
    const std::int64_t next = positions_.next;
    positions_.tokens.push_back(
        {static_cast<std::int32_t>(next),
         static_cast<std::int32_t>(next + row),
         static_cast<std::int32_t>(next + column)});
  }

  TokenPositions& positions_;
};

}  // namespace

void ImagePrompt::place_features(
    std::int64_t first, std::vector<float>& x, std::int64_t hidden) const {
  const auto rows = static_cast<std::int64_t>(x.size()) / hidden;
  const auto known = static_cast<std::int64_t>(feature_rows.size());
  for (std::int64_t t = 0; t < rows && first + t < known; ++t) {
    const std::int64_t row = feature_rows[static_cast<std::size_t>(first + t)];
    if (row >= 0) {
      std::copy_n(features.data() + row * hidden, hidden, x.data() + t * hidden);
    }
  }
}

ImagePrompt make_image_prompt(
    std::span<const std::int32_t> ids,
    std::span<const ImageGrid> grids,
    std::int32_t image_token,
    const std::vector<std::uint8_t>& axes,
    const std::string& where) {
  const std::int64_t found = std::count(ids.begin(), ids.end(), image_token);
  std::int64_t needed = 0;
  for (const ImageGrid& grid : grids) {
    needed += grid.tokens();
  }
  const bool is_expanded = found == needed;
  if (!is_expanded && found != static_cast<std::int64_t>(grids.size())) {
    throw UsageError(
        "image tokens and images do not fit together",
        where,
        fmt::format(
            "expected {} tokens {} (one an image) or {} (one a feature), found {}",
            grids.size(),
            image_token,
            needed,
            found),
        "write one image token for each image");
  }
  ImagePrompt prompt;
  prompt.positions.axes = axes;
  PositionWriter writer(prompt.positions);
  std::size_t image = 0;
  std::int64_t features = 0;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] != image_token) {
      prompt.ids.push_back(ids[i]);
      prompt.feature_rows.push_back(-1);
      writer.text();
      continue;
    }
    const ImageGrid& grid = grids[image++];
    writer.image(grid);
    for (std::int64_t k = 0; k < grid.tokens(); ++k) {
      if (is_expanded && ids[i + static_cast<std::size_t>(k)] != image_token) {
        throw UsageError(
            "the tokens of an image are not side by side",
            where,
            fmt::format("expected {} of them from position {}, found {}", grid.tokens(), i, k),
            "write one image token for each image");
      }
      prompt.ids.push_back(image_token);
      prompt.feature_rows.push_back(features++);
    }
    i += is_expanded ? static_cast<std::size_t>(grid.tokens() - 1) : 0;
  }
  return prompt;
}

}  // namespace quern
