// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "model/graph.h"

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace quern {

// How a picture becomes patches: preprocessor_config.json.
struct ImageProcessing {
  std::int64_t min_pixels = 0;  // after scaling
  std::int64_t max_pixels = 0;
  double rescale_factor = 0;  // pixel values times this, minus mean, over deviation
  std::array<float, 3> mean{};
  std::array<float, 3> deviation{};
};

// The checked values of `vision_config`, and the tokens that stand for images.
struct VisionConfig {
  std::int64_t depth = 0;
  std::int64_t hidden_size = 0;
  std::int64_t intermediate_size = 0;
  std::int64_t heads = 0;
  std::int64_t patch_size = 0;  // pixels of a side
  std::int64_t frames = 0;  // of a patch; a still picture is repeated
  std::int64_t merge_size = 0;  // patches of a side of the square that becomes one token
  std::int64_t position_side = 0;  // of the square table of learned positions
  std::int64_t out_size = 0;  // the decoder's hidden size
  double rope_theta = 0;
  std::int32_t image_token = 0;
  std::int32_t start_token = 0;  // before and after the tokens of an image
  std::int32_t end_token = 0;
  ImageProcessing processing;

  [[nodiscard]] std::int64_t head_dim() const noexcept { return hidden_size / heads; }
  [[nodiscard]] std::int64_t patch_values() const noexcept {
    return 3 * frames * patch_size * patch_size;
  }
  [[nodiscard]] std::int64_t merged_patches() const noexcept { return merge_size * merge_size; }
};

// Its gain is `module`.weight, its bias `module`.bias; epsilon is 1e-6.
struct LayerNorm {
  std::string module;
  std::int64_t size = 0;
};

// x += proj(attention(norm(x))); x += fc2(gelu(fc1(norm(x)))).
struct VisionBlock {
  LayerNorm attention_norm;
  LayerNorm mlp_norm;
  Linear qkv;  // rows: all queries, all keys, all values
  Linear proj;
  Linear fc1;
  Linear fc2;
};

// The vision tower of Qwen3.5 and later as data, beside the decoder's graph.
struct VisionGraph {
  VisionConfig config;
  Linear patches;  // stored as a convolution [hidden, 3, frames, patch, patch]
  std::string positions;  // [position_side^2, hidden]
  std::vector<VisionBlock> blocks;
  LayerNorm merger_norm;
  Linear merger_fc1;  // of merged_patches() patches side by side
  Linear merger_fc2;
  std::vector<std::uint8_t> rope_axes;  // TokenPositions::axes of the decoder
};

// Reads config.json and preprocessor_config.json (or the image processor of
// processor_config.json) and checks that the tensors are there. Throws UnsupportedError when the
// checkpoint has no vision tower, or one that computes otherwise (Qwen3-VL's deepstack).
[[nodiscard]] VisionGraph build_vision_graph(
    const Checkpoint& checkpoint, const ModelConfig& decoder);

}  // namespace quern
