// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/file.h"
#include "base/json.h"
#include "forged.h"
#include "format/output_format.h"
#include "format/safetensors_writer.h"
#include "format_fixture.h"

#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace quern::testing {

// A tiny Qwen3 whose linears are random matrices on a grid, written in any format.
struct PackedModel {
  std::map<std::string, PackedLinear> linears;  // by module; others keep floats
  ActivationScheme activation;  // of all of them
  Json config = forged_config();

  // All seven linears of the only block on one grid.
  static PackedModel uniform(const QuantScheme& scheme, DType scale_dtype = DType::kF16) {
    PackedModel model;
    unsigned seed = 1;
    for (const ForgedLinear& linear : forged_linears()) {
      model.linears.emplace(
          linear.name, random_linear(scheme, linear.out, linear.in, scale_dtype, seed++));
    }
    return model;
  }

  [[nodiscard]] std::vector<OutputModule> modules() const {
    std::vector<OutputModule> modules;
    const auto add = [&](const std::string& name, std::int64_t out, std::int64_t in) {
      OutputModule module;
      module.name = name;
      module.out_features = out;
      module.in_features = in;
      module.is_embedding = name.ends_with("embed_tokens");
      module.is_head = name == "lm_head";
      if (const auto found = linears.find(name); found != linears.end()) {
        module.scheme = found->second.scheme;
        module.scale_dtype = found->second.scale_dtype;
        module.has_group_index = !found->second.group_index.empty();
        module.activation = activation;
      }
      modules.push_back(module);
    };
    for (const ForgedLinear& linear : forged_linears()) {
      add(linear.name, linear.out, linear.in);
    }
    for (const char* name : {"model.embed_tokens", "lm_head"}) {
      if (linears.contains(name)) {
        add(name, 64, 64);
      }
    }
    return modules;
  }

  void write(const std::filesystem::path& directory, const std::string& format_name) const {
    std::filesystem::create_directories(directory);
    const OutputFormat& format = find_output_format(format_name);
    std::vector<TensorDeclaration> declarations;
    std::vector<std::vector<std::byte>> contents;
    const auto add = [&](const TensorDeclaration& declaration, std::vector<std::byte> bytes) {
      declarations.push_back(declaration);
      contents.push_back(std::move(bytes));
    };
    const auto add_floats = [&](const std::string& name, const Shape& shape) {
      const TensorDeclaration declaration{name, DType::kBF16, shape};
      std::size_t count = 2;
      for (const std::int64_t extent : shape) {
        count *= static_cast<std::size_t>(extent);
      }
      const std::string bytes = filler(count);
      const auto view = std::as_bytes(std::span(bytes));
      add(declaration, {view.begin(), view.end()});
    };
    for (const ForgedPlain& plain : forged_plain_tensors()) {
      if (!linears.contains(plain.name.substr(0, plain.name.rfind('.')))) {
        add_floats(plain.name, plain.shape);
      }
    }
    Json full = config;
    QuantScheme common;
    for (const OutputModule& module : modules()) {
      if (!module.scheme) {
        add_floats(module.name + ".weight", {module.out_features, module.in_features});
        continue;
      }
      common = *module.scheme;
      const auto declared = format.declare(module);
      auto tensors = format.pack(linears.at(module.name), module);
      for (std::size_t i = 0; i < declared.size(); ++i) {
        add(declared[i], std::move(tensors[i]));
      }
    }
    full["quantization_config"] = format.config(common, modules(), Json::object());
    SafetensorsWriter writer(directory, plan_safetensors(declarations));
    for (std::size_t i = 0; i < declarations.size(); ++i) {
      writer.write(declarations[i].name, contents[i]);
    }
    writer.finish();
    write_file(directory / "config.json", full.dump(1));
  }
};

}  // namespace quern::testing
