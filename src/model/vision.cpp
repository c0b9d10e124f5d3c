// SPDX-License-Identifier: Apache-2.0
#include "model/vision.h"

#include "base/error.h"
#include "tensor/checkpoint.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <utility>

namespace quern {
namespace {

constexpr const char* kPrefix = "model.visual.";
constexpr std::int64_t kMaxWidth = 1 << 20;
constexpr std::int64_t kMaxPixels = std::int64_t{1} << 27;

// Keys of other towers that change the result.
constexpr const char* kChangesComputation[] = {
    "window_size", "fullatt_block_indexes", "embed_dim", "mlp_ratio"};

UnsupportedError no_vision(const std::string& where, const std::string& reason) {
  return {
      "the model has no vision tower",
      where,
      reason,
      "leave the images out, or use a multimodal release with its vision weights"};
}

[[noreturn]] void unsupported(
    const JsonReader& config, const std::string& key, const std::string& reason) {
  throw UnsupportedError(
      "a vision tower that quern does not compute",
      config.place(key),
      reason,
      "use a model of the Qwen3.5 family, or leave the images out");
}

// A size that some configurations write as a list with one entry a side.
std::int64_t read_side(const JsonReader& config, const std::string& key, std::int64_t fallback) {
  constexpr std::int64_t kMaxSide = 1024;
  if (!config.has(key) || !config.json().find(key)->is_array()) {
    return config.get_int_in_or(key, 1, kMaxSide, fallback);
  }
  unsupported(config, key, "expected one number for all sides, found a list");
}

float read_float(const Json& value, const JsonReader& config, const std::string& key) {
  const double number = value.is_number() ? value.get<double>() : NAN;
  if (!std::isfinite(number) || std::fabs(number) > 1e6) {
    throw ParseError(
        "a key is out of range",
        config.place(key),
        "expected 3 numbers, found " + printable(value.dump(), 40),
        "check the file");
  }
  return static_cast<float>(number);
}

std::array<float, 3> read_channels(const JsonReader& config, const std::string& key) {
  const Json& values = config.get_array(key);
  if (values.size() != 3) {
    throw ParseError(
        "a key has the wrong length",
        config.place(key),
        fmt::format("expected 3 numbers, found {}", values.size()),
        "check the file");
  }
  std::array<float, 3> channels{};
  for (std::size_t c = 0; c < 3; ++c) {
    channels[c] = read_float(values[c], config, key);
  }
  return channels;
}

ImageProcessing read_processing(const JsonReader& config, const VisionConfig& vision) {
  for (const char* key : {"do_resize", "do_rescale", "do_normalize", "do_convert_rgb"}) {
    refuse_unless(config, key, true);
  }
  constexpr int kBicubic = 3;  // Pillow's number
  refuse_unless(config, "resample", kBicubic);
  refuse_unless(config, "patch_size", vision.patch_size);
  refuse_unless(config, "temporal_patch_size", vision.frames);
  refuse_unless(config, "merge_size", vision.merge_size);
  ImageProcessing processing;
  // Older files give the two areas without the object around them.
  if (config.has("min_pixels") && config.has("max_pixels")) {
    processing.min_pixels = config.get_int_in("min_pixels", 1, kMaxPixels);
    processing.max_pixels = config.get_int_in("max_pixels", 1, kMaxPixels);
  } else {
    const JsonReader size = config.get_object("size");
    processing.min_pixels = size.get_int_in("shortest_edge", 1, kMaxPixels);
    processing.max_pixels = size.get_int_in("longest_edge", 1, kMaxPixels);
  }
  processing.rescale_factor = config.get_number_or("rescale_factor", 1.0 / 255);
  processing.mean = read_channels(config, "image_mean");
  processing.deviation = read_channels(config, "image_std");
  const auto positive = [](double value) { return value > 0; };
  if (processing.min_pixels > processing.max_pixels || !positive(processing.rescale_factor) ||
      !std::all_of(processing.deviation.begin(), processing.deviation.end(), positive)) {
    throw ParseError(
        "image sizes or scales make no sense",
        config.where(),
        fmt::format(
            "{} to {} pixels, rescale_factor {}",
            processing.min_pixels,
            processing.max_pixels,
            processing.rescale_factor),
        "take the file from the model's own release");
  }
  return processing;
}

ImageProcessing load_processing(const Checkpoint& checkpoint, const VisionConfig& vision) {
  const std::filesystem::path own = checkpoint.directory() / "preprocessor_config.json";
  const std::filesystem::path shared = checkpoint.directory() / "processor_config.json";
  if (std::filesystem::exists(own) || !std::filesystem::exists(shared)) {
    const Json json = read_json(own);
    return read_processing(JsonReader(json, own.string()), vision);
  }
  const Json json = read_json(shared);
  return read_processing(JsonReader(json, shared.string()).get_object("image_processor"), vision);
}

VisionConfig read_vision_config(
    const JsonReader& outer, const JsonReader& config, const ModelConfig& decoder) {
  for (const char* key : kChangesComputation) {
    if (config.has(key)) {
      unsupported(config, key, "expected nothing, found a value of another tower");
    }
  }
  const std::string type = config.get_string_or("model_type", "qwen3_5_vision");
  if (!type.starts_with("qwen3_5")) {
    unsupported(config, "model_type", "expected qwen3_5_vision, found " + printable(type, 40));
  }
  refuse_unless(config, "deepstack_visual_indexes", Json::array());
  refuse_unless(config, "hidden_act", "gelu_pytorch_tanh");
  refuse_unless(config, "in_channels", 3);
  VisionConfig vision;
  vision.depth = config.get_int_in_or("depth", 1, 4096, 27);
  vision.hidden_size = config.get_int_in_or("hidden_size", 1, kMaxWidth, 1152);
  vision.intermediate_size = config.get_int_in_or("intermediate_size", 1, kMaxWidth, 4304);
  vision.heads = config.get_int_in_or("num_heads", 1, 4096, 16);
  vision.patch_size = read_side(config, "patch_size", 16);
  vision.frames = read_side(config, "temporal_patch_size", 2);
  vision.merge_size = read_side(config, "spatial_merge_size", 2);
  vision.out_size = config.get_int_in_or("out_hidden_size", 1, kMaxWidth, 3584);
  const std::int64_t positions =
      config.get_int_in_or("num_position_embeddings", 1, kMaxWidth, 2304);
  vision.position_side =
      static_cast<std::int64_t>(std::lround(std::sqrt(static_cast<double>(positions))));
  if (vision.position_side * vision.position_side != positions) {
    unsupported(
        config,
        "num_position_embeddings",
        fmt::format("expected the square of a number, found {}", positions));
  }
  if (vision.hidden_size % vision.heads != 0 || vision.head_dim() % 4 != 0) {
    unsupported(
        config,
        "num_heads",
        fmt::format(
            "expected heads whose width is a multiple of 4, found {} of {} values",
            vision.heads,
            vision.hidden_size));
  }
  if (vision.out_size != decoder.hidden_size) {
    unsupported(
        config,
        "out_hidden_size",
        fmt::format(
            "expected the decoder's hidden size {}, found {}",
            decoder.hidden_size,
            vision.out_size));
  }
  vision.rope_theta = 10000;
  if (config.has("rope_parameters")) {
    const JsonReader rope = config.get_object("rope_parameters");
    refuse_unless(rope, "rope_type", "axial");
    vision.rope_theta = rope.get_number_or("rope_theta", vision.rope_theta);
    if (!(vision.rope_theta > 0)) {
      unsupported(rope, "rope_theta", "expected a positive number");
    }
  }
  const auto token = [&](const char* key, std::int64_t fallback) {
    return static_cast<std::int32_t>(outer.get_int_in_or(key, 0, decoder.vocab_size - 1, fallback));
  };
  vision.image_token = token("image_token_id", 248056);
  vision.start_token = token("vision_start_token_id", 248053);
  vision.end_token = token("vision_end_token_id", 248054);
  return vision;
}

// Interleaved M-RoPE: components take turns as long as the axis has some left; the rest is time's.
std::vector<std::uint8_t> read_rope_axes(const JsonReader& text, const ModelConfig& decoder) {
  constexpr std::size_t kAxes = 3;
  std::array<std::int64_t, kAxes> sections = {11, 11, 10};
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    if (!text.has(key)) {
      continue;
    }
    const JsonReader rope = text.get_object(key);
    refuse_unless(rope, "mrope_interleaved", true);
    if (rope.has("mrope_section")) {
      const Json& values = rope.get_array("mrope_section");
      for (std::size_t axis = 0; axis < kAxes; ++axis) {
        if (values.size() != kAxes || !values[axis].is_number_unsigned() ||
            values[axis].get<std::uint64_t>() > kMaxWidth) {
          unsupported(
              rope, "mrope_section", "expected 3 counts, found " + printable(values.dump(), 40));
        }
        sections[axis] = values[axis].get<std::int64_t>();
      }
    }
  }
  std::vector<std::uint8_t> axes(decoder.rope.inverse_frequencies.size());
  for (std::size_t m = 0; m < axes.size(); ++m) {
    const std::size_t axis = m % kAxes;
    const bool has_turn =
        static_cast<std::int64_t>(m) < static_cast<std::int64_t>(kAxes) * sections[axis];
    axes[m] = has_turn ? static_cast<std::uint8_t>(axis) : 0;
  }
  return axes;
}

VisionBlock make_block(const std::string& base, const VisionConfig& config) {
  const std::int64_t width = config.hidden_size;
  const std::int64_t inner = config.intermediate_size;
  return {
      {base + "norm1", width},
      {base + "norm2", width},
      {base + "attn.qkv", Role::kQuery, 3 * width, width, true},
      {base + "attn.proj", Role::kOutput, width, width, true},
      {base + "mlp.linear_fc1", Role::kUp, inner, width, true},
      {base + "mlp.linear_fc2", Role::kDown, width, inner, true}};
}

}  // namespace

