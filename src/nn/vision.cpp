// SPDX-License-Identifier: Apache-2.0
#include "nn/vision.h"

#include "kernels/kernels.h"
#include "nn/attention.h"
#include "nn/linear.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <utility>

namespace quern {
namespace {

constexpr std::int64_t kRowChunk = 32;
// Rows whose widest intermediate values are held at once.
constexpr std::int64_t kRowsAtOnce = 2048;

LayerNormWeights load_layer_norm(const LayerNorm& norm, const Checkpoint& checkpoint) {
  const TensorStore& store = checkpoint.tensors();
  return {
      to_float(store.require_float(norm.module + ".weight", {norm.size})),
      to_float(store.require_float(norm.module + ".bias", {norm.size}))};
}

// A convolution whose step is its kernel is a product with the flattened patch.
LinearWeights load_patches(const VisionGraph& graph, const Checkpoint& checkpoint) {
  const TensorStore& store = checkpoint.tensors();
  const VisionConfig& config = graph.config;
  const Linear& linear = graph.patches;
  LinearWeights weights;
  weights.out_features = linear.out_features;
  weights.in_features = linear.in_features;
  weights.dense = store.require_float(
      linear.weight(),
      {linear.out_features, 3, config.frames, config.patch_size, config.patch_size});
  weights.dense.shape = {linear.out_features, linear.in_features};
  align_dense(weights);
  weights.bias = to_float(store.require_float(linear.module + ".bias", {linear.out_features}));
  return weights;
}

VisionBlockWeights load_vision_block(const VisionBlock& block, const Checkpoint& checkpoint) {
  return {
      load_layer_norm(block.attention_norm, checkpoint),
      load_layer_norm(block.mlp_norm, checkpoint),
      load_linear_weights(block.qkv, checkpoint),
      load_linear_weights(block.proj, checkpoint),
      load_linear_weights(block.fc1, checkpoint),
      load_linear_weights(block.fc2, checkpoint)};
}

// out = gain (x - mean) / sqrt(variance + 1e-6) + bias for each row; out may be x.
void layer_norm(
    const Context& ctx,
    const LayerNormWeights& weights,
    const float* x,
    std::int64_t rows,
    float* out) {
  constexpr double kEpsilon = 1e-6;
  const auto n = static_cast<std::int64_t>(weights.gain.size());
  ctx.pool.for_chunks(rows, kRowChunk, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t t = begin; t < end; ++t) {
      const float* row = x + t * n;
      double sum = 0;
      for (std::int64_t i = 0; i < n; ++i) {
        sum += static_cast<double>(row[i]);
      }
      const double mean = sum / static_cast<double>(n);
      double squares = 0;
      for (std::int64_t i = 0; i < n; ++i) {
        const double difference = static_cast<double>(row[i]) - mean;
        squares += difference * difference;
      }
      const double scale = 1 / std::sqrt(squares / static_cast<double>(n) + kEpsilon);
      for (std::int64_t i = 0; i < n; ++i) {
        const auto normed = static_cast<float>((static_cast<double>(row[i]) - mean) * scale);
        const auto column = static_cast<std::size_t>(i);
        out[t * n + i] = normed * weights.gain[column] + weights.bias[column];
      }
    }
  });
}

// GELU by tanh, in place: x / 2 (1 + tanh(u)) = x / (1 + e^(-2 u)).
void gelu_tanh(const Context& ctx, std::vector<float>& x) {
  constexpr std::int64_t kChunk = 4096;
  const float slope = std::sqrt(2 / std::numbers::pi_v<float>);
  const auto count = static_cast<std::int64_t>(x.size());
  ctx.pool.for_chunks(count, kChunk, [&](std::int64_t begin, std::int64_t end, int) {
    float exponents[kChunk] = {};
    float* values = x.data() + begin;
    const std::int64_t n = end - begin;
    for (std::int64_t i = 0; i < n; ++i) {
      const float value = values[i];
      exponents[i] = -2 * slope * (value + 0.044715F * value * value * value);
    }
    ctx.kernels.exp_f32(exponents, exponents, n);
    for (std::int64_t i = 0; i < n; ++i) {
      values[i] /= 1 + exponents[i];
    }
  });
}

// GELU as it is defined, in place.
void gelu_exact(const Context& ctx, std::vector<float>& x) {
  const auto count = static_cast<std::int64_t>(x.size());
  ctx.pool.for_chunks(count, 4096, [&](std::int64_t begin, std::int64_t end, int) {
    for (float* value = x.data() + begin; value != x.data() + end; ++value) {
      *value *= 0.5F * (1 + std::erf(*value / std::numbers::sqrt2_v<float>));
    }
  });
}

