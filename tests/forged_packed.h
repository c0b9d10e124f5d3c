// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "forged.h"

#include <functional>
#include <string>
#include <utility>
#include <vector>

// Broken checkpoints of AWQ, compressed-tensors and quern's own container: as forged.h, a good one
// of each and one lie each.
namespace quern::testing {

inline constexpr std::int64_t kForgedGroup = 32;

inline std::string repeated(const std::string& value, std::int64_t count) {
  std::string bytes;
  for (std::int64_t i = 0; i < count; ++i) {
    bytes += value;
  }
  return bytes;
}

inline const std::string& half_scale() {
  static const std::string kBytes("\x00\x20", 2);  // 2^-7 as a half, 2^-63 as BF16
  return kBytes;
}

inline std::string words(std::int64_t count) {
  return filler(static_cast<std::size_t>(count * 4));
}

inline ForgedFile awq_weights() {
  ForgedFile file;
  add_plain_tensors(file);
  for (const ForgedLinear& linear : forged_linears()) {
    const std::int64_t groups = linear.in / kForgedGroup;
    const std::int64_t columns = linear.out / 8;
    file.add(linear.name + ".qweight", "I32", {linear.in, columns}, words(linear.in * columns));
    file.add(
        linear.name + ".qzeros", "I32", {groups, columns}, repeated("\x88", groups * columns * 4));
    file.add(
        linear.name + ".scales",
        "F16",
        {groups, linear.out},
        repeated(half_scale(), groups * linear.out));
  }
  return file;
}

inline Json awq_quantization() {
  return Json::parse(R"({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": true,
    "version": "gemm", "modules_to_not_convert": null})");
}

inline std::string shape_bytes(const ForgedLinear& linear) {
  const std::int64_t extents[2] = {linear.out, linear.in};
  return {reinterpret_cast<const char*>(extents), sizeof(extents)};
}

inline ForgedFile compressed_weights() {
  ForgedFile file;
  add_plain_tensors(file);
  for (const ForgedLinear& linear : forged_linears()) {
    const std::int64_t groups = linear.in / kForgedGroup;
    const std::int64_t row = linear.in / 8;
    file.add(linear.name + ".weight_packed", "I32", {linear.out, row}, words(linear.out * row));
    file.add(
        linear.name + ".weight_scale",
        "BF16",
        {linear.out, groups},
        repeated(half_scale(), linear.out * groups));
    file.add(linear.name + ".weight_shape", "I64", {2}, shape_bytes(linear));
  }
  return file;
}

inline Json compressed_quantization() {
  return Json::parse(R"({"quant_method": "compressed-tensors", "format": "pack-quantized",
    "quantization_status": "compressed", "kv_cache_scheme": null, "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": null,
      "weights": {"num_bits": 4, "type": "int", "symmetric": true, "strategy": "group",
                  "group_size": 32, "dynamic": false}}}})");
}

// W8A8 with static inputs.
inline ForgedFile integer_weights() {
  ForgedFile file;
  add_plain_tensors(file);
  const std::string one("\x00\x00\x80\x3f", 4);
  for (const ForgedLinear& linear : forged_linears()) {
    file.add(
        linear.name + ".weight",
        "I8",
        {linear.out, linear.in},
        filler(static_cast<std::size_t>(linear.out * linear.in)));
    file.add(linear.name + ".weight_scale", "F32", {linear.out, 1}, repeated(one, linear.out));
    file.add(linear.name + ".input_scale", "F32", {1}, one);
  }
  return file;
}

inline Json integer_quantization() {
  return Json::parse(R"({"quant_method": "compressed-tensors", "format": "int-quantized",
    "ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"],
      "weights": {"num_bits": 8, "type": "int", "symmetric": true, "strategy": "channel"},
      "input_activations": {"num_bits": 8, "type": "int", "symmetric": true,
                            "strategy": "tensor", "dynamic": false}}}})");
}

inline ForgedFile container_weights() {
  ForgedFile file;
  add_plain_tensors(file);
  for (const ForgedLinear& linear : forged_linears()) {
    const std::int64_t groups = linear.in / kForgedGroup;
    const std::int64_t row = linear.in / 8;
    file.add(linear.name + ".codes", "U32", {linear.out, row}, words(linear.out * row));
    file.add(
        linear.name + ".scales",
        "F16",
        {linear.out, groups},
        repeated(half_scale(), linear.out * groups));
  }
  return file;
}

