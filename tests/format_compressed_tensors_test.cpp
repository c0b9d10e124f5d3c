// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "format/compressed_tensors.h"
#include "format/compressed_tensors_config.h"
#include "format/packing.h"
#include "format_fixture.h"
#include "golden.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
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
  bool is_naive = false;
  CompressedForm form;
  std::int64_t out = 0;
  std::int64_t in = 0;
};

void PrintTo(const Golden& golden, std::ostream* stream) {
  *stream << golden.file;
}

CompressedForm form_of(const std::string& format, const Json& group) {
  const Json config = {{"format", format}, {"config_groups", {{"group_0", group}}}};
  return *read_compressed_config(config, "index").form_for("model.layers.0.mlp.up_proj");
}

std::vector<Golden> read_index() {
  std::vector<Golden> list;
  const Json index = read_json(golden_path("ct_index.json"));
  for (const Json& entry : index["entries"]) {
    const JsonReader reader(entry, "index");
    Golden golden;
    golden.file = reader.get_string("file");
    const std::string format = reader.get_string("compression_format");
    golden.is_naive = format == "naive-quantized";
    golden.form = form_of(format, entry["config_group"]);
    golden.out = reader.get_int("out_features");
    golden.in = reader.get_int("in_features");
    list.push_back(golden);
  }
  return list;
}

CompressedParts parts_of(const StoredTensors& stored) {
  const bool packed = stored.find("weight_packed") != nullptr;
  CompressedParts parts{
      stored.get(packed ? "weight_packed" : "weight"), stored.get("weight_scale"), {}, {}, {}};
  if (packed) {
    parts.shape = stored.get("weight_shape");
  }
  if (stored.find("weight_zero_point") != nullptr) {
    parts.zero_point = stored.get("weight_zero_point");
  }
  return parts;
}

class CompressedGolden : public ::testing::TestWithParam<Golden> {
 protected:
  CompressedGolden() : store_(SafetensorsStore::open(golden_path(GetParam().file))) {}
  [[nodiscard]] const TensorView* find(const std::string& name) const { return store_->find(name); }
  [[nodiscard]] PackedLinear read() const {
    const Golden& golden = GetParam();
    const bool packed = golden.form.layout == CompressedLayout::kPacked;
    CompressedParts parts{
        *find(packed ? "weight_packed" : "weight"), *find("weight_scale"), {}, {}, {}};
    if (const TensorView* zero = find("weight_zero_point")) {
      parts.zero_point = *zero;
    }
    if (const TensorView* shape = find("weight_shape")) {
      parts.shape = *shape;
    }
    return unpack_compressed(parts, golden.form, golden.out, golden.in, golden.file);
  }

 private:
  std::unique_ptr<SafetensorsStore> store_;
};

TEST_P(CompressedGolden, ReadsCodesAndValues) {
  const Golden& golden = GetParam();
  const PackedLinear packed = read();
  if (const TensorView* expected = find("expect.codes")) {
    const auto codes = values_of<std::int8_t>(*expected);
    std::vector<std::uint8_t> row(static_cast<std::size_t>(golden.in));
    for (std::int64_t o = 0; o < golden.out; ++o) {
      packed.get_row_codes(test_kernels(), o, row);
      for (std::int64_t i = 0; i < golden.in; ++i) {
        ASSERT_EQ(
            static_cast<int>(row[static_cast<std::size_t>(i)]) - packed.scheme.symmetric_zero(),
            codes[static_cast<std::size_t>(o * golden.in + i)]);
      }
    }
  }
  // Both sides evaluate scale * (code - zero) in float32, where one product is rounded once.
  const auto expected = values_of<float>(*find("expect.weight"));
  const std::vector<float> weight = packed.dequantize(test_kernels());
  ASSERT_EQ(weight.size(), expected.size());
  for (std::size_t i = 0; i < weight.size(); ++i) {
    ASSERT_EQ(weight[i], expected[i]) << i;
  }
  EXPECT_EQ(packed.scheme.symmetric, golden.form.scheme.symmetric);
}

