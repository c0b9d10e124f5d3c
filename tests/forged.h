// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/json.h"

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

// Broken checkpoints: a good tiny one, and one lie each. Every case is a directory (file name ->
// bytes), so that it can be given to the library and, written to disk, to the program.
namespace quern::testing {

using Files = std::map<std::string, std::string>;

struct ForgedCase {
  std::string name;
  Files files;
};

// One line of a safetensors header, each field as it will stand in the JSON text.
struct ForgedTensor {
  std::string name;
  std::string dtype;
  std::string shape;
  std::string offsets;
};

// A safetensors file before it is put together.
struct ForgedFile {
  std::vector<ForgedTensor> tensors;
  std::string metadata = R"("__metadata__":{"format":"pt"})";
  std::string data;

  void add(
      const std::string& name,
      const std::string& dtype,
      const std::vector<std::int64_t>& shape,
      const std::string& bytes) {
    const std::string text = nlohmann::json(shape).dump();
    const std::size_t begin = data.size();
    data += bytes;
    tensors.push_back(
        {name,
         '"' + dtype + '"',
         text,
         '[' + std::to_string(begin) + ',' + std::to_string(data.size()) + ']'});
  }
  ForgedTensor& tensor(const std::string& name) {
    for (ForgedTensor& entry : tensors) {
      if (entry.name == name) {
        return entry;
      }
    }
    throw std::logic_error("no tensor " + name);
  }
  [[nodiscard]] std::string header() const {
    std::string text = '{' + metadata;
    for (const ForgedTensor& entry : tensors) {
      text += text.size() > 1 ? "," : "";
      text += '"' + entry.name + R"(":{"dtype":)" + entry.dtype + R"(,"shape":)" + entry.shape +
              R"(,"data_offsets":)" + entry.offsets + '}';
    }
    return text + '}';
  }
};

inline std::string forged_bytes(std::uint64_t header_length, const std::string& rest) {
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &header_length, 8);
  return bytes + rest;
}

inline std::string put_together(const ForgedFile& file) {
  const std::string header = file.header();
  return forged_bytes(header.size(), header + file.data);
}

// Some bytes that are neither all equal nor NaN as any 16-bit float.
inline std::string filler(std::size_t bytes) {
  std::string text(bytes, '\0');
  for (std::size_t i = 0; i < bytes; ++i) {
    text[i] = static_cast<char>(i % 2 == 0 ? i * 37 % 251 : 0x38 + i % 5);
  }
  return text;
}

struct ForgedLinear {
  std::string name;
  std::int64_t out;
  std::int64_t in;
};

inline std::vector<ForgedLinear> forged_linears() {
  const std::string layer = "model.layers.0.";
  return {
      {layer + "self_attn.q_proj", 64, 64},
      {layer + "self_attn.k_proj", 32, 64},
      {layer + "self_attn.v_proj", 32, 64},
      {layer + "self_attn.o_proj", 64, 64},
      {layer + "mlp.gate_proj", 128, 64},
      {layer + "mlp.up_proj", 128, 64},
      {layer + "mlp.down_proj", 64, 128}};
}

struct ForgedPlain {
  std::string name;
  std::vector<std::int64_t> shape;
};

inline std::vector<ForgedPlain> forged_plain_tensors() {
  const std::string layer = "model.layers.0.";
  return {
      {"model.embed_tokens.weight", {64, 64}},
      {layer + "input_layernorm.weight", {64}},
      {layer + "post_attention_layernorm.weight", {64}},
      {layer + "self_attn.q_norm.weight", {32}},
      {layer + "self_attn.k_norm.weight", {32}},
      {"model.norm.weight", {64}}};
}

inline Json forged_config() {
  return Json::parse(R"({
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 64, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 256,
    "attention_bias": false, "tie_word_embeddings": true, "dtype": "bfloat16",
    "bos_token_id": 1, "eos_token_id": 1})");
}