VisionGraph build_vision_graph(const Checkpoint& checkpoint, const ModelConfig& decoder) {
  const JsonReader outer(checkpoint.config(), checkpoint.config_place());
  if (!outer.has("vision_config")) {
    throw no_vision(outer.where(), "expected vision_config, found none");
  }
  const std::string base = kPrefix;
  const std::string patches = base + "patch_embed.proj";
  if (checkpoint.tensors().find(patches + ".weight") == nullptr) {
    throw no_vision(patches + ".weight", "expected the tensor, found none");
  }
  if (checkpoint.tensors().find(base + "deepstack_merger_list.0.norm.weight") != nullptr) {
    throw UnsupportedError(
        "a vision tower that quern does not compute",
        base + "deepstack_merger_list",
        "expected one merger, found deepstack's (Qwen3-VL)",
        "use a model of the Qwen3.5 family, or leave the images out");
  }
  VisionGraph graph;
  graph.config = read_vision_config(outer, outer.get_object("vision_config"), decoder);
  graph.config.processing = load_processing(checkpoint, graph.config);
  graph.rope_axes =
      read_rope_axes(outer.has("text_config") ? outer.get_object("text_config") : outer, decoder);
  const VisionConfig& config = graph.config;
  const std::int64_t width = config.hidden_size;
  const std::int64_t merged = width * config.merged_patches();
  graph.patches = {patches, Role::kEmbedding, width, config.patch_values(), true};
  graph.positions = base + "pos_embed.weight";
  for (std::int64_t i = 0; i < config.depth; ++i) {
    graph.blocks.push_back(make_block(fmt::format("{}blocks.{}.", base, i), config));
  }
  graph.merger_norm = {base + "merger.norm", width};
  graph.merger_fc1 = {base + "merger.linear_fc1", Role::kUp, merged, merged, true};
  graph.merger_fc2 = {base + "merger.linear_fc2", Role::kDown, config.out_size, merged, true};
  return graph;
}

}  // namespace quern