TEST_P(CompressedGolden, WritesTheSameBytesOrRefuses) {
  Golden golden = GetParam();
  const PackedLinear packed = read();
  golden.form.scale_dtype = packed.scale_dtype;
  if (golden.is_naive) {
    // The same layout without integer inputs: written packed instead.
    EXPECT_THROW((void)pack_compressed(packed, golden.form, "m"), UnsupportedError);
    golden.form.layout = CompressedLayout::kPacked;
    const StoredTensors stored(
        compressed_declarations("m", golden.form, golden.out, golden.in),
        pack_compressed(packed, golden.form, "m"));
    expect_same(
        unpack_compressed(parts_of(stored), golden.form, golden.out, golden.in, "m"), packed);
    return;
  }
  const StoredTensors stored(
      compressed_declarations("m", golden.form, golden.out, golden.in),
      pack_compressed(packed, golden.form, golden.file));
  std::size_t compared = 0;
  for (const char* name :
       {"weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape"}) {
    ASSERT_EQ(stored.find(name) != nullptr, find(name) != nullptr) << name;
    if (find(name) != nullptr) {
      EXPECT_TRUE(testing::same_bytes(stored.get(name), *find(name))) << name;
      ++compared;
    }
  }
  EXPECT_EQ(compared, stored.declarations().size());
}

INSTANTIATE_TEST_SUITE_P(
    Files, CompressedGolden, ::testing::ValuesIn(read_index()), [](const auto& each) {
      std::string name = each.param.file.substr(0, each.param.file.find('.'));
      std::replace(name.begin(), name.end(), '-', '_');
      return name;
    });

CompressedForm packed_form(const QuantScheme& scheme, DType dtype = DType::kBF16) {
  CompressedForm form;
  form.scheme = scheme;
  form.scale_dtype = dtype;
  return form;
}

StoredTensors store(const PackedLinear& packed, const CompressedForm& form) {
  return {
      compressed_declarations("m", form, packed.out_features, packed.in_features),
      pack_compressed(packed, form, "m")};
}

PackedLinear through_file(const PackedLinear& packed, const CompressedForm& form) {
  const StoredTensors stored = store(packed, form);
  return unpack_compressed(parts_of(stored), form, packed.out_features, packed.in_features, "m");
}

TEST(CompressedTensors, EveryWidthGroupSizeAndScaleTypeSurvivesTheRoundTrip) {
  for (int bits = 2; bits <= 8; ++bits) {
    for (const std::int64_t group : {0, 32, 96, 288}) {
      for (const bool symmetric : {true, false}) {
        for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
          const QuantScheme scheme{bits, symmetric, group};
          // 50 outputs: zero points that do not fill their words.
          const PackedLinear packed = random_linear(scheme, 50, 288, dtype);
          expect_same(through_file(packed, packed_form(scheme, dtype)), packed);
        }
      }
    }
  }
}

TEST(CompressedTensors, IntegerFormsSurviveTheRoundTrip) {
  for (const QuantScheme scheme : {QuantScheme{8, true, 0}, {4, true, 0}, {4, true, 32}}) {
    CompressedForm form = packed_form(scheme, DType::kF32);
    form.layout = CompressedLayout::kInteger;
    form.activation.bits = 8;
    const PackedLinear packed = random_linear(scheme, 50, 96, DType::kF32);
    expect_same(through_file(packed, form), packed);
    EXPECT_EQ(store(packed, form).find("input_scale"), nullptr);
    form.activation.dynamic = false;
    form.activation.scale = 0.25F;
    const StoredTensors stored = store(packed, form);
    EXPECT_EQ(to_float(stored.get("input_scale")), std::vector<float>{0.25F});
    // Scales of a narrower type are widened.
    const PackedLinear narrow = random_linear(scheme, 50, 96, DType::kBF16);
    EXPECT_EQ(through_file(narrow, form).scales, narrow.scales);
  }
}

// The layout before May 2026: 32/b codes a word, none of which crosses it.
std::vector<std::uint32_t> old_layout(const std::vector<std::uint8_t>& codes, int bits) {
  const std::size_t in_word = 32U / static_cast<unsigned>(bits);
  std::vector<std::uint32_t> words((codes.size() + in_word - 1) / in_word);
  for (std::size_t i = 0; i < codes.size(); ++i) {
    words[i / in_word] |= std::uint32_t{codes[i]} << (static_cast<unsigned>(bits) * (i % in_word));
  }
  return words;
}