inline Json forged_quantization() {
  return Json::parse(R"({
    "quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": false, "sym": true,
    "lm_head": false, "checkpoint_format": "gptq", "pack_dtype": "int32"})");
}

inline void add_plain_tensors(ForgedFile& file) {
  for (const ForgedPlain& plain : forged_plain_tensors()) {
    std::size_t bytes = 2;
    for (const std::int64_t extent : plain.shape) {
      bytes *= static_cast<std::size_t>(extent);
    }
    file.add(plain.name, "BF16", plain.shape, filler(bytes));
  }
}

inline ForgedFile gptq_weights() {
  ForgedFile file;
  add_plain_tensors(file);
  for (const ForgedLinear& linear : forged_linears()) {
    const std::int64_t groups = linear.in / 32;
    const auto size = [](std::int64_t count, std::int64_t width) {
      return static_cast<std::size_t>(count * width);
    };
    std::string index;
    for (std::int32_t i = 0; i < linear.in; ++i) {
      const std::int32_t group = i / 32;
      index.append(reinterpret_cast<const char*>(&group), 4);
    }
    const std::int64_t rows = linear.in / 8;
    const std::int64_t columns = linear.out / 8;
    file.add(
        linear.name + ".qweight", "I32", {rows, linear.out}, filler(size(rows * linear.out, 4)));
    file.add(
        linear.name + ".qzeros",
        "I32",
        {groups, columns},
        std::string(size(groups * columns, 4), '\x77'));
    std::string scales;
    for (std::int64_t i = 0; i < groups * linear.out; ++i) {
      scales += std::string("\x00\x20", 2);
    }
    file.add(linear.name + ".scales", "F16", {groups, linear.out}, scales);
    file.add(linear.name + ".g_idx", "I32", {linear.in}, index);
  }
  return file;
}

inline Files gptq_files(const ForgedFile& weights, const Json& quantization) {
  Json config = forged_config();
  config["quantization_config"] = quantization;
  return {{"config.json", config.dump(1)}, {"model.safetensors", put_together(weights)}};
}

// A dense checkpoint in two files.
struct ForgedShards {
  ForgedFile first;
  ForgedFile second;
  Json index;
};

inline const std::string& first_shard() {
  static const std::string kName = "model-00001-of-00002.safetensors";
  return kName;
}
inline const std::string& second_shard() {
  static const std::string kName = "model-00002-of-00002.safetensors";
  return kName;
}

inline ForgedShards dense_shards() {
  ForgedShards shards;
  add_plain_tensors(shards.first);
  for (const ForgedLinear& linear : forged_linears()) {
    shards.second.add(
        linear.name + ".weight",
        "BF16",
        {linear.out, linear.in},
        filler(static_cast<std::size_t>(linear.out * linear.in * 2)));
  }
  shards.index["metadata"]["total_size"] = shards.first.data.size() + shards.second.data.size();
  for (const ForgedTensor& tensor : shards.first.tensors) {
    shards.index["weight_map"][tensor.name] = first_shard();
  }
  for (const ForgedTensor& tensor : shards.second.tensors) {
    shards.index["weight_map"][tensor.name] = second_shard();
  }
  return shards;
}

inline Files dense_files(const ForgedShards& shards) {
  return {
      {"config.json", forged_config().dump(1)},
      {"model.safetensors.index.json", shards.index.dump(1)},
      {first_shard(), put_together(shards.first)},
      {second_shard(), put_together(shards.second)}};
}

// The unbroken ones.
inline std::vector<ForgedCase> good_checkpoints() {
  return {
      {"gptq", gptq_files(gptq_weights(), forged_quantization())},
      {"dense", dense_files(dense_shards())}};
}

class Forge {
 public:
  [[nodiscard]] std::vector<ForgedCase> cases() {
    broken_containers();
    broken_headers();
    broken_entries();
    broken_indexes();
    broken_configs();
    broken_rules();
    broken_modules();
    broken_directories();
    return std::move(cases_);
  }

