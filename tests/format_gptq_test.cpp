// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "format/gptq.h"
#include "format/safetensors.h"
#include "format_fixture.h"
#include "golden.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <string>
#include <vector>

namespace quern {
namespace {

using testing::golden_path;
using testing::test_kernels;
using testing::values_of;

struct Golden {
  std::string file;
  GptqVersion version = GptqVersion::kV1;
  QuantScheme scheme;
  std::int64_t out = 0;
  std::int64_t in = 0;
  bool act_order = false;
  bool zero_point_0 = false;
};

void PrintTo(const Golden& golden, std::ostream* stream) {
  *stream << golden.file;
}

std::vector<Golden> read_index() {
  std::vector<Golden> list;
  const Json index = read_json(golden_path("index.json"));
  for (const Json& entry : index["entries"]) {
    const JsonReader reader(entry, "index");
    Golden golden;
    golden.file = reader.get_string("file");
    golden.version = *gptq_version_from_name(reader.get_string("checkpoint_format"));
    golden.scheme.bits = static_cast<int>(reader.get_int("bits"));
    golden.scheme.group_size = std::max<std::int64_t>(0, reader.get_int("group_size"));
    golden.scheme.symmetric = reader.get_bool_or("sym", true);
    golden.out = reader.get_int("out_features");
    golden.in = reader.get_int("in_features");
    golden.act_order = reader.get_bool_or("desc_act", false);
    golden.zero_point_0 = reader.get_bool_or("has_zero_point_0", false);
    list.push_back(golden);
  }
  return list;
}

// Owns the mapping that the tensors point into.
struct GoldenFile {
  explicit GoldenFile(const Golden& golden)
      : store(SafetensorsStore::open(golden_path(golden.file))) {
    tensors = {get("qweight"), get("qzeros"), get("scales"), get("g_idx")};
  }
  [[nodiscard]] const TensorView& get(const std::string& name) const {
    return store->tensors().at(name);
  }
  std::unique_ptr<SafetensorsStore> store;
  GptqTensors tensors;
};

class GptqGolden : public ::testing::TestWithParam<Golden> {};

TEST_P(GptqGolden, ReadsCodesZerosAndValues) {
  const Golden& golden = GetParam();
  const GoldenFile file(golden);
  const PackedLinear packed =
      unpack_gptq(file.tensors, golden.scheme, golden.version, golden.out, golden.in, golden.file);

  const auto codes = values_of<std::uint8_t>(file.get("expect.codes"));
  std::vector<std::uint8_t> row(static_cast<std::size_t>(golden.in));
  for (std::int64_t o = 0; o < golden.out; ++o) {
    packed.get_row_codes(test_kernels(), o, row);
    ASSERT_TRUE(std::equal(row.begin(), row.end(), codes.begin() + o * golden.in)) << "row " << o;
  }

  const auto zeros = values_of<std::int16_t>(file.get("expect.zeros"));
  ASSERT_EQ(zeros.size(), static_cast<std::size_t>(golden.out * packed.groups()));
  for (std::int64_t o = 0; o < golden.out; ++o) {
    for (std::int64_t g = 0; g < packed.groups(); ++g) {
      ASSERT_EQ(packed.zero(o, g), zeros[static_cast<std::size_t>(o * packed.groups() + g)])
          << "row " << o << " group " << g;
    }
  }
  EXPECT_EQ(packed.scheme.symmetric, golden.scheme.symmetric);
  EXPECT_EQ(!packed.group_index.empty(), golden.act_order);

  // The expected weight is scale * (code - zero) in float; the reference's own result, rounded to
  // float16, may differ by half an ulp of float16.
  const auto expected = values_of<float>(file.get("expect.weight"));
  const std::vector<float> weight = packed.dequantize(test_kernels());
  for (std::size_t i = 0; i < weight.size(); ++i) {
    ASSERT_LE(std::abs(weight[i] - expected[i]), std::abs(expected[i]) * 0x1p-11F + 0x1p-25F) << i;
  }
}

TEST_P(GptqGolden, WritesTheSameBytesOrRefuses) {
  const Golden& golden = GetParam();
  const GoldenFile file(golden);
  const PackedLinear packed =
      unpack_gptq(file.tensors, golden.scheme, golden.version, golden.out, golden.in, golden.file);
  const bool unwritable = golden.act_order || golden.version == GptqVersion::kPlanar ||
                          (golden.version == GptqVersion::kV1 && golden.zero_point_0);
  if (unwritable) {
    EXPECT_THROW((void)pack_gptq(packed, golden.version, golden.file), UnsupportedError);
    return;
  }
  const GptqBytes bytes = pack_gptq(packed, golden.version, golden.file);
  const auto same = [&](const std::vector<std::byte>& written, const std::string& name) {
    const TensorView& view = file.get(name);
    return written.size() == view.bytes.size() &&
           std::equal(written.begin(), written.end(), view.bytes.begin());
  };
  EXPECT_TRUE(same(bytes.qweight, "qweight"));
  EXPECT_TRUE(same(bytes.qzeros, "qzeros"));
  EXPECT_TRUE(same(bytes.scales, "scales"));
  EXPECT_TRUE(same(bytes.g_idx, "g_idx"));
  const auto declared = gptq_declarations("m", golden.scheme, golden.out, golden.in);
  const std::vector<std::string> names = {"qweight", "qzeros", "scales", "g_idx"};
  for (std::size_t i = 0; i < names.size(); ++i) {
    EXPECT_EQ(declared[i].name, "m." + names[i]);
    EXPECT_EQ(declared[i].dtype, file.get(names[i]).dtype);
    EXPECT_EQ(declared[i].shape, file.get(names[i]).shape);
  }
}

std::string test_name(const ::testing::TestParamInfo<Golden>& info) {
  std::string name = info.param.file.substr(0, info.param.file.find('.'));
  return name;
}

INSTANTIATE_TEST_SUITE_P(Files, GptqGolden, ::testing::ValuesIn(read_index()), test_name);

// v1 holds no zero point of 0.
PackedLinear random_linear(const QuantScheme& scheme, std::int64_t out, std::int64_t in) {
  PackedLinear packed = testing::random_linear(scheme, out, in);
  for (std::uint8_t& zero : packed.zeros) {
    zero = std::max<std::uint8_t>(1, zero);
  }
  return packed;
}

PackedLinear through_file(const PackedLinear& packed, GptqVersion version) {
  const GptqBytes bytes = pack_gptq(packed, version, "m");
  const auto declared =
      gptq_declarations("m", packed.scheme, packed.out_features, packed.in_features);
  const GptqTensors tensors{
      {DType::kI32, declared[0].shape, bytes.qweight},
      {DType::kI32, declared[1].shape, bytes.qzeros},
      {DType::kF16, declared[2].shape, bytes.scales},
      TensorView{DType::kI32, declared[3].shape, bytes.g_idx}};
  return unpack_gptq(tensors, packed.scheme, version, packed.out_features, packed.in_features, "m");
}

TEST(Gptq, EveryWidthGroupSizeAndVersionSurvivesTheRoundTrip) {
  for (const int bits : {2, 3, 4, 8}) {
    for (const std::int64_t group : {0, 16, 128, 1024}) {
      for (const bool symmetric : {true, false}) {
        for (const GptqVersion version : {GptqVersion::kV1, GptqVersion::kV2}) {
          const PackedLinear packed = random_linear({bits, symmetric, group}, 96, 288);
          const PackedLinear back = through_file(packed, version);
          ASSERT_EQ(back.codes, packed.codes) << bits << ' ' << group;
          ASSERT_EQ(back.scales, packed.scales);
          ASSERT_EQ(back.zeros, packed.zeros);
          ASSERT_EQ(back.scheme, packed.scheme);
          ASSERT_TRUE(back.group_index.empty());
        }
      }
    }
  }
}

TEST(Gptq, RefusesWhatTheFormatCannotHold) {
  const auto refuses = [](const PackedLinear& packed, GptqVersion version) {
    try {
      (void)pack_gptq(packed, version, "m");
    } catch (const UnsupportedError& error) {
      return exit_code(error.kind()) == 3 && !error.hint().empty();
    }
    return false;
  };
  for (const int bits : {5, 6, 7}) {
    EXPECT_TRUE(refuses(random_linear({bits, true, 32}, 32, 64), GptqVersion::kV2)) << bits;
  }
  EXPECT_TRUE(refuses(random_linear({4, true, 32}, 32, 64), GptqVersion::kPlanar));
  EXPECT_TRUE(refuses(random_linear({4, true, 48}, 32, 96), GptqVersion::kV1));
  EXPECT_TRUE(refuses(random_linear({4, true, 32}, 32, 100), GptqVersion::kV1));
  EXPECT_TRUE(refuses(random_linear({4, true, 32}, 33, 64), GptqVersion::kV1));
  EXPECT_TRUE(refuses(random_linear({3, true, 32}, 40, 64), GptqVersion::kV1));
  PackedLinear zero_point = random_linear({4, false, 32}, 32, 64);
  zero_point.zeros[5] = 0;
  EXPECT_TRUE(refuses(zero_point, GptqVersion::kV1));
  EXPECT_EQ(through_file(zero_point, GptqVersion::kV2).zeros, zero_point.zeros);
  PackedLinear act_order = random_linear({4, true, 32}, 32, 64);
  act_order.group_index.assign(64, 1);
  EXPECT_TRUE(refuses(act_order, GptqVersion::kV2));
}

TEST(Gptq, ScalesOfOtherFloatTypesAreTaken) {
  const PackedLinear packed = random_linear({4, true, 32}, 32, 64);
  const GptqBytes bytes = pack_gptq(packed, GptqVersion::kV1, "m");
  const auto declared = gptq_declarations("m", packed.scheme, 32, 64);
  const std::vector<float> scales = to_float({DType::kF16, declared[2].shape, bytes.scales});
  const auto read = [&](const std::vector<float>& values) {
    const std::vector<std::byte> wide = from_float(values, DType::kF32);
    const GptqTensors tensors{
        {DType::kI32, declared[0].shape, bytes.qweight},
        {DType::kI32, declared[1].shape, bytes.qzeros},
        {DType::kF32, declared[2].shape, wide},
        std::nullopt};
    return unpack_gptq(tensors, packed.scheme, GptqVersion::kV1, 32, 64, "m");
  };
  EXPECT_EQ(read(scales).scales, packed.scales);
  std::vector<float> inexact = scales;
  inexact[3] = 0.1F;  // no half: kept as it is, and refused by a format of halves
  const PackedLinear wide = read(inexact);
  EXPECT_EQ(wide.scales[3 % 32 * 2 + 3 / 32], 0.1F);
  EXPECT_THROW((void)pack_gptq(wide, GptqVersion::kV1, "m"), UnsupportedError);
  inexact[3] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW((void)read(inexact), ParseError);
}

TEST(Gptq, TranslatesALargeMatrixInMilliseconds) {
  const PackedLinear packed = random_linear({4, true, 128}, 3072, 1024);
  const auto begin = std::chrono::steady_clock::now();
  const PackedLinear back = through_file(packed, GptqVersion::kV1);
  const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - begin;
  EXPECT_EQ(back.codes, packed.codes);
  RecordProperty("milliseconds", std::to_string(took.count()));
  EXPECT_LT(took.count(), 500.0);  // a few in practice; sanitizers and busy machines need room
}

}  // namespace
}  // namespace quern