TEST(CompressedTensors, ReadsTheOlderLayoutOfWidthsThatDoNotDivide32) {
  for (const int bits : {3, 5, 6, 7}) {
    for (const bool symmetric : {true, false}) {
      const QuantScheme scheme{bits, symmetric, 32};
      const std::int64_t out = 64;
      const std::int64_t in = 128;
      const PackedLinear packed = random_linear(scheme, out, in);
      std::vector<std::uint32_t> words;
      std::vector<std::uint8_t> row(static_cast<std::size_t>(in));
      for (std::int64_t o = 0; o < out; ++o) {
        packed.get_row_codes(test_kernels(), o, row);
        const auto more = old_layout(row, bits);
        words.insert(words.end(), more.begin(), more.end());
      }
      const std::int64_t groups = packed.groups();
      std::vector<std::vector<std::uint32_t>> columns;
      for (std::int64_t g = 0; g < groups && !symmetric; ++g) {
        std::vector<std::uint8_t> column;
        for (std::int64_t o = 0; o < out; ++o) {
          column.push_back(static_cast<std::uint8_t>(packed.zero(o, g)));
        }
        columns.push_back(old_layout(column, bits));
      }
      std::vector<std::uint32_t> zeros;
      for (std::size_t w = 0; !symmetric && w < columns[0].size(); ++w) {
        for (const auto& column : columns) {
          zeros.push_back(column[w]);
        }
      }
      const StoredTensors current = store(packed, packed_form(scheme, DType::kF16));
      CompressedParts parts = parts_of(current);
      const std::vector<std::byte> weight_bytes = bytes_of(words);
      const std::vector<std::byte> zero_bytes = bytes_of(zeros);
      parts.weight = {
          DType::kI32, {out, static_cast<std::int64_t>(words.size()) / out}, weight_bytes};
      if (!symmetric) {
        parts.zero_point = TensorView{
            DType::kI32, {static_cast<std::int64_t>(zeros.size()) / groups, groups}, zero_bytes};
      }
      expect_same(unpack_compressed(parts, packed_form(scheme), out, in, "m"), packed);
    }
  }
}

TEST(CompressedTensors, ALayoutThatCannotBeToldIsRefused) {
  const auto read = [](std::int64_t in, std::int64_t words) {
    const std::vector<std::byte> codes(static_cast<std::size_t>(8 * words * 4));
    const std::vector<std::byte> scales(std::size_t{8} * 2);
    const std::vector<std::byte> shape = bytes_of(std::vector<std::int64_t>{8, in});
    const CompressedParts parts{
        {DType::kI32, {8, words}, codes},
        {DType::kF16, {8, 1}, scales},
        {},
        TensorView{DType::kI64, {2}, shape},
        {}};
    return unpack_compressed(parts, packed_form({3, true, 0}), 8, in, "m");
  };
  // 40 codes of 3 bits take four words in either layout, but not in the same places.
  EXPECT_THROW((void)read(40, 4), UnsupportedError);
  // Ten codes stand in one word alike, 32 take three words or four.
  EXPECT_NO_THROW((void)read(10, 1));
  EXPECT_NO_THROW((void)read(32, 3));
  EXPECT_NO_THROW((void)read(32, 4));
  EXPECT_THROW((void)read(32, 5), ParseError);
}