 private:
  void add(const std::string& name, Files files) { cases_.push_back({name, std::move(files)}); }

  // The bytes of the weights, changed.
  void bytes(const std::string& name, const std::function<void(std::string&)>& change) {
    Files files = gptq_files(gptq_weights(), forged_quantization());
    change(files["model.safetensors"]);
    add(name, std::move(files));
  }
  // The header text as a whole, with the length field made to fit.
  void header(const std::string& name, const std::function<std::string(std::string)>& change) {
    const ForgedFile weights = gptq_weights();
    const std::string text = change(weights.header());
    Files files = gptq_files(weights, forged_quantization());
    files["model.safetensors"] = forged_bytes(text.size(), text + weights.data);
    add(name, std::move(files));
  }
  void weights(const std::string& name, const std::function<void(ForgedFile&)>& change) {
    ForgedFile file = gptq_weights();
    change(file);
    add(name, gptq_files(file, forged_quantization()));
  }
  void shards(const std::string& name, const std::function<void(ForgedShards&)>& change) {
    ForgedShards value = dense_shards();
    change(value);
    add(name, dense_files(value));
  }
  void index_text(const std::string& name, const std::function<std::string(std::string)>& change) {
    Files files = dense_files(dense_shards());
    std::string& text = files["model.safetensors.index.json"];
    text = change(text);
    add(name, std::move(files));
  }
  // A key of quantization_config, its value as JSON text.
  void setting(const std::string& name, const std::string& key, const std::string& value) {
    Json quantization = forged_quantization();
    quantization[key] = Json::parse(value);
    add("quantization_" + name, gptq_files(gptq_weights(), quantization));
  }
  void without(const std::string& key) {
    Json quantization = forged_quantization();
    quantization.erase(key);
    add("quantization_without_" + key, gptq_files(gptq_weights(), quantization));
  }
  void config_text(const std::string& name, const std::string& text) {
    Files files = gptq_files(gptq_weights(), forged_quantization());
    files["config.json"] = text;
    add("config_" + name, std::move(files));
  }

  void broken_containers() {
    for (const std::size_t size : {0, 1, 7, 8, 9, 40}) {
      bytes("truncated_to_" + std::to_string(size), [=](std::string& b) { b.resize(size); });
    }
    const std::size_t header_end = 8 + gptq_weights().header().size();
    const std::size_t end = header_end + gptq_weights().data.size();
    for (const std::size_t size :
         {header_end / 2,
          header_end - 1,
          header_end,
          header_end + 1,
          end / 2,
          end - 100,
          end - 1}) {
      bytes("truncated_to_" + std::to_string(size), [=](std::string& b) { b.resize(size); });
    }
    const auto length = [this](const std::string& name, std::uint64_t value) {
      bytes("header_length_" + name, [=](std::string& b) { std::memcpy(b.data(), &value, 8); });
    };
    length("zero", 0);
    length("one", 1);
    length("short_by_one", header_end - 9);
    length("long_by_one", header_end - 7);
    length("beyond_the_file", end);
    length("100_million_and_one", 100'000'001);
    length("sign_bit", std::uint64_t{1} << 63U);
    length("all_ones", ~std::uint64_t{0});
    length("wraps_with_eight", ~std::uint64_t{0} - 7);
    bytes("trailing_byte", [](std::string& b) { b += '\0'; });
    bytes("trailing_page", [](std::string& b) { b.append(4096, '\0'); });
    bytes("git_lfs_pointer", [](std::string& b) {
      b = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n";
    });
    bytes("html_page", [](std::string& b) { b = "<!DOCTYPE html><html>404 not found</html>"; });
    bytes("zeros", [](std::string& b) { b.assign(b.size(), '\0'); });
    bytes("zip_archive", [](std::string& b) { b.replace(0, 4, "PK\x03\x04"); });
  }

