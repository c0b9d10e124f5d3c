// SPDX-License-Identifier: Apache-2.0
#include "format/gguf_file.h"
#include "format/safetensors.h"
#include "quant/ggml_types.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace quern {
namespace {

constexpr std::array<GgmlType, 12> kPacked = {
    GgmlType::kQ40,
    GgmlType::kQ41,
    GgmlType::kQ50,
    GgmlType::kQ51,
    GgmlType::kQ80,
    GgmlType::kQ2K,
    GgmlType::kQ3K,
    GgmlType::kQ4K,
    GgmlType::kQ5K,
    GgmlType::kQ6K,
    GgmlType::kIQ4NL,
    GgmlType::kIQ4XS};

std::string golden(const std::string& name) {
  return std::string(QUERN_TESTDATA) + "/golden/gguf/" + name;
}

// Equal to the bit, signs of zeros and NaN included.
bool same_bits(std::span<const float> a, std::span<const float> b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size_bytes()) == 0;
}

std::vector<std::byte> random_bytes(std::size_t count, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<std::byte> bytes(count);
  std::generate(bytes.begin(), bytes.end(), [&] { return static_cast<std::byte>(random()); });
  return bytes;
}

std::vector<float> values_of_row(const GgmlLayout& layout, const GgmlRow& row) {
  std::vector<float> values(row.codes.size());
  for (std::size_t e = 0; e < values.size(); ++e) {
    const std::size_t g = e / static_cast<std::size_t>(layout.group);
    values[e] = row.scale[g] * layout.values[row.codes[e]] - row.minimum[g];
  }
  return values;
}

TEST(GgmlTypes, DequantizedValuesAreThoseOfTheReferenceToTheBit) {
  const auto file = GgufFile::open(golden("ggml_types.gguf"));
  const auto expected = SafetensorsStore::open(golden("ggml_types.expect.safetensors"));
  std::size_t checked = 0;
  for (const GgufTensor& tensor : file->tensors()) {
    if (!can_dequantize(tensor.type)) {
      continue;
    }
    const std::string name = tensor.name.substr(0, tensor.name.size() - 7);  // ".weight"
    const TensorView* view = expected->find(name + ".dequant");
    ASSERT_NE(view, nullptr) << name;
    std::vector<float> found(static_cast<std::size_t>(view->count()));
    dequantize_row(tensor.type, tensor.bytes, found);
    EXPECT_TRUE(same_bits(found, to_float(*view))) << name;
    ++checked;
  }
  EXPECT_EQ(checked, 25U);  // 12 types without and with importance, MXFP4
}

TEST(GgmlTypes, ARowTakenApartHasTheValuesOfTheRow) {
  const auto file = GgufFile::open(golden("ggml_types.gguf"));
  for (const GgufTensor& tensor : file->tensors()) {
    const GgmlLayout* layout = ggml_layout(tensor.type);
    if (layout == nullptr) {
      continue;
    }
    const std::size_t row_bytes = tensor.bytes.size() / static_cast<std::size_t>(tensor.shape[0]);
    const auto bytes = tensor.bytes.subspan(row_bytes, row_bytes);  // the second row
    std::vector<float> whole(static_cast<std::size_t>(tensor.shape[1]));
    dequantize_row(tensor.type, bytes, whole);
    EXPECT_TRUE(same_bits(values_of_row(*layout, unpack_row(tensor.type, bytes)), whole))
        << tensor.name;
  }
}

TEST(GgmlTypes, AnyRowIsPackedAgainToTheSameBytes) {
  for (const GgmlType type : kPacked) {
    const GgmlTypeInfo& info = ggml_type_info(type);
    const GgmlLayout& layout = *ggml_layout(type);
    EXPECT_EQ(layout.block, info.block) << info.name;
    for (std::uint32_t seed = 0; seed < 50; ++seed) {
      const auto bytes = random_bytes(static_cast<std::size_t>(info.bytes) * 3, seed);
      const GgmlRow row = unpack_row(type, bytes);
      for (std::size_t g = 0; g < row.sub_scale.size(); ++g) {
        ASSERT_GE(row.sub_scale[g], layout.scale_low) << info.name;
        ASSERT_LE(row.sub_scale[g], layout.scale_high) << info.name;
        ASSERT_GE(row.sub_minimum[g], layout.minimum_low) << info.name;
        ASSERT_LE(row.sub_minimum[g], layout.minimum_high) << info.name;
      }
      ASSERT_LT(*std::max_element(row.codes.begin(), row.codes.end()), layout.codes());
      std::vector<std::byte> again(bytes.size());
      pack_row(type, row, again);
      ASSERT_EQ(again, bytes) << info.name << " seed " << seed;
    }
  }
}