TEST(CompressedTensors, ReadsActOrderOfOlderFiles) {
  const QuantScheme scheme{4, false, 32};
  PackedLinear packed = random_linear(scheme, 16, 96, DType::kBF16);
  const StoredTensors stored = store(packed, packed_form(scheme));
  CompressedParts parts = parts_of(stored);
  std::vector<std::int32_t> index;
  for (std::int32_t i = 0; i < 96; ++i) {
    index.push_back((i * 7) % 3);
  }
  const std::vector<std::byte> bytes = bytes_of(index);
  parts.group_index = TensorView{DType::kI32, {96}, bytes};
  CompressedForm form = packed_form(scheme);
  form.act_order = true;
  packed.group_index = index;
  expect_same(unpack_compressed(parts, form, 16, 96, "m"), packed);
  EXPECT_THROW((void)pack_compressed(packed, form, "m"), UnsupportedError);

  // The library set it to -1 where it was not in use.
  const std::vector<std::byte> unused = bytes_of(std::vector<std::int32_t>(96, -1));
  parts.group_index = TensorView{DType::kI32, {96}, unused};
  EXPECT_TRUE(unpack_compressed(parts, form, 16, 96, "m").group_index.empty());
  const std::vector<std::byte> wrong = bytes_of(std::vector<std::int32_t>(96, 3));
  parts.group_index = TensorView{DType::kI32, {96}, wrong};
  EXPECT_THROW((void)unpack_compressed(parts, form, 16, 96, "m"), ParseError);
  parts.group_index.reset();
  EXPECT_THROW((void)unpack_compressed(parts, form, 16, 96, "m"), ParseError);
}

TEST(CompressedTensors, ReadsZeroPointsThatAreNotPackedOrNotNeeded) {
  const QuantScheme scheme{4, false, 32};
  const PackedLinear packed = random_linear(scheme, 16, 64, DType::kF16);
  const StoredTensors stored = store(packed, packed_form(scheme, DType::kF16));
  CompressedParts parts = parts_of(stored);
  std::vector<std::int8_t> plain;
  for (const std::uint8_t zero : packed.zeros) {
    plain.push_back(static_cast<std::int8_t>(zero - 8));
  }
  const std::vector<std::byte> bytes = bytes_of(plain);
  parts.zero_point = TensorView{DType::kI8, {16, 2}, bytes};
  expect_same(unpack_compressed(parts, packed_form(scheme), 16, 64, "m"), packed);

  const QuantScheme symmetric{4, true, 32};
  EXPECT_THROW((void)unpack_compressed(parts, packed_form(symmetric), 16, 64, "m"), ParseError);
  const std::vector<std::byte> nothing(32);
  parts.zero_point = TensorView{DType::kI8, {16, 2}, nothing};
  EXPECT_TRUE(unpack_compressed(parts, packed_form(symmetric), 16, 64, "m").scheme.symmetric);
}

TEST(CompressedTensors, ReadsOneScaleForTheWholeMatrix) {
  const std::vector<std::byte> weight = bytes_of(std::vector<std::int8_t>{-128, 0, 1, 127, 5, -5});
  const std::vector<std::byte> scale = bytes_of(std::vector<float>{0.5F});
  CompressedForm form;
  form.layout = CompressedLayout::kInteger;
  form.scheme = {8, true, 0};
  form.per_tensor = true;
  for (const Shape& shape : {Shape{1}, Shape{}}) {
    const PackedLinear packed = unpack_compressed(
        {{DType::kI8, {2, 3}, weight}, {DType::kF32, shape, scale}, {}, {}, {}}, form, 2, 3, "m");
    EXPECT_EQ(
        packed.dequantize(test_kernels()), (std::vector<float>{-64, 0, 0.5F, 63.5F, 2.5F, -2.5F}));
  }
}