inline Json container_quantization() {
  Json json = Json::parse(R"({"quant_method": "quern", "version": 1})");
  for (const ForgedLinear& linear : forged_linears()) {
    json["modules"][linear.name] = Json::parse(R"({"kind": "packed", "parameters":
      {"bits": 4, "symmetric": true, "group_size": 32, "scale_dtype": "F16"}})");
  }
  return json;
}

inline std::vector<ForgedCase> good_packed_checkpoints() {
  return {
      {"awq", gptq_files(awq_weights(), awq_quantization())},
      {"compressed-tensors", gptq_files(compressed_weights(), compressed_quantization())},
      {"compressed-tensors", gptq_files(integer_weights(), integer_quantization())},
      {"quern", gptq_files(container_weights(), container_quantization())}};
}

class ForgePacked {
 public:
  [[nodiscard]] std::vector<ForgedCase> cases() {
    awq();
    compressed();
    integers();
    container();
    return std::move(cases_);
  }

 private:
  using Change = std::function<void(ForgedFile& weights, Json& quantization)>;

  void add(const std::string& name, ForgedFile weights, Json quantization, const Change& change) {
    change(weights, quantization);
    cases_.push_back({name, gptq_files(weights, quantization)});
  }
  static std::string up() { return "model.layers.0.mlp.up_proj"; }
  static void rename(ForgedFile& file, const std::string& from, const std::string& to) {
    file.tensor(from).name = to;
  }
  // Replaces the bytes of a tensor by as many others.
  static void overwrite(ForgedFile& file, const std::string& name, const std::string& bytes) {
    const Json offsets = Json::parse(file.tensor(name).offsets);
    file.data.replace(offsets[0].get<std::size_t>(), bytes.size(), bytes);
  }

  void awq() {
    const auto forge = [&](const std::string& name, const Change& change) {
      add("awq_" + name, awq_weights(), awq_quantization(), change);
    };
    const auto setting = [&](const std::string& name, const char* key, Json value) {
      forge(name, [&](ForgedFile&, Json& q) { q[key] = std::move(value); });
    };
    setting("gemv", "version", "gemv");
    setting("llm_awq", "version", "llm-awq");
    setting("marlin", "version", "marlin");
    setting("eight_bits", "bits", 8);
    setting("bits_as_text", "bits", "4");
    setting("no_groups", "group_size", 0);
    setting("other_groups", "group_size", 64);
    setting("partial_groups", "group_size", 48);
    setting("huge_groups", "group_size", 1LL << 40);
    setting("skipped_as_number", "modules_to_not_convert", 7);
    setting("two_widths", "w_bit", 3);
    forge("no_zeros", [](ForgedFile& w, Json&) { rename(w, up() + ".qzeros", up() + ".z"); });
    forge("no_scales", [](ForgedFile& w, Json&) { rename(w, up() + ".scales", up() + ".s"); });
    forge("flat_codes", [](ForgedFile& w, Json&) { w.tensor(up() + ".qweight").shape = "[1024]"; });
    forge("turned_codes", [](ForgedFile& w, Json&) {
      w.tensor(up() + ".qweight").shape = "[16,64]";
    });
    forge(
        "float_codes", [](ForgedFile& w, Json&) { w.tensor(up() + ".qweight").dtype = "\"F32\""; });
    forge("integer_scales", [](ForgedFile& w, Json&) {
      w.tensor(up() + ".scales").dtype = "\"I16\"";
    });
    forge("infinite_scale", [](ForgedFile& w, Json&) {
      overwrite(w, up() + ".scales", std::string("\x00\x7c", 2));
    });
    forge("twice", [](ForgedFile& w, Json&) {
      w.add(up() + ".weight", "BF16", {128, 64}, filler(std::size_t{128} * 64 * 2));
    });
  }

