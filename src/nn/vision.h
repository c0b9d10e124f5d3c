// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "nn/image_patches.h"
#include "nn/weights.h"
#include "nn/workspace.h"

#include <filesystem>
#include <memory>
#include <span>
#include <vector>

namespace quern {

// Gain and bias.
struct LayerNormWeights {
  std::vector<float> gain;
  std::vector<float> bias;
};

struct VisionBlockWeights {
  LayerNormWeights attention_norm;
  LayerNormWeights mlp_norm;
  LinearWeights qkv;
  LinearWeights proj;
  LinearWeights fc1;
  LinearWeights fc2;
};

// The vision tower of a loaded model: pictures to rows in the place of embeddings. In float.
class VisionTower {
 public:
  // Throws UnsupportedError when the model has none; `model` must outlive it.
  VisionTower(const Context& ctx, const Model& model);

  [[nodiscard]] const VisionConfig& config() const noexcept { return graph_.config; }

  // Reads, decodes and scales a picture.
  [[nodiscard]] PreparedImage prepare(const std::filesystem::path& file) const;
  [[nodiscard]] std::vector<float> patches(const PreparedImage& image) const {
    return image_patches(ctx_, graph_.config, image);
  }
  // Features [tokens, hidden of the decoder] of the picture whose patches these are. Attention goes
  // over all patches of the picture, in both directions.
  [[nodiscard]] std::vector<float> features(
      const PreparedImage& image, std::span<const float> patches);

  // make_image_prompt() for these pictures.
  [[nodiscard]] ImagePrompt plan(
      std::span<const std::int32_t> ids,
      std::span<const PreparedImage> images,
      const std::string& where) const;

 private:
  struct Rotations;
  void embed(const PreparedImage& image, std::span<const float> patches, std::vector<float>& x);
  void attention(
      const VisionBlockWeights& weights,
      const Rotations& rotations,
      std::int64_t rows,
      std::vector<float>& x);
  void mlp(const VisionBlockWeights& weights, std::int64_t rows, std::vector<float>& x);
  std::vector<float> merged(std::int64_t rows, std::vector<float>& x);

  const Context& ctx_;
  VisionGraph graph_;
  Workspace workspace_;
  LinearWeights patches_;
  std::vector<float> positions_;  // [position_side^2, hidden]
  std::vector<VisionBlockWeights> blocks_;
  LayerNormWeights merger_norm_;
  LinearWeights merger_fc1_;
  LinearWeights merger_fc2_;
};

}  // namespace quern