TEST(CompressedTensors, RefusesTensorsThatDoNotFit) {
  const QuantScheme scheme{4, false, 32};
  const PackedLinear packed = random_linear(scheme, 16, 64, DType::kBF16);
  const StoredTensors stored = store(packed, packed_form(scheme));
  const CompressedParts good = parts_of(stored);
  const CompressedForm form = packed_form(scheme);
  const auto refused = [&](const CompressedParts& parts, std::int64_t out, std::int64_t in) {
    EXPECT_THROW((void)unpack_compressed(parts, form, out, in, "m"), ParseError);
  };
  EXPECT_NO_THROW((void)unpack_compressed(good, form, 16, 64, "m"));
  refused(good, 64, 16);
  refused(good, 0, 64);
  refused(good, 16, std::int64_t{1} << 40);
  CompressedParts parts = good;
  parts.zero_point.reset();
  refused(parts, 16, 64);
  parts = good;
  parts.shape.reset();
  refused(parts, 16, 64);
  parts = good;
  parts.weight.shape = {8, 16};
  refused(parts, 16, 64);
  parts = good;
  parts.weight.dtype = DType::kU32;
  refused(parts, 16, 64);
  parts = good;
  parts.weight.shape = {128};
  refused(parts, 16, 64);
  parts = good;
  parts.scale.dtype = DType::kI16;
  refused(parts, 16, 64);
  parts = good;
  parts.scale.shape = {2, 16};
  refused(parts, 16, 64);
  const std::vector<std::byte> nan =
      from_float(std::vector<float>(32, std::numeric_limits<float>::quiet_NaN()), DType::kBF16);
  parts = good;
  parts.scale.bytes = nan;
  refused(parts, 16, 64);

  // A value that 4 bits do not have.
  const std::vector<std::byte> wide = bytes_of(std::vector<std::int8_t>{1, 8});
  const std::vector<std::byte> one = bytes_of(std::vector<float>{1.0F});
  CompressedForm integer;
  integer.layout = CompressedLayout::kInteger;
  integer.scheme = {4, true, 0};
  EXPECT_THROW(
      (void)unpack_compressed(
          {{DType::kI8, {1, 2}, wide}, {DType::kF32, {1, 1}, one}, {}, {}, {}}, integer, 1, 2, "m"),
      ParseError);
}

TEST(CompressedTensors, RefusesToWriteWhatNoReaderTakes) {
  const auto refused = [](const CompressedForm& form, std::int64_t in) {
    EXPECT_THROW(check_compressed_holds(form, 64, in, "m"), UnsupportedError);
  };
  refused(packed_form({1, true, 0}), 64);
  refused(packed_form({9, true, 0}), 64);
  refused(packed_form({4, true, 48}), 64);
  refused(packed_form({3, true, 0}), 40);
  CompressedForm form = packed_form({8, true, 0});
  form.layout = CompressedLayout::kInteger;
  refused(form, 64);  // inputs in floats
  form.activation.bits = 8;
  EXPECT_NO_THROW(check_compressed_holds(form, 64, 64, "m"));
  form.scheme = {8, true, 32};
  refused(form, 64);
  form.scheme = {8, false, 0};
  refused(form, 64);
  form.scheme = {6, true, 0};
  refused(form, 64);
  // Scales that the type does not hold.
  const PackedLinear packed = random_linear({4, true, 32}, 16, 64, DType::kF16);
  EXPECT_THROW(
      (void)pack_compressed(packed, packed_form({4, true, 32}, DType::kBF16), "m"),
      UnsupportedError);
}

// --- configuration -----------------------------------------------------------------------------

CompressedConfig read(const std::string& text) {
  return read_compressed_config(parse_json(text, "test"), "test");
}

std::string one_group(const std::string& inside) {
  return R"({"format":"pack-quantized","config_groups":{"group_0":{"targets":["Linear"],)" +
         inside + "}}}";
}

CompressedForm weights(const std::string& arguments) {
  return *read(one_group(R"("weights":{)" + arguments + "}"))
              .form_for("model.layers.0.mlp.up_proj");
}

TEST(CompressedConfig, ReadsSchemes) {
  EXPECT_EQ(
      weights(R"("num_bits":4,"type":"int","symmetric":false,"strategy":"group","group_size":64)")
          .scheme,
      (QuantScheme{4, false, 64}));
  EXPECT_EQ(weights(R"("num_bits":3,"strategy":"channel")").scheme, (QuantScheme{3, true, 0}));
  EXPECT_EQ(weights(R"("num_bits":8,"group_size":-1)").scheme, (QuantScheme{8, true, 0}));
  EXPECT_EQ(weights(R"("num_bits":4,"group_size":32)").scheme, (QuantScheme{4, true, 32}));
  EXPECT_TRUE(weights(R"("num_bits":8)").per_tensor);
  EXPECT_TRUE(weights(R"("strategy":"TENSOR","type":"INT")").per_tensor);
  EXPECT_FALSE(weights(R"("strategy":"channel","actorder":"static")").act_order);
  EXPECT_FALSE(weights(R"("strategy":"channel","actorder":null)").act_order);
  EXPECT_TRUE(weights(R"("strategy":"channel","actorder":"group")").act_order);
}

