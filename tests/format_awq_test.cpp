// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "format/awq.h"
#include "format_fixture.h"
#include "golden.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

namespace quern {
namespace {

using testing::expect_same;
using testing::golden_path;
using testing::random_linear;
using testing::StoredTensors;
using testing::test_kernels;
using testing::values_of;

struct Golden {
  std::string file;
  QuantScheme scheme;
  std::int64_t out = 0;
  std::int64_t in = 0;
  bool symmetric_values = false;
};

void PrintTo(const Golden& golden, std::ostream* stream) {
  *stream << golden.file;
}

std::vector<Golden> read_index() {
  std::vector<Golden> list;
  const Json index = read_json(golden_path("awq_index.json"));
  for (const Json& entry : index["entries"]) {
    const JsonReader reader(entry, "index");
    Golden golden;
    golden.file = reader.get_string("file");
    Json config = entry;
    config.erase("format");  // of the index
    golden.scheme = read_awq_config(config, "index").scheme;
    golden.out = reader.get_int("out_features");
    golden.in = reader.get_int("in_features");
    golden.symmetric_values = reader.get_bool_or("symmetric_values", false);
    list.push_back(golden);
  }
  return list;
}

class AwqGolden : public ::testing::TestWithParam<Golden> {
 protected:
  AwqGolden() : store_(SafetensorsStore::open(golden_path(GetParam().file))) {}
  [[nodiscard]] const TensorView& get(const std::string& name) const {
    return store_->tensors().at(name);
  }
  [[nodiscard]] PackedLinear read() const {
    const Golden& golden = GetParam();
    return unpack_awq(
        {get("qweight"), get("qzeros"), get("scales")},
        golden.scheme,
        golden.out,
        golden.in,
        golden.file);
  }