  void compressed() {
    const auto forge = [&](const std::string& name, const Change& change) {
      add("compressed_" + name, compressed_weights(), compressed_quantization(), change);
    };
    const auto setting = [&](const std::string& name, const char* key, Json value) {
      forge(name, [&](ForgedFile&, Json& q) { q[key] = std::move(value); });
    };
    const auto weights = [&](const std::string& name, const char* key, Json value) {
      forge(name, [&](ForgedFile&, Json& q) {
        q["config_groups"]["group_0"]["weights"][key] = std::move(value);
      });
    };
    setting("float_format", "format", "float-quantized");
    setting("unknown_format", "format", "zip");
    setting("integer_format", "format", "int-quantized");
    setting("mixed_without_formats", "format", "mixed-precision");
    setting("calibrating", "quantization_status", "calibration");
    setting("cache", "kv_cache_scheme", Json{{"num_bits", 8}});
    setting("sparse", "sparsity_config", Json{{"format", "sparse-24-bitmask"}});
    setting("transform", "transform_config", Json{{"config_groups", {{"u", Json::object()}}}});
    setting("no_groups", "config_groups", Json::object());
    setting("groups_as_list", "config_groups", Json::array());
    setting("preset", "config_groups", Json{{"W4A16", Json::array({"Linear"})}});
    setting("ignored", "ignore", Json::array({"re:.*up_proj$"}));
    setting("ignored_class", "ignore", Json::array({"Linear"}));
    setting("endless_expression", "ignore", Json::array({"re:(([a-z0-9._]+)+)+[^a-z0-9._]$"}));
    setting("broken_expression", "ignore", Json::array({"re:("}));
    weights("float", "type", "float");
    weights("eight_bits", "num_bits", 8);
    weights("three_bits", "num_bits", 3);
    weights("no_bits", "num_bits", 0);
    weights("other_groups", "group_size", 64);
    weights("by_channel", "strategy", "channel");
    weights("by_block", "strategy", "block");
    weights("asymmetric", "symmetric", false);
    weights("act_order", "actorder", "group");
    weights("dynamic", "dynamic", true);
    forge("targets_nothing", [](ForgedFile&, Json& q) {
      q["config_groups"]["group_0"]["targets"] = Json::array();
    });
    forge("targets_twice", [](ForgedFile&, Json& q) {
      q["config_groups"]["group_0"]["targets"] = Json::array({"Linear", "Linear"});
    });
    forge("outputs", [](ForgedFile&, Json& q) {
      q["config_groups"]["group_0"]["output_activations"] = Json{{"num_bits", 8}};
    });
    forge("no_scale", [](ForgedFile& w, Json&) {
      rename(w, up() + ".weight_scale", up() + ".scale");
    });
    forge("no_shape", [](ForgedFile& w, Json&) {
      rename(w, up() + ".weight_shape", up() + ".shape");
    });
    forge("shape_lies", [](ForgedFile& w, Json&) {
      overwrite(w, up() + ".weight_shape", shape_bytes({"", 64, 128}));
    });
    forge("negative_shape", [](ForgedFile& w, Json&) {
      overwrite(w, up() + ".weight_shape", shape_bytes({"", -128, -64}));
    });
    forge("float_codes", [](ForgedFile& w, Json&) {
      w.tensor(up() + ".weight_packed").dtype = "\"F32\"";
    });
    forge("flat_codes", [](ForgedFile& w, Json&) {
      w.tensor(up() + ".weight_packed").shape = "[1024]";
    });
    forge("turned_scales", [](ForgedFile& w, Json&) {
      w.tensor(up() + ".weight_scale").shape = "[2,128]";
    });
    forge("scale_is_no_number", [](ForgedFile& w, Json&) {
      overwrite(w, up() + ".weight_scale", std::string("\xc0\x7f", 2));
    });
    forge("zero_points_of_symmetric", [](ForgedFile& w, Json&) {
      w.add(up() + ".weight_zero_point", "I32", {16, 2}, words(32));
    });
    forge("group_index_out_of_range", [](ForgedFile& w, Json&) {
      w.add(up() + ".weight_g_idx", "I32", {64}, repeated(std::string("\x02\x00\x00\x00", 4), 64));
    });
    forge("twice", [](ForgedFile& w, Json&) {
      w.add(up() + ".weight", "BF16", {128, 64}, filler(std::size_t{128} * 64 * 2));
    });
    forge("floats_where_integers_are_said", [](ForgedFile& w, Json&) {
      for (const char* part : {".weight_packed", ".weight_scale", ".weight_shape"}) {
        rename(w, up() + part, "unused" + std::string(part) + ".x");
      }
      w.add(up() + ".weight", "BF16", {128, 64}, filler(std::size_t{128} * 64 * 2));
    });
  }