TEST(CompressedConfig, ReadsInputs) {
  const auto inputs = [](const std::string& arguments) {
    return read(
               one_group(
                   R"("format":"int-quantized","weights":{"strategy":"channel"},"input_activations":{)" +
                   arguments + "}"))
        .form_for("x")
        ->activation;
  };
  const ActivationScheme dynamic = inputs(R"("num_bits":8,"strategy":"token","dynamic":true)");
  EXPECT_TRUE(dynamic.active());
  EXPECT_EQ(dynamic.bits, 8);
  EXPECT_TRUE(dynamic.dynamic);
  EXPECT_FALSE(inputs(R"("num_bits":8,"strategy":"tensor","dynamic":false)").dynamic);
  EXPECT_FALSE(weights(R"("strategy":"channel")").activation.active());
  for (const char* text :
       {R"("symmetric":false,"strategy":"token","dynamic":true)",
        R"("type":"float","strategy":"token","dynamic":true)",
        R"("strategy":"tensor","dynamic":true)",
        R"("strategy":"group","group_size":128,"dynamic":true)",
        R"("strategy":"channel","dynamic":false)"}) {
    EXPECT_THROW((void)inputs(text), UnsupportedError) << text;
  }
}

TEST(CompressedConfig, RefusesSettingsThatChangeTheComputation) {
  for (const std::string& text : {
           one_group(R"("weights":{"type":"float"})"),
           one_group(R"("weights":{"strategy":"block","block_structure":[128,128]})"),
           one_group(R"("weights":{"strategy":"tensor_group","group_size":16})"),
           one_group(R"("weights":{"dynamic":true})"),
           one_group(R"("weights":{"actorder":"random"})"),
           one_group(R"("weights":null)"),
           one_group(R"("weights":{},"output_activations":{"num_bits":8})"),
           one_group(R"("weights":{},"format":"float-quantized")"),
           one_group(R"("weights":{},"format":"nvfp4-pack-quantized")"),
           std::string(R"({"format":"float-quantized","config_groups":{}})"),
           std::string(R"({"format":"marlin-24","config_groups":{}})"),
           std::string(R"({"quantization_status":"initialized","config_groups":{}})"),
           std::string(R"({"kv_cache_scheme":{"num_bits":8},"config_groups":{}})"),
           std::string(R"({"sparsity_config":{"format":"sparse-24-bitmask"},"config_groups":{}})"),
           std::string(R"({"transform_config":{"config_groups":{"u":{}}},"config_groups":{}})"),
           std::string(R"({"config_groups":{"W4A16":["Linear"]}})"),
       }) {
    EXPECT_THROW((void)read(text), UnsupportedError) << text;
  }
  EXPECT_NO_THROW((void)read(
      R"({"sparsity_config":{},"transform_config":{},"version":"0.20.0","quantization_status":"frozen","config_groups":{}})"));
}