// Calls function(first, rows) for ranges of kRowsAtOnce.
template <class Function>
void for_row_ranges(std::int64_t rows, const Function& function) {
  for (std::int64_t first = 0; first < rows; first += kRowsAtOnce) {
    function(first, std::min(kRowsAtOnce, rows - first));
  }
}

// Where a patch stands in the picture, from its place in the order of merged tokens.
std::pair<std::int64_t, std::int64_t> patch_place(
    const VisionConfig& config, const PreparedImage& image, std::int64_t patch) {
  const std::int64_t merge = config.merge_size;
  const std::int64_t token = patch / config.merged_patches();
  const std::int64_t cell = patch % config.merged_patches();
  const std::int64_t tokens_across = image.columns / merge;
  return {
      token / tokens_across * merge + cell / merge, token % tokens_across * merge + cell % merge};
}

// A coordinate of `size` patches in the table of positions, whose corners are the picture's.
struct TablePlace {
  std::int64_t low = 0;
  std::int64_t high = 0;
  float part = 0;  // of the way from low to high
};
TablePlace table_place(std::int64_t at, std::int64_t size, std::int64_t side) {
  const float place =
      static_cast<float>(at * (side - 1)) / static_cast<float>(std::max<std::int64_t>(1, size - 1));
  const auto low = static_cast<std::int64_t>(place);
  return {low, std::min(low + 1, side - 1), place - static_cast<float>(low)};
}

}  // namespace

// cos and sin of the angles of every patch: [patches, head_dim / 2], rows of the picture first,
// then columns.
struct VisionTower::Rotations {
  std::vector<float> cosines;
  std::vector<float> sines;

  Rotations(const VisionConfig& config, const PreparedImage& image) {
    const std::int64_t quarter = config.head_dim() / 4;
    std::vector<float> frequencies;
    for (std::int64_t m = 0; m < quarter; ++m) {
      const double exponent = static_cast<double>(m) / static_cast<double>(quarter);
      frequencies.push_back(static_cast<float>(std::pow(config.rope_theta, -exponent)));
    }
    for (std::int64_t p = 0; p < image.patches(); ++p) {
      const auto [row, column] = patch_place(config, image, p);
      for (const std::int64_t place : {row, column}) {
        for (const float frequency : frequencies) {
          const auto angle = static_cast<double>(static_cast<float>(place) * frequency);
          cosines.push_back(static_cast<float>(std::cos(angle)));
          sines.push_back(static_cast<float>(std::sin(angle)));
        }
      }
    }
  }
};

VisionTower::VisionTower(const Context& ctx, const Model& model)
    : ctx_(ctx),
      graph_(build_vision_graph(*model.checkpoint, model.graph.config)),
      workspace_(ctx) {
  const Checkpoint& checkpoint = *model.checkpoint;
  const VisionConfig& config = graph_.config;
  patches_ = load_patches(graph_, checkpoint);
  positions_ = to_float(checkpoint.tensors().require_float(
      graph_.positions, {config.position_side * config.position_side, config.hidden_size}));
  for (const VisionBlock& block : graph_.blocks) {
    blocks_.push_back(load_vision_block(block, checkpoint));
  }
  merger_norm_ = load_layer_norm(graph_.merger_norm, checkpoint);
  merger_fc1_ = load_linear_weights(graph_.merger_fc1, checkpoint);
  merger_fc2_ = load_linear_weights(graph_.merger_fc2, checkpoint);
}

PreparedImage VisionTower::prepare(const std::filesystem::path& file) const {
  return prepare_image(ctx_, graph_.config, read_image(file), file.string());
}

ImagePrompt VisionTower::plan(
    std::span<const std::int32_t> ids,
    std::span<const PreparedImage> images,
    const std::string& where) const {
  std::vector<ImageGrid> grids;
  for (const PreparedImage& image : images) {
    grids.push_back(image.grid(graph_.config));
  }
  return make_image_prompt(ids, grids, graph_.config.image_token, graph_.rope_axes, where);
}

void VisionTower::embed(
    const PreparedImage& image, std::span<const float> patches, std::vector<float>& x) {
  const VisionConfig& config = graph_.config;
  const std::int64_t width = config.hidden_size;
  const std::int64_t side = config.position_side;
  linear_forward(ctx_, workspace_, patches_, patches.data(), image.patches(), x.data());
  ctx_.pool.for_chunks(image.patches(), kRowChunk, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t p = begin; p < end; ++p) {
      const auto [row, column] = patch_place(config, image, p);
      const TablePlace y = table_place(row, image.rows, side);
      const TablePlace z = table_place(column, image.columns, side);
      const auto add = [&](std::int64_t r, std::int64_t c, float weight) {
        const float* from = positions_.data() + (r * side + c) * width;
        ctx_.kernels.axpy_f32(weight, from, x.data() + p * width, width);
      };
      add(y.low, z.low, (1 - y.part) * (1 - z.part));
      add(y.low, z.high, (1 - y.part) * z.part);
      add(y.high, z.low, y.part * (1 - z.part));
      add(y.high, z.high, y.part * z.part);
    }
  });
}

