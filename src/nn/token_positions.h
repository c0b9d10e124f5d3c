// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace quern {

// Where tokens stand when images are among them (interleaved M-RoPE of Qwen3-VL and later): the
// tokens of an image stand in its grid, so that a position has three axes. The caches are indexed
// by token all the same.
struct TokenPositions {
  std::vector<std::uint8_t> axes;  // [rotary / 2] what turns a component: 0 time, 1 row, 2 column
  std::vector<std::array<std::int32_t, 3>> tokens;  // of the prompt
  std::int64_t next = 0;  // on all axes, of the token after the prompt

  [[nodiscard]] std::int64_t at(std::int64_t token, std::size_t component) const noexcept {
    const auto prompt = static_cast<std::int64_t>(tokens.size());
    return token < prompt ? tokens[static_cast<std::size_t>(token)][axes[component]]
                          : next + token - prompt;
  }
};

}  // namespace quern