  void broken_headers() {
    const auto whole = [this](const std::string& name, const std::string& text) {
      header("header_" + name, [=](const std::string&) { return text; });
    };
    whole("array", "[]");
    whole("string", "\"x\"");
    whole("number", "12");
    whole("null", "null");
    whole("empty_object", "{}");
    whole("unterminated", "{\"a\":");
    whole("single_quotes", "{'a':1}");
    whole("deep", "{\"a\":" + std::string(200, '[') + std::string(200, ']') + "}");
    whole("deep_unclosed", "{\"a\":" + std::string(100'000, '['));
    header("header_leading_space", [](const std::string& h) { return " " + h; });
    header("header_byte_order_mark", [](const std::string& h) { return "\xef\xbb\xbf" + h; });
    header("header_garbage_behind", [](const std::string& h) { return h + "x"; });
    header("header_two_objects", [](const std::string& h) { return h + "{}"; });
    header("header_comma_behind", [](std::string h) { return h.insert(h.size() - 1, ","); });
    header("header_comment", [](std::string h) { return h.insert(1, "/* c */"); });
    header("header_nul_byte", [](std::string h) { return h.insert(1, 1, '\0'); });
    header("header_invalid_utf8", [](std::string h) { return h.insert(2, "\xff"); });
    header("header_huge_number", [](std::string h) { return h.insert(1, "\"x\":1e999,"); });
    header("header_nan", [](std::string h) { return h.insert(1, "\"x\":NaN,"); });
    header("header_lone_surrogate", [](std::string h) { return h.insert(1, R"("\ud800":{},)"); });
    const auto metadata = [this](const std::string& name, const std::string& text) {
      weights("metadata_" + name, [=](ForgedFile& f) { f.metadata = text; });
    };
    metadata("not_an_object", R"("__metadata__":[])");
    metadata("number_inside", R"("__metadata__":{"a":1})");
    metadata("object_inside", R"("__metadata__":{"a":{}})");
    metadata("same_key_twice", R"("__metadata__":{"a":"1","a":"2"})");
    metadata("twice", R"("__metadata__":{},"__metadata__":{})");
  }

  void broken_entries() {
    const std::string norm = "model.norm.weight";
    const auto dtype = [&, this](const std::string& name, const std::string& text) {
      weights("dtype_" + name, [=](ForgedFile& f) { f.tensor(norm).dtype = text; });
    };
    dtype("number", "7");
    dtype("null", "null");
    dtype("empty", R"("")");
    dtype("unknown", R"("F12")");
    dtype("lower_case", R"("bf16")");
    dtype("wider", R"("F32")");
    dtype("narrower", R"("U8")");
    dtype("twice", R"("BF16","dtype":"BF16")");
    const auto shape = [&, this](const std::string& name, const std::string& text) {
      weights("shape_" + name, [=](ForgedFile& f) { f.tensor(norm).shape = text; });
    };
    shape("number", "64");
    shape("object", "{}");
    shape("null", "null");
    shape("negative", "[-64]");
    shape("two_negatives", "[-8,-8]");
    shape("float", "[64.0]");
    shape("text", R"(["64"])");
    shape("nested", "[[64]]");
    shape("one_more", "[65]");
    shape("one_less", "[63]");
    shape("scalar", "[]");
    shape("empty_tensor", "[0]");
    shape("zero_and_huge", "[0,9223372036854775807,9223372036854775807]");
    shape("2_to_63", "[9223372036854775808]");
    shape("2_to_64", "[18446744073709551616]");
    shape("2_to_64_plus_64", "[18446744073709551680]");
    shape("product_wraps_to_64", "[4294967296,4294967296,64]");
    shape("product_wraps", "[9223372036854775807,2]");
    shape("bytes_wrap", "[4611686018427387904,4]");
    std::string extents = "[2";
    for (int i = 0; i < 70; ++i) {
      extents += ",2";
    }
    shape("many_extents", extents + "]");
    const auto offsets = [&, this](const std::string& name, const std::string& text) {
      weights("offsets_" + name, [=](ForgedFile& f) { f.tensor(norm).offsets = text; });
    };
    offsets("missing_end", "[0]");
    offsets("three", "[0,128,256]");
    offsets("none", "[]");
    offsets("reversed", "[128,0]");
    offsets("negative", "[-128,0]");
    offsets("text", R"(["0","128"])");
    offsets("float", "[0.5,128.5]");
    offsets("overlap", "[0,128]");
    offsets("beyond_the_file", "[99999872,100000000]");
    offsets("huge", "[9223372036854775679,9223372036854775807]");
    offsets("wrapping", "[18446744073709551488,18446744073709551616]");
    weights("entry_not_an_object", [=](ForgedFile& f) { f.metadata += R"(,"x":[])"; });
    weights("entry_null", [=](ForgedFile& f) { f.metadata += R"(,"x":null)"; });
    weights("entry_empty", [=](ForgedFile& f) { f.metadata += R"(,"x":{})"; });
    weights("entry_without_shape", [=](ForgedFile& f) {
      f.metadata += R"(,"x":{"dtype":"U8","data_offsets":[0,0]})";
    });
    weights("entry_without_offsets", [=](ForgedFile& f) {
      f.metadata += R"(,"x":{"dtype":"U8","shape":[0]})";
    });
    weights("entry_unknown_property", [=](ForgedFile& f) {
      f.metadata += R"(,"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"strides":[1]})";
    });
    weights("tensor_twice", [=](ForgedFile& f) { f.tensors.push_back(f.tensor(norm)); });
    weights("same_bytes_twice", [=](ForgedFile& f) {
      f.tensors.push_back(f.tensor(norm));
      f.tensors.back().name = "model.other.weight";
    });
    weights("hole_in_front", [=](ForgedFile& f) { f.tensors.erase(f.tensors.begin()); });
    weights("hole_inside", [=](ForgedFile& f) { f.tensors.erase(f.tensors.begin() + 4); });
    weights("hole_at_the_end", [=](ForgedFile& f) { f.tensors.pop_back(); });
  }

  void broken_indexes() {
    const auto text = [this](const std::string& name, const std::string& value) {
      index_text("index_" + name, [=](const std::string&) { return value; });
    };
    text("empty", "");
    text("not_json", "weights");
    text("array", "[]");
    text("without_map", R"({"metadata":{}})");
    text("map_array", R"({"weight_map":[]})");
    text("map_empty", R"({"weight_map":{}})");
    text("map_number", R"({"weight_map":{"a":1}})");
    text("map_deep", R"({"weight_map":)" + std::string(100, '['));
    index_text("index_truncated", [](std::string t) { return t.substr(0, t.size() / 2); });
    index_text("index_duplicate_key", [](std::string t) {
      return t.insert(
          t.find("\"model.norm.weight\""),
          "\"model.norm.weight\":\"model-00002-of-00002.safetensors\",");
    });
    const std::string norm = "model.norm.weight";
    const auto file = [&, this](const std::string& name, const std::string& value) {
      shards("index_file_" + name, [=](ForgedShards& s) { s.index["weight_map"][norm] = value; });
    };
    file("empty", "");
    file("dot", ".");
    file("parent", "..");
    file("above", "../model.safetensors");
    file("absolute", "/etc/model.safetensors");
    file("below", "sub/model.safetensors");
    file("backslash", "..\\model.safetensors");
    file("nul", std::string("a\0.safetensors", 14));
    file("suffix_only", ".safetensors");
    file("pickle", "pytorch_model.bin");
    file("missing", "model-00003-of-00002.safetensors");
    file("wrong_shard", second_shard());
    shards("index_unknown_tensor", [](ForgedShards& s) {
      s.index["weight_map"]["model.extra.weight"] = first_shard();
    });
    shards("index_tensor_in_two_files", [=](ForgedShards& s) {
      s.second.add(norm, "BF16", {64}, filler(128));
    });
    Files stray = dense_files(dense_shards());
    stray["model.safetensors"] = stray[first_shard()];
    add("index_beside_a_single_file", stray);
    Files missing = dense_files(dense_shards());
    missing.erase(second_shard());
    add("index_file_not_downloaded", missing);
    Files cut = dense_files(dense_shards());
    cut[second_shard()].resize(cut[second_shard()].size() - 64);
    add("index_file_truncated", cut);
  }

  void broken_configs() {
    config_text("empty", "");
    config_text("array", "[]");
    config_text("null", "null");
    config_text("truncated", R"({"model_type": "qwen3", "quantization_con)");
    config_text("duplicate_key", R"({"model_type":"qwen3","model_type":"qwen2"})");
    config_text("not_utf8", "{\"model_type\":\"\xff\xfe\"}");
    config_text("deep", std::string(5000, '[') + std::string(5000, ']'));
    config_text("quantization_list", R"({"quantization_config":[4]})");
    config_text("quantization_text", R"({"quantization_config":"gptq"})");
    config_text("quantization_number", R"({"quantization_config":4})");
    config_text("quantization_empty", R"({"quantization_config":{}})");
    config_text("without_quantization", forged_config().dump());
    for (const char* method :
         {"awq", "compressed-tensors", "bitsandbytes", "fp8", "mxfp4", "GGUF", "marlin", ""}) {
      setting("method_" + std::string(method), "quant_method", '"' + std::string(method) + '"');
    }
    setting("method_number", "quant_method", "4");
    without("bits");
    without("group_size");
    for (const char* bits :
         {"0",
          "1",
          "3",
          "5",
          "8",
          "9",
          "16",
          "-4",
          "4.0",
          "\"4\"",
          "[4]",
          "true",
          "4294967300",
          "18446744073709551612"}) {
      setting("bits_" + std::string(bits), "bits", bits);
    }
    for (const char* size :
         {"0",
          "-2",
          "16",
          "64",
          "128",
          "-1",
          "32.0",
          "\"32\"",
          "[]",
          "false",
          "4294967328",
          "9223372036854775807",
          "18446744073709551615"}) {
      setting("group_size_" + std::string(size), "group_size", size);
    }
    setting("sym_text", "sym", "\"true\"");
    setting("sym_number", "sym", "1");
    setting("zero_point_contradicts", "zero_point", "true");
    setting("desc_act_number", "desc_act", "0");
    setting("lm_head_text", "lm_head", "\"no\"");
    setting("format_marlin", "checkpoint_format", "\"marlin\"");
    setting("format_number", "checkpoint_format", "2");
    setting("format_contradicts", "format", "\"gptq_v2\"");
    setting("alias_contradicts", "wbits", "8");
    setting("pack_dtype_int16", "pack_dtype", "\"int16\"");
    setting("pack_dtype_number", "pack_dtype", "32");
    setting("rotation", "rotation", "\"hadamard\"");
    setting("adapter", "adapter", R"({"name":"lora","path":"x","rank":8})");
    setting("activation", "activation", R"({"bits":8})");
    const auto second = [this](const std::string& name, const std::string& text) {
      Files files = gptq_files(gptq_weights(), forged_quantization());
      files["quantize_config.json"] = text;
      add("quantize_config_" + name, std::move(files));
    };
    second("empty", "");
    second("array", "[]");
    second("other_bits", R"({"bits":8,"group_size":32})");
    second("other_group_size", R"({"bits":4,"group_size":64})");
    second("other_format", R"({"bits":4,"group_size":32,"checkpoint_format":"gptq_v2"})");
    second("other_sym", R"({"bits":4,"group_size":32,"sym":false})");
    second("bad_type", R"({"bits":"4"})");
  }

  void broken_rules() {
    const auto rule = [this](const std::string& name, const std::string& text) {
      setting("dynamic_" + name, "dynamic", text);
    };
    rule("list", "[]");
    rule("number", "1");
    rule("true", "true");
    rule("value_number", R"({"+:.*": 8})");
    rule("value_list", R"({"+:.*": []})");
    rule("bits_text", R"({"+:.*": {"bits":"8"}})");
    rule("bits_9", R"({"+:.*": {"bits":9}})");
    rule("bits_not_those_of_the_file", R"({"+:.*q_proj": {"bits":8}})");
    rule("group_not_that_of_the_file", R"({".*k_proj": {"group_size":64}})");
    rule("group_0", R"({".*k_proj": {"group_size":0}})");
    rule("adapter", R"({".*k_proj": {"adapter":{"path":"x"}}})");
    rule("excludes_a_quantized_module", R"({"-:.*up_proj": {}})");
    rule("open_bracket", R"({"+:.*[": {}})");
    rule("open_group", R"({"+:((": {}})");
    rule("bare_star", R"({"*": {}})");
    rule("single_byte_escape", R"({"\\C": {}})");
    rule("endless", R"({"+:(([a-z0-9._]+)+)+[^a-z0-9._]$": {}})");
    rule("recursive", R"({"+:(.?(?1)*)*$": {}})");
    rule("long", R"({"+:)" + std::string(20'000, 'a') + R"(": {}})");
    rule("huge_repeat", R"({"+:((((a{1,999}){1,999}){1,999}){1,999}){1,999}": {}})");
    rule("deep_groups", R"({"+:)" + std::string(5000, '(') + std::string(5000, ')') + R"(": {}})");
  }

  void broken_modules() {
    const std::string q = "model.layers.0.self_attn.q_proj";
    const auto tensor = [&, this](
                            const std::string& name,
                            const std::string& part,
                            const std::function<void(ForgedTensor&)>& change) {
      weights("module_" + name, [=](ForgedFile& f) { change(f.tensor(q + part)); });
    };
    tensor("qweight_transposed", ".qweight", [](ForgedTensor& t) { t.shape = "[64,8]"; });
    tensor("qweight_half_as_many_rows", ".qweight", [](ForgedTensor& t) { t.shape = "[4,128]"; });
    tensor("qweight_flat", ".qweight", [](ForgedTensor& t) { t.shape = "[512]"; });
    tensor("qweight_three_extents", ".qweight", [](ForgedTensor& t) { t.shape = "[1,8,64]"; });
    tensor("qweight_float", ".qweight", [](ForgedTensor& t) { t.dtype = "\"F32\""; });
    tensor("qweight_unsigned", ".qweight", [](ForgedTensor& t) { t.dtype = "\"U32\""; });
    tensor("qweight_renamed", ".qweight", [](ForgedTensor& t) { t.name += "x"; });
    tensor("qzeros_transposed", ".qzeros", [](ForgedTensor& t) { t.shape = "[8,2]"; });
    tensor("qzeros_float", ".qzeros", [](ForgedTensor& t) { t.dtype = "\"F32\""; });
    tensor("qzeros_renamed", ".qzeros", [](ForgedTensor& t) { t.name += "x"; });
    tensor("scales_transposed", ".scales", [](ForgedTensor& t) { t.shape = "[64,2]"; });
    tensor("scales_integer", ".scales", [](ForgedTensor& t) { t.dtype = "\"I16\""; });
    tensor("scales_renamed", ".scales", [](ForgedTensor& t) { t.name += "x"; });
    tensor("g_idx_matrix", ".g_idx", [](ForgedTensor& t) { t.shape = "[8,8]"; });
    tensor("g_idx_float", ".g_idx", [](ForgedTensor& t) { t.dtype = "\"F32\""; });
    // The value at `at` of a part of q_proj.
    const auto value = [&, this](
                           const std::string& name,
                           const std::string& part,
                           std::size_t at,
                           const std::string& bytes) {
      weights("module_" + name, [=](ForgedFile& f) {
        const std::string& offsets = f.tensor(q + part).offsets;
        f.data.replace(std::stoul(offsets.substr(1)) + at, bytes.size(), bytes);
      });
    };
    value("g_idx_too_large", ".g_idx", 8, std::string("\x02\0\0\0", 4));
    value("g_idx_negative", ".g_idx", 252, "\xff\xff\xff\xff");
    value("g_idx_huge", ".g_idx", 0, "\xff\xff\xff\x7f");
    value("scale_infinite", ".scales", 0, std::string("\x00\x7c", 2));
    value("scale_nan", ".scales", 254, std::string("\x01\xfc", 2));
    weights("module_stored_twice", [=](ForgedFile& f) {
      f.add(q + ".weight", "BF16", {64, 64}, filler(8192));
    });
    weights("module_without_any_weight", [=](ForgedFile& f) {
      for (const char* part : {".qweight", ".qzeros", ".scales", ".g_idx"}) {
        f.tensor(q + part).name += ".other";
      }
    });
    ForgedFile no_index = gptq_weights();
    no_index.tensor(q + ".g_idx").name = "other";
    Json act_order = forged_quantization();
    act_order["desc_act"] = true;
    add("module_act_order_without_g_idx", gptq_files(no_index, act_order));
    const auto dense = [&, this](
                           const std::string& name,
                           const std::string& tensor_name,
                           const std::function<void(ForgedTensor&)>& change) {
      shards("dense_" + name, [=](ForgedShards& s) {
        ForgedFile& f = tensor_name == "model.norm.weight" ? s.first : s.second;
        change(f.tensor(tensor_name));
      });
    };
    dense("weight_transposed", "model.layers.0.mlp.up_proj.weight", [](ForgedTensor& t) {
      t.shape = "[64,128]";
    });
    dense("weight_flat", q + ".weight", [](ForgedTensor& t) { t.shape = "[4096]"; });
    dense("weight_integer", q + ".weight", [](ForgedTensor& t) { t.dtype = "\"I16\""; });
    dense("weight_fp8", q + ".weight", [](ForgedTensor& t) {
      t.dtype = "\"F8_E4M3\"";
      t.shape = "[64,128]";
    });
    shards("dense_weight_fp8_right_shape", [=](ForgedShards& s) {
      s.second.add("model.layers.0.self_attn.q_proj.old", "F8_E4M3", {64, 64}, filler(4096));
      std::swap(s.second.tensor(q + ".old").name, s.second.tensor(q + ".weight").name);
      s.index["weight_map"].erase(q + ".weight");
    });
    dense("norm_too_short", "model.norm.weight", [](ForgedTensor& t) { t.shape = "[32,2]"; });
  }

  void broken_directories() {
    Files empty = gptq_files(gptq_weights(), forged_quantization());
    empty.erase("model.safetensors");
    add("directory_without_weights", empty);
    Files pickle = empty;
    pickle["pytorch_model.bin"] = "\x80\x02}q";
    add("directory_with_pickle_weights", pickle);
    Files gguf = empty;
    gguf["model-q4.gguf"] = "GGUF";
    add("directory_with_gguf", gguf);
    Files no_config = gptq_files(gptq_weights(), forged_quantization());
    no_config.erase("config.json");
    add("directory_without_config", no_config);
    add("directory_empty", {});
  }

  std::vector<ForgedCase> cases_;
};

inline std::vector<ForgedCase> forged_cases() {
  return Forge().cases();
}

inline void write_files(const std::filesystem::path& directory, const Files& files) {
  std::filesystem::create_directories(directory);
  for (const auto& [name, content] : files) {
    std::ofstream(directory / name, std::ios::binary) << content;
  }
}

}  // namespace quern::testing