void VisionTower::attention(
    const VisionBlockWeights& weights,
    const Rotations& rotations,
    std::int64_t rows,
    std::vector<float>& x) {
  const VisionConfig& config = graph_.config;
  const std::int64_t width = config.hidden_size;
  const std::int64_t dim = config.head_dim();
  const std::int64_t half = dim / 2;
  const auto size = static_cast<std::size_t>(rows * width);
  std::vector<float> queries(size);
  std::vector<float> keys(size);
  std::vector<float> values(size);
  std::vector<float> normed;
  std::vector<float> together;
  for_row_ranges(rows, [&](std::int64_t first, std::int64_t count) {
    normed.resize(static_cast<std::size_t>(count * width));
    together.resize(3 * normed.size());
    layer_norm(ctx_, weights.attention_norm, x.data() + first * width, count, normed.data());
    linear_forward(ctx_, workspace_, weights.qkv, normed.data(), count, together.data());
    ctx_.pool.for_chunks(count, kRowChunk, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t t = begin; t < end; ++t) {
        const std::int64_t target = (first + t) * width;
        const float* from = together.data() + 3 * t * width;
        std::copy_n(from, width, queries.data() + target);
        std::copy_n(from + width, width, keys.data() + target);
        std::copy_n(from + 2 * width, width, values.data() + target);
        const float* cosines = rotations.cosines.data() + (first + t) * half;
        const float* sines = rotations.sines.data() + (first + t) * half;
        for (std::int64_t head = 0; head < width; head += dim) {
          ctx_.kernels.rope_half(queries.data() + target + head, cosines, sines, half);
          ctx_.kernels.rope_half(keys.data() + target + head, cosines, sines, half);
        }
      }
    });
  });
  const AttentionShape shape{config.heads, config.heads, dim, 0, false};
  std::vector<float> out(size);
  attend(ctx_, workspace_, shape, queries.data(), 0, rows, keys.data(), values.data(), out.data());
  linear_forward(ctx_, workspace_, weights.proj, out.data(), rows, queries.data());
  ctx_.kernels.add_f32(queries.data(), x.data(), rows * width);
}

void VisionTower::mlp(const VisionBlockWeights& weights, std::int64_t rows, std::vector<float>& x) {
  const std::int64_t width = graph_.config.hidden_size;
  std::vector<float> normed;
  std::vector<float> hidden;
  for_row_ranges(rows, [&](std::int64_t first, std::int64_t count) {
    float* part = x.data() + first * width;
    normed.resize(static_cast<std::size_t>(count * width));
    hidden.resize(static_cast<std::size_t>(count * graph_.config.intermediate_size));
    layer_norm(ctx_, weights.mlp_norm, part, count, normed.data());
    linear_forward(ctx_, workspace_, weights.fc1, normed.data(), count, hidden.data());
    gelu_tanh(ctx_, hidden);
    linear_forward(ctx_, workspace_, weights.fc2, hidden.data(), count, normed.data());
    ctx_.kernels.add_f32(normed.data(), part, count * width);
  });
}

std::vector<float> VisionTower::merged(std::int64_t rows, std::vector<float>& x) {
  const VisionConfig& config = graph_.config;
  const std::int64_t tokens = rows / config.merged_patches();
  const std::int64_t width = config.hidden_size * config.merged_patches();
  layer_norm(ctx_, merger_norm_, x.data(), rows, x.data());
  std::vector<float> out(static_cast<std::size_t>(tokens * config.out_size));
  std::vector<float> hidden;
  for_row_ranges(tokens, [&](std::int64_t first, std::int64_t count) {
    hidden.resize(static_cast<std::size_t>(count * width));
    linear_forward(ctx_, workspace_, merger_fc1_, x.data() + first * width, count, hidden.data());
    gelu_exact(ctx_, hidden);
    linear_forward(
        ctx_, workspace_, merger_fc2_, hidden.data(), count, out.data() + first * config.out_size);
  });
  return out;
}

std::vector<float> VisionTower::features(
    const PreparedImage& image, std::span<const float> patches) {
  const std::int64_t rows = image.patches();
  std::vector<float> x(static_cast<std::size_t>(rows * graph_.config.hidden_size));
  embed(image, patches, x);
  const Rotations rotations(graph_.config, image);
  for (const VisionBlockWeights& block : blocks_) {
    attention(block, rotations, rows, x);
    mlp(block, rows, x);
  }
  return merged(rows, x);
}

}  // namespace quern