 private:
  std::unique_ptr<SafetensorsStore> store_;
};

TEST_P(AwqGolden, ReadsCodesZerosAndValues) {
  const Golden& golden = GetParam();
  const PackedLinear packed = read();
  const auto codes = values_of<std::uint8_t>(get("expect.codes"));
  std::vector<std::uint8_t> row(static_cast<std::size_t>(golden.in));
  for (std::int64_t o = 0; o < golden.out; ++o) {
    packed.get_row_codes(test_kernels(), o, row);
    ASSERT_TRUE(std::equal(row.begin(), row.end(), codes.begin() + o * golden.in)) << "row " << o;
  }
  const auto zeros = values_of<std::int16_t>(get("expect.zeros"));
  for (std::int64_t o = 0; o < golden.out; ++o) {
    for (std::int64_t g = 0; g < packed.groups(); ++g) {
      ASSERT_EQ(packed.zero(o, g), zeros[static_cast<std::size_t>(o * packed.groups() + g)]);
    }
  }
  EXPECT_EQ(packed.scheme.symmetric, golden.symmetric_values);
  // The reference computes in float16: half an ulp of the product.
  const auto expected = values_of<float>(get("expect.weight"));
  const std::vector<float> weight = packed.dequantize(test_kernels());
  for (std::size_t i = 0; i < weight.size(); ++i) {
    ASSERT_LE(std::abs(weight[i] - expected[i]), std::abs(expected[i]) * 0x1p-11F + 0x1p-25F) << i;
  }
}

TEST_P(AwqGolden, WritesTheSameBytes) {
  const Golden& golden = GetParam();
  AwqBytes bytes = pack_awq(read(), golden.file);
  const StoredTensors stored(
      awq_declarations("m", golden.scheme, golden.out, golden.in),
      {bytes.qweight, bytes.qzeros, bytes.scales});
  for (const char* name : {"qweight", "qzeros", "scales"}) {
    EXPECT_TRUE(testing::same_bytes(stored.get(name), get(name))) << name;
  }
}

INSTANTIATE_TEST_SUITE_P(Files, AwqGolden, ::testing::ValuesIn(read_index()), [](const auto& each) {
  return each.param.file.substr(0, each.param.file.find('.'));
});

PackedLinear through_file(const PackedLinear& packed) {
  AwqBytes bytes = pack_awq(packed, "m");
  const StoredTensors stored(
      awq_declarations("m", packed.scheme, packed.out_features, packed.in_features),
      {bytes.qweight, bytes.qzeros, bytes.scales});
  return unpack_awq(
      {stored.get("qweight"), stored.get("qzeros"), stored.get("scales")},
      packed.scheme,
      packed.out_features,
      packed.in_features,
      "m");
}

TEST(Awq, EveryGroupSizeAndRemainderSurvivesTheRoundTrip) {
  for (const bool symmetric : {true, false}) {
    for (const std::int64_t in : {4, 8, 100, 128, 260, 384}) {
      for (const std::int64_t group : {std::int64_t{0}, std::int64_t{4}, in}) {
        SCOPED_TRACE(in);
        const PackedLinear packed = random_linear({4, symmetric, group}, 24, in);
        expect_same(through_file(packed), packed);
      }
    }
  }
}

TEST(Awq, RefusesWhatTheFormatCannotHold) {
  const auto refuses = [](const PackedLinear& packed) {
    try {
      (void)pack_awq(packed, "m");
    } catch (const UnsupportedError& error) {
      return exit_code(error.kind()) == 3 && !error.hint().empty();
    }
    return false;
  };
  EXPECT_TRUE(refuses(random_linear({8, true, 32}, 32, 64)));
  EXPECT_TRUE(refuses(random_linear({3, true, 32}, 32, 64)));
  EXPECT_TRUE(refuses(random_linear({4, true, 32}, 33, 64)));
  EXPECT_TRUE(refuses(random_linear({4, true, 48}, 32, 64)));
  EXPECT_TRUE(refuses(random_linear({4, true, 32}, 32, 64, DType::kF32)));
  PackedLinear act_order = random_linear({4, true, 32}, 32, 64);
  act_order.group_index.assign(64, 1);
  EXPECT_TRUE(refuses(act_order));
}

AwqConfig read(const std::string& text) {
  return read_awq_config(parse_json(text, "test"), "test");
}

TEST(AwqConfig, ReadsBothNamesOfAKey) {
  EXPECT_EQ(
      read(R"({"bits":4,"group_size":64,"zero_point":true})").scheme, (QuantScheme{4, false, 64}));
  EXPECT_EQ(
      read(R"({"w_bit":4,"q_group_size":-1,"zero_point":false,"version":"GEMM"})").scheme,
      (QuantScheme{4, true, 0}));
  EXPECT_EQ(read("{}").scheme, (QuantScheme{4, false, 128}));  // AutoAWQ's defaults
  EXPECT_EQ(
      read(R"({"modules_to_not_convert":["visual","lm_head"]})").unconverted,
      (std::vector<std::string>{"visual", "lm_head"}));
  EXPECT_TRUE(read(R"({"modules_to_not_convert":null})").unconverted.empty());
}

TEST(AwqConfig, RefusesOtherVersionsAndWidths) {
  for (const char* text :
       {R"({"version":"gemv"})",
        R"({"version":"GEMV_FAST"})",
        R"({"version":"marlin"})",
        R"({"format":"llm-awq"})",
        R"({"bits":8})",
        R"({"bits":3,"version":"gemm"})"}) {
    EXPECT_THROW((void)read(text), UnsupportedError) << text;
  }
  for (const char* text :
       {R"({"bits":"4"})",
        R"({"group_size":0})",
        R"({"group_size":-7})",
        R"({"group_size":9999999})",
        R"({"bits":4,"w_bit":8})",
        R"({"group_size":64,"q_group_size":128})",
        R"({"zero_point":1})",
        R"({"version":4})",
        R"({"modules_to_not_convert":"lm_head"})",
        R"({"modules_to_not_convert":[1]})"}) {
    EXPECT_THROW((void)read(text), ParseError) << text;
  }
}

std::vector<SchemedModule> layer(const ModuleScheme& scheme) {
  return {
      {"model.layers.0.self_attn.q_proj", scheme},
      {"model.layers.0.self_attn.k_proj", scheme},
      {"model.layers.0.self_attn.v_proj", scheme},
      {"model.layers.0.mlp.down_proj", scheme}};
}

TEST(AwqConfig, WritesOneSchemeAndTheModulesThatItSkips) {
  const QuantScheme scheme{4, true, 128};
  std::vector<SchemedModule> modules = layer({scheme});
  const Json all = awq_config_json(scheme, modules);
  EXPECT_EQ(all["quant_method"], "awq");
  EXPECT_EQ(all["version"], "gemm");
  EXPECT_EQ(all["bits"], 4);
  EXPECT_EQ(all["group_size"], 128);
  EXPECT_EQ(all["zero_point"], true);
  EXPECT_EQ(all["lm_head"], false);
  EXPECT_TRUE(all["modules_to_not_convert"].is_null());
  EXPECT_EQ(awq_config_json({4, false, 0}, layer({{4, false, 0}}))["group_size"], -1);

  modules[3].scheme.reset();
  const Json some = awq_config_json(scheme, modules);
  EXPECT_EQ(some["modules_to_not_convert"].dump(), R"(["model.layers.0.mlp.down_proj","lm_head"])");
  EXPECT_EQ(read_awq_config(some, "written").unconverted.size(), 2U);

  modules.push_back({"lm_head", ModuleScheme{scheme}});
  EXPECT_EQ(awq_config_json(scheme, modules)["lm_head"], true);
  EXPECT_EQ(awq_config_json(scheme, modules)["modules_to_not_convert"].size(), 1U);
}

TEST(AwqConfig, RefusesMixes) {
  const QuantScheme scheme{4, true, 128};
  std::vector<SchemedModule> modules = layer({scheme});
  modules[3].scheme = ModuleScheme{{4, true, 64}};
  EXPECT_THROW((void)awq_config_json(scheme, modules), UnsupportedError);
  modules = layer({scheme});
  modules[1].scheme.reset();  // k_proj alone
  EXPECT_THROW((void)awq_config_json(scheme, modules), UnsupportedError);
  // The router's name is a part of gate_proj's.
  modules = {
      {"model.layers.0.mlp.gate", {}},
      {"model.layers.0.mlp.gate_proj", ModuleScheme{scheme}},
      {"model.layers.0.mlp.up_proj", ModuleScheme{scheme}}};
  EXPECT_THROW((void)awq_config_json(scheme, modules), UnsupportedError);
}

}  // namespace
}  // namespace quern