TEST(GgmlTypes, EveryStoredNumberReachesItsPlace) {
  // Each code, sub-scale and sub-minimum on its own: packing and unpacking an otherwise empty
  // block.
  for (const GgmlType type : kPacked) {
    const GgmlLayout& layout = *ggml_layout(type);
    const auto n = static_cast<std::size_t>(layout.block);
    std::vector<std::byte> bytes(static_cast<std::size_t>(ggml_type_info(type).bytes));
    for (std::size_t e = 0; e < n; ++e) {
      GgmlRow row = GgmlRow::make(layout, n);
      row.codes[e] = static_cast<std::uint8_t>(layout.codes() - 1);
      pack_row(type, row, bytes);
      ASSERT_EQ(unpack_row(type, bytes).codes, row.codes) << ggml_type_info(type).name << ' ' << e;
    }
    for (std::size_t g = 0; g < static_cast<std::size_t>(layout.groups()); ++g) {
      for (const int value : {layout.scale_low, layout.scale_high, layout.scale_high / 2}) {
        GgmlRow row = GgmlRow::make(layout, n);
        row.sub_scale[g] = static_cast<std::int8_t>(std::max(value, layout.scale_low));
        row.sub_minimum[g] = static_cast<std::int8_t>(layout.minimum_high);
        pack_row(type, row, bytes);
        const GgmlRow again = unpack_row(type, bytes);
        ASSERT_EQ(again.sub_scale, row.sub_scale) << ggml_type_info(type).name << ' ' << g;
        ASSERT_EQ(again.sub_minimum, row.sub_minimum) << ggml_type_info(type).name << ' ' << g;
      }
    }
  }
}

TEST(GgmlTypes, TheTableAgreesWithItself) {
  std::size_t types = 0;
  for (std::uint32_t number = 0; number < 256; ++number) {
    const GgmlTypeInfo* info = find_ggml_type(number);
    if (info == nullptr) {
      continue;
    }
    ++types;
    EXPECT_EQ(static_cast<std::uint32_t>(info->type), number);
    EXPECT_EQ(ggml_type_from_name(info->name), info->type);
    const GgmlLayout* layout = ggml_layout(info->type);
    if (layout != nullptr) {
      EXPECT_TRUE(can_dequantize(info->type));
      EXPECT_TRUE(std::is_sorted(layout->values.begin(), layout->values.end()));
      EXPECT_EQ(
          layout->linear,
          layout->values.back() - layout->values.front() + 1 ==
              static_cast<float>(layout->codes()));
    }
  }
  EXPECT_EQ(types, 34U);
  EXPECT_FALSE(ggml_type_from_name("Q4_k").has_value());
  EXPECT_FALSE(can_dequantize(GgmlType::kIQ2XS));
}

TEST(GgmlTypes, SizesThatDisagreeAreALogicError) {
  std::vector<std::byte> bytes(144);
  std::vector<float> values(256);
  EXPECT_NO_THROW(dequantize_row(GgmlType::kQ4K, bytes, values));
  EXPECT_THROW(dequantize_row(GgmlType::kQ5K, bytes, values), std::logic_error);
  EXPECT_THROW(
      dequantize_row(GgmlType::kQ4K, bytes, std::span(values).first(255)), std::logic_error);
  EXPECT_THROW(dequantize_row(GgmlType::kIQ2XS, bytes, values), std::logic_error);
  EXPECT_THROW((void)unpack_row(GgmlType::kQ4K, std::span(bytes).first(143)), std::logic_error);
  EXPECT_THROW((void)unpack_row(GgmlType::kF16, bytes), std::logic_error);
  EXPECT_THROW((void)GgmlRow::make(*ggml_layout(GgmlType::kQ4K), 128), std::logic_error);
  const GgmlRow row = GgmlRow::make(*ggml_layout(GgmlType::kQ4K), 512);
  EXPECT_THROW(pack_row(GgmlType::kQ4K, row, bytes), std::logic_error);
}

}  // namespace
}  // namespace quern