  void integers() {
    const auto forge = [&](const std::string& name, const Change& change) {
      add("integer_" + name, integer_weights(), integer_quantization(), change);
    };
    forge("packed_format", [](ForgedFile&, Json& q) { q["format"] = "pack-quantized"; });
    forge("four_bits", [](ForgedFile&, Json& q) {
      q["config_groups"]["group_0"]["weights"]["num_bits"] = 4;
    });
    forge("asymmetric_inputs", [](ForgedFile&, Json& q) {
      q["config_groups"]["group_0"]["input_activations"]["symmetric"] = false;
    });
    forge("float_inputs", [](ForgedFile&, Json& q) {
      q["config_groups"]["group_0"]["input_activations"]["type"] = "float";
    });
    forge("no_input_scale", [](ForgedFile& w, Json&) {
      rename(w, up() + ".input_scale", up() + ".scale");
    });
    forge("input_scale_0", [](ForgedFile& w, Json&) {
      overwrite(w, up() + ".input_scale", std::string(4, '\0'));
    });
    forge("input_zero_point", [](ForgedFile& w, Json&) {
      w.add(up() + ".input_zero_point", "I8", {1}, "\x01");
    });
    forge("turned_weight", [](ForgedFile& w, Json&) {
      w.tensor(up() + ".weight").shape = "[64,128]";
    });
    forge("one_scale", [](ForgedFile&, Json& q) {
      q["config_groups"]["group_0"]["weights"]["strategy"] = "tensor";
    });
  }

  void container() {
    const auto forge = [&](const std::string& name, const Change& change) {
      add("container_" + name, container_weights(), container_quantization(), change);
    };
    const auto parameter = [&](const std::string& name, const char* key, Json value) {
      forge(name, [&](ForgedFile&, Json& q) {
        q["modules"][up()]["parameters"][key] = std::move(value);
      });
    };
    forge("version_2", [](ForgedFile&, Json& q) { q["version"] = 2; });
    forge("no_version", [](ForgedFile&, Json& q) { q.erase("version"); });
    forge("no_modules", [](ForgedFile&, Json& q) { q.erase("modules"); });
    forge("modules_as_list", [](ForgedFile&, Json& q) { q["modules"] = Json::array(); });
    forge("module_left_out", [](ForgedFile&, Json& q) { q["modules"].erase(up()); });
    forge("unknown_kind", [](ForgedFile&, Json& q) { q["modules"][up()]["kind"] = "lattice"; });
    forge("no_kind", [](ForgedFile&, Json& q) { q["modules"][up()].erase("kind"); });
    parameter("nine_bits", "bits", 9);
    parameter("eight_bits", "bits", 8);
    parameter("no_bits", "bits", nullptr);
    parameter("other_groups", "group_size", 64);
    parameter("asymmetric", "symmetric", false);
    parameter("integer_scales", "scale_dtype", "I16");
    parameter("other_scales", "scale_dtype", "BF16");
    forge("no_codes", [](ForgedFile& w, Json&) { rename(w, up() + ".codes", up() + ".c"); });
    forge(
        "signed_codes", [](ForgedFile& w, Json&) { w.tensor(up() + ".codes").dtype = "\"I32\""; });
    forge("infinite_scale", [](ForgedFile& w, Json&) {
      overwrite(w, up() + ".scales", std::string("\x00\x7c", 2));
    });
    forge("zero_point_out_of_range", [](ForgedFile& w, Json& q) {
      q["modules"][up()]["parameters"]["symmetric"] = false;
      w.add(up() + ".zeros", "U8", {128, 2}, std::string(256, '\x10'));
    });
    forge("group_index_out_of_range", [](ForgedFile& w, Json&) {
      w.add(up() + ".group_index", "I32", {64}, repeated(std::string("\x02\x00\x00\x00", 4), 64));
    });
    forge("inputs_of_16_bits", [](ForgedFile&, Json& q) {
      q["modules"][up()]["activation"] = Json{{"bits", 16}};
    });
    forge("static_inputs_without_scale", [](ForgedFile&, Json& q) {
      q["modules"][up()]["activation"] = Json{{"bits", 8}, {"dynamic", false}};
    });
    forge("negative_input_scale", [](ForgedFile&, Json& q) {
      q["modules"][up()]["activation"] = Json{{"bits", 8}, {"dynamic", false}, {"scale", -1}};
    });
    forge("twice", [](ForgedFile& w, Json&) {
      w.add(up() + ".weight", "BF16", {128, 64}, filler(std::size_t{128} * 64 * 2));
    });
  }

  std::vector<ForgedCase> cases_;
};

inline std::vector<ForgedCase> forged_packed_cases() {
  return ForgePacked().cases();
}

}  // namespace quern::testing