TEST(CompressedConfig, RefusesMalformedText) {
  for (
      const std::string& text : {
          std::string("{}"),
          std::string("[]"),
          std::string(R"({"config_groups":[]})"),
          std::string(R"({"format":4,"config_groups":{}})"),
          std::string(R"({"ignore":"lm_head","config_groups":{}})"),
          std::string(R"({"ignore":[3],"config_groups":{}})"),
          std::string(R"({"ignore":["re:("],"config_groups":{}})"),
          std::string(
              R"({"config_groups":{"g":{"targets":["Linear"],"weights":{"strategy":"channel"}}}})"),
          std::string(
              R"({"format":"mixed-precision","config_groups":{"g":{"targets":["Linear"],"weights":{"strategy":"channel"}}}})"),
          one_group(R"("weights":{"num_bits":16})"),
          one_group(R"("weights":{"num_bits":0})"),
          one_group(R"("weights":{"num_bits":"4"})"),
          one_group(R"("weights":{"symmetric":1})"),
          one_group(R"("weights":{"strategy":"group"})"),
          one_group(R"("weights":{"strategy":"group","group_size":0})"),
          one_group(R"("weights":{"strategy":"group","group_size":9999999})"),
          std::string(
              R"({"format":"pack-quantized","config_groups":{"g":{"weights":{"strategy":"channel"}}}})"),
          std::string(
              R"({"format":"pack-quantized","config_groups":{"g":{"targets":[1],"weights":{"strategy":"channel"}}}})"),
          std::string(
              R"({"format":"pack-quantized","config_groups":{"g":{"targets":["re:[a"],"weights":{"strategy":"channel"}}}})"),
          std::string(
              R"({"format":"pack-quantized","config_groups":{"g":{"targets":["a.b","a.b"],"weights":{"strategy":"channel"}}}})"),
      }) {
    EXPECT_THROW((void)read(text), ParseError) << text;
  }
}

TEST(CompressedConfig, MatchesInTheOrderOfVllm) {
  const CompressedConfig config = read(R"({"format":"pack-quantized",
    "ignore":["lm_head","re:.*\\.mlp\\.gate$","model.layers.0.mlp.down_proj","lm_head"],
    "config_groups":{
      "group_0":{"targets":["Linear"],"weights":{"num_bits":4,"strategy":"channel"}},
      "group_1":{"targets":["re:.*\\.layers\\.1\\..*"],"weights":{"num_bits":5,"strategy":"channel"}},
      "group_2":{"targets":["model.layers.1.mlp.up_proj","model.layers.2.mlp.up_proj"],
                 "weights":{"num_bits":6,"strategy":"channel"}},
      "group_3":{"targets":["re:.*qkv_proj$"],"weights":{"num_bits":7,"strategy":"channel"}},
      "group_4":{"targets":["Embedding"],"weights":{"num_bits":8,"strategy":"channel"}}}})");
  const auto bits = [&](const std::string& module) {
    const CompressedForm* form = config.form_for(module);
    return form == nullptr ? 0 : form->scheme.bits;
  };
  EXPECT_EQ(bits("model.layers.0.mlp.up_proj"), 4);  // the class, although it stands first
  EXPECT_EQ(bits("model.layers.1.mlp.up_proj"), 5);  // an expression that stands before the name
  EXPECT_EQ(bits("model.layers.2.mlp.up_proj"), 6);
  EXPECT_EQ(bits("model.layers.2.self_attn.k_proj"), 7);  // the merged name
  EXPECT_EQ(bits("model.layers.1.self_attn.k_proj"), 5);
  EXPECT_EQ(bits("model.embed_tokens"), 8);
  EXPECT_EQ(bits("lm_head"), 0);
  EXPECT_EQ(bits("model.layers.0.mlp.gate"), 0);
  EXPECT_EQ(bits("model.layers.0.mlp.down_proj"), 0);
  EXPECT_EQ(bits("model.layers.10.mlp.down_proj"), 4);
}

constexpr QuantScheme kFour{4, true, 128};
constexpr QuantScheme kEight{8, true, 0};

CompressedForm w8a8() {
  CompressedForm form = packed_form(kEight, DType::kF32);
  form.layout = CompressedLayout::kInteger;
  form.activation.bits = 8;
  return form;
}

std::vector<CompressedModule> mixed_model() {
  std::vector<CompressedModule> modules;
  for (int layer = 0; layer < 12; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    const CompressedForm attention = packed_form(layer % 3 == 0 ? kEight : kFour);
    for (const char* name : {"q_proj", "k_proj", "v_proj", "o_proj"}) {
      modules.push_back({prefix + "self_attn." + name, attention});
    }
    modules.push_back({prefix + "mlp.gate", {}});
    for (const char* name : {"gate_proj", "up_proj"}) {
      modules.push_back({prefix + "mlp." + name, packed_form(kFour)});
    }
    modules.push_back({prefix + "mlp.down_proj", layer == 1 ? w8a8() : packed_form(kFour)});
  }
  modules.push_back({"lm_head", packed_form(kFour), false});
  modules.push_back({"model.embed_tokens", packed_form(kEight), false});
  return modules;
}

bool same_form(const CompressedForm* a, const std::optional<CompressedForm>& b) {
  return (a == nullptr) == !b.has_value() &&
         (a == nullptr || (a->scheme == b->scheme && a->layout == b->layout &&
                           a->activation.bits == b->activation.bits &&
                           a->activation.dynamic == b->activation.dynamic));
}

TEST(CompressedConfig, WrittenGroupsGiveEveryModuleItsForm) {
  const std::vector<CompressedModule> modules = mixed_model();
  const Json json = compressed_config_json(modules);
  EXPECT_EQ(json["format"], "mixed-precision");
  const CompressedConfig config = read_compressed_config(json, "written");
  for (const CompressedModule& module : modules) {
    EXPECT_TRUE(same_form(config.form_for(module.name), module.form)) << module.name;
  }
  // The names of vLLM: another prefix, merged modules.
  const std::string prefix = "language_model.model.layers.";
  EXPECT_EQ(config.form_for(prefix + "3.self_attn.qkv_proj")->scheme, kEight);
  EXPECT_EQ(config.form_for(prefix + "4.self_attn.qkv_proj")->scheme, kFour);
  EXPECT_EQ(config.form_for(prefix + "1.mlp.gate_up_proj")->scheme, kFour);
  EXPECT_EQ(config.form_for(prefix + "1.mlp.down_proj")->activation.bits, 8);
  EXPECT_EQ(config.form_for(prefix + "1.mlp.gate"), nullptr);
  EXPECT_EQ(config.form_for("language_model.lm_head")->scheme, kFour);
}

// compressed-tensors itself sorts expressions by their text, vLLM takes them as they stand: no
// module may match two.
TEST(CompressedConfig, WrittenExpressionsExcludeEachOther) {
  const std::vector<CompressedModule> modules = mixed_model();
  const Json json = compressed_config_json(modules);
  for (const CompressedModule& module : modules) {
    int matches = 0;
    for (const Json& group : json["config_groups"]) {
      for (const Json& target : group["targets"]) {
        const auto text = target.get<std::string>();
        matches +=
            text.starts_with("re:") && ModulePattern(text.substr(3), "t").matches(module.name);
      }
    }
    EXPECT_LE(matches, 1) << module.name;
  }
}

TEST(CompressedConfig, WritesTheKeysThatReadersRequire) {
  const std::vector<CompressedModule> uniform = {
      {"model.layers.0.mlp.down_proj", packed_form(kFour)},
      {"model.layers.0.mlp.gate", {}},
      {"model.embed_tokens", {}, false},
      {"lm_head", {}, false}};
  const Json json = compressed_config_json(uniform);
  EXPECT_EQ(json["quant_method"], "compressed-tensors");
  EXPECT_EQ(json["format"], "pack-quantized");
  EXPECT_EQ(json["quantization_status"], "compressed");
  EXPECT_EQ(json["ignore"].dump(), R"(["re:.*\\.layers\\.0\\.mlp\\.gate$","lm_head"])");
  ASSERT_EQ(json["config_groups"].size(), 1U);
  const Json& group = json["config_groups"]["group_0"];
  EXPECT_EQ(group["targets"].dump(), R"(["Linear"])");
  EXPECT_EQ(group["weights"]["strategy"], "group");
  EXPECT_EQ(group["weights"]["group_size"], 128);
  EXPECT_TRUE(group["input_activations"].is_null());
  const std::vector<CompressedModule> integer = {{"model.layers.0.mlp.down_proj", w8a8()}};
  const Json inputs = compressed_config_json(integer);
  EXPECT_EQ(inputs["format"], "int-quantized");
  EXPECT_EQ(inputs["config_groups"]["group_0"]["input_activations"]["strategy"], "token");
  EXPECT_FALSE(inputs["config_groups"]["group_0"]["weights"].contains("group_size"));
}

TEST(CompressedConfig, RefusesMixesInOneMergedModule) {
  std::vector<CompressedModule> modules = {
      {"model.layers.0.self_attn.q_proj", packed_form(kFour)},
      {"model.layers.0.self_attn.k_proj", packed_form(kEight)}};
  EXPECT_THROW((void)compressed_config_json(modules), UnsupportedError);
  modules[1].form = packed_form(kFour);
  modules[1].form->activation.bits = 8;
  EXPECT_THROW((void)compressed_config_json(modules), UnsupportedError);
  modules[1].form.reset();
  EXPECT_THROW((void)compressed_config_json(modules), UnsupportedError);
}

}  // namespace
}  // namespace quern
