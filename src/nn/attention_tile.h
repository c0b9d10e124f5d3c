// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "nn/row_ops.h"

#include <algorithm>
#include <cstdint>

namespace quern {

// Queries that share one product with the keys; their scores are one tile of scratch.
inline constexpr std::int64_t kQueryRows = 256;

// Consecutive queries of one head and the keys that any of them sees.
struct AttentionTile {
  std::int64_t first = 0;  // position of the first query
  std::int64_t rows = 0;
  std::int64_t window = 0;  // 0: all
  std::int64_t begin = 0;  // position of the first key

  [[nodiscard]] std::int64_t seen() const noexcept { return first + rows - begin; }
};

inline AttentionTile attention_tile(
    std::int64_t first, std::int64_t rows, std::int64_t window) noexcept {
  return {first, rows, window, window == 0 ? 0 : std::max<std::int64_t>(0, first - window + 1)};
}

// The scores [rows, seen] of a tile to probabilities, in place: a query sees the keys of its
// window up to its own, the others get 0.
template <class T>
void causal_softmax(const Context& ctx, const AttentionTile& tile, T* scores) {
  const std::int64_t seen = tile.seen();
  for (std::int64_t r = 0; r < tile.rows; ++r) {
    T* row = scores + r * seen;
    const std::int64_t high = tile.first + r + 1 - tile.begin;
    const std::int64_t low = tile.window == 0 ? 0 : std::max<std::int64_t>(0, high - tile.window);
    std::fill(row, row + low, T{0});
    softmax_row(ctx, row + low, high - low);
    std::fill(row + high, row + seen, T{0});
  }
}

}  // namespace quern
