// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "format/checkpoint.h"
#include "format/output_format.h"
#include "format/safetensors_writer.h"
#include "format_fixture.h"
#include "scratch.h"

#include <gtest/gtest.h>

#include <stdexcept>
#include <string>
#include <vector>

// Checkpoints of one module, written through the table of formats and opened as anybody's.
namespace quern {
namespace {

using testing::random_linear;
using testing::ScratchDirectory;
using testing::test_kernels;

const std::string& module_name() {
  static const std::string kName = "model.layers.0.mlp.up_proj";
  return kName;
}

OutputModule module_of(const PackedLinear& packed, const std::string& name = module_name()) {
  OutputModule module;
  module.name = name;
  module.out_features = packed.out_features;
  module.in_features = packed.in_features;
  module.scheme = packed.scheme;
  module.scale_dtype = packed.scale_dtype;
  module.has_group_index = !packed.group_index.empty();
  return module;
}

std::unique_ptr<Checkpoint> write(
    const std::filesystem::path& directory,
    const std::string& format_name,
    const PackedLinear& packed,
    const OutputModule& module) {
  const OutputFormat& format = find_output_format(format_name);
  format.check(module);
  const auto declarations = format.declare(module);
  const auto tensors = format.pack(packed, module);
  SafetensorsWriter writer(directory, plan_safetensors(declarations));
  for (std::size_t i = 0; i < declarations.size(); ++i) {
    writer.write(declarations[i].name, tensors[i]);
  }
  writer.finish();
  const std::vector<OutputModule> modules = {module};
  Json config;
  config["quantization_config"] = format.config(packed.scheme, modules, Json::object());
  write_file(directory / "config.json", config.dump());
  return open_checkpoint(directory);
}

TEST(OutputFormats, EveryOneIsReadBackExactly) {
  for (const OutputFormat& format : output_formats()) {
    if (format.is_gguf) {
      continue;  // a file of its own kind; EndToEnd.GgufFilesAreWrittenAndRun
    }
    const ScratchDirectory scratch;
    const PackedLinear packed = random_linear({4, true, 32}, 64, 96, DType::kF16);
    const auto checkpoint =
        write(scratch.path(), std::string(format.name), packed, module_of(packed));
    EXPECT_EQ(checkpoint->format(), format.name);
    EXPECT_TRUE(checkpoint->is_quantized(module_name()));
    const StoredLinear stored = checkpoint->load_linear(module_name(), 64, 96);
    ASSERT_NE(stored.quantized, nullptr) << format.name;
    EXPECT_EQ(stored.activation, nullptr);
    EXPECT_EQ(stored.quantized->dequantize(test_kernels()), packed.dequantize(test_kernels()));
    EXPECT_THROW((void)checkpoint->load_linear(module_name(), 96, 64), ParseError);
  }
}

TEST(OutputFormats, IntegerInputsAreReadBack) {
  for (const char* name : {"compressed-tensors", "quern"}) {
    for (const bool dynamic : {true, false}) {
      const ScratchDirectory scratch;
      const PackedLinear packed = random_linear({8, true, 0}, 64, 96, DType::kF32);
      OutputModule module = module_of(packed);
      module.activation.bits = 8;
      module.activation.dynamic = dynamic;
      module.activation.scale = dynamic ? 0.0F : 0.125F;
      const auto checkpoint = write(scratch.path(), name, packed, module);
      const StoredLinear stored = checkpoint->load_linear(module_name(), 64, 96);
      ASSERT_NE(stored.activation, nullptr);
      EXPECT_EQ(*stored.activation, module.activation);
    }
  }
  OutputModule module = module_of(random_linear({8, true, 0}, 64, 96));
  module.activation.bits = 8;
  for (const char* name : {"gptq", "gptq_v2", "awq"}) {
    EXPECT_THROW(find_output_format(name).check(module), UnsupportedError) << name;
  }
}

TEST(OutputFormats, EmbeddingsAndHeads) {
  const PackedLinear packed = random_linear({4, true, 32}, 64, 96, DType::kBF16);
  OutputModule table = module_of(packed, "model.embed_tokens");
  table.is_embedding = true;
  for (const char* name : {"compressed-tensors", "quern"}) {
    const ScratchDirectory scratch;
    const auto checkpoint = write(scratch.path(), name, packed, table);
    EXPECT_TRUE(checkpoint->is_quantized("model.embed_tokens"));
    EXPECT_NE(checkpoint->load_linear("model.embed_tokens", 64, 96).quantized, nullptr);
  }
  OutputModule head = module_of(packed, "lm_head");
  head.is_head = true;
  for (const char* name : {"compressed-tensors", "quern"}) {
    const ScratchDirectory scratch;
    EXPECT_TRUE(write(scratch.path(), name, packed, head)->is_quantized("lm_head"));
  }
  for (const char* name : {"gptq", "gptq_v2", "awq"}) {
    EXPECT_THROW(find_output_format(name).check(table), UnsupportedError) << name;
  }
  const OutputFormat& compressed = find_output_format("compressed-tensors");
  const auto refused = [&](const QuantScheme& scheme) {
    OutputModule other = table;
    other.scheme = scheme;
    EXPECT_THROW(compressed.check(other), UnsupportedError);
  };
  refused({3, true, 32});
  refused({6, true, 32});
  refused({4, false, 32});
  const std::size_t tensors = compressed.declare(table).size();
  table.is_head = true;  // tied
  EXPECT_TRUE(compressed.unties_tables);
  EXPECT_EQ(compressed.declare(table).size(), 2 * tensors);
  EXPECT_EQ(compressed.pack(packed, table).size(), 2 * tensors);
  EXPECT_FALSE(find_output_format("quern").unties_tables);
  EXPECT_NO_THROW(find_output_format("quern").check(table));
}

TEST(QuernContainer, HoldsWhatNoOtherFormatDoes) {
  PackedLinear packed = random_linear({5, false, 24}, 40, 96, DType::kF32);
  for (std::int32_t i = 0; i < 96; ++i) {
    packed.group_index.push_back((i * 5) % 4);
  }
  const ScratchDirectory scratch;
  const auto checkpoint = write(scratch.path(), "quern", packed, module_of(packed));
  const StoredLinear stored = checkpoint->load_linear(module_name(), 40, 96);
  testing::expect_same(as_packed(*stored.quantized, "m"), packed);
}

TEST(QuernContainer, RefusesWhatWasNotDeclared) {
  const PackedLinear packed = random_linear({4, true, 32}, 64, 96);
  const OutputFormat& format = find_output_format("quern");
  OutputModule module = module_of(packed);
  module.scheme->bits = 9;
  EXPECT_THROW(format.check(module), UnsupportedError);
  module = module_of(packed);
  module.scale_dtype = DType::kF32;  // holds every scale
  EXPECT_NO_THROW((void)format.pack(packed, module));
  module.out_features = 65;
  EXPECT_THROW((void)format.pack(packed, module), std::logic_error);
  module = module_of(packed);
  module.kind = "lattice";
  EXPECT_THROW((void)format.declare(module), UnsupportedError);
}

}  // namespace
}  // namespace quern
