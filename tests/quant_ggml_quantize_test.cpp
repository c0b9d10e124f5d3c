// SPDX-License-Identifier: Apache-2.0
#include "base/cpu.h"
#include "format/safetensors.h"
#include "kernels/kernels.h"
#include "quant/ggml_quantize.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

namespace quern {
namespace {

constexpr std::array<GgmlType, 12> kTypes = {
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
constexpr std::size_t kColumns = 512;

const KernelTable& kernels(const std::string& isa = "") {
  static const KernelTable kBest = make_kernel_table(detect_cpu(), "");
  static const KernelTable kScalar = make_kernel_table(detect_cpu(), "scalar");
  return isa.empty() ? kBest : kScalar;
}

std::string name_of(GgmlType type) {
  return std::string(ggml_type_info(type).name);
}

std::vector<float> normal_row(std::uint32_t seed, float sigma = 0.02F) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0F, sigma);
  std::vector<float> row(kColumns);
  std::generate(row.begin(), row.end(), [&] { return normal(random); });
  return row;
}

// Values that the bytes of a row stand for.
std::vector<float> values_through_bytes(GgmlType type, const GgmlRow& row) {
  const GgmlTypeInfo& info = ggml_type_info(type);
  std::vector<std::byte> bytes(
      row.codes.size() / static_cast<std::size_t>(info.block) *
      static_cast<std::size_t>(info.bytes));
  pack_row(type, row, bytes);
  std::vector<float> values(row.codes.size());
  dequantize_row(type, bytes, values);
  return values;
}

// The rows of quantize_reference.safetensors and the errors of ggml on them.
class Reference {
 public:
  static constexpr std::size_t kRows = 4;  // of a kind

  Reference()
      : store_(SafetensorsStore::open(
            std::string(QUERN_TESTDATA) + "/golden/gguf/quantize_reference.safetensors")),
        x_(to_float(*store_->find("x"))),
        importance_(to_float(*store_->find("importance"))) {}

  [[nodiscard]] std::size_t kinds() const { return importance_.size() / kColumns; }
  [[nodiscard]] std::span<const float> row(std::size_t kind, std::size_t row) const {
    return std::span(x_).subspan((kind * kRows + row) * kColumns, kColumns);
  }
  [[nodiscard]] std::span<const float> importance(std::size_t kind) const {
    return std::span(importance_).subspan(kind * kColumns, kColumns);
  }
  [[nodiscard]] double error(GgmlType type, std::size_t kind, std::size_t measure) const {
    double value = 0;
    const TensorView& errors = *store_->find(name_of(type));
    std::memcpy(&value, errors.bytes.data() + (kind * 3 + measure) * sizeof value, sizeof value);
    return value;
  }

 private:
  std::unique_ptr<SafetensorsStore> store_;
  std::vector<float> x_;
  std::vector<float> importance_;
};

// The error of a kind under each measure of the golden file: ggml's weights, the importance, ones.
std::array<double, 3> errors_of(
    const Reference& reference, GgmlType type, std::size_t kind, const std::string& isa) {
  const GgmlLayout& layout = *ggml_layout(type);
  std::array<double, 3> errors{};
  for (std::size_t r = 0; r < Reference::kRows; ++r) {
    const auto x = reference.row(kind, r);
    const auto importance = reference.importance(kind);
    std::array<std::vector<float>, 3> weights = {
        std::vector<float>(kColumns),
        std::vector<float>(importance.begin(), importance.end()),
        std::vector<float>(kColumns, 1.0F)};
    ggml_weights(type, x, importance, weights[0]);
    for (std::size_t measure = 0; measure < 3; ++measure) {
      const GgmlRow row = quantize_row(kernels(isa), layout, x, weights[measure]);
      errors[measure] += weighted_error(layout, x, weights[measure], row);
    }
  }
  return errors;
}

TEST(GgmlQuantize, TheErrorIsAtMostThatOfGgml) {
  const Reference reference;
  for (const GgmlType type : kTypes) {
    for (std::size_t kind = 0; kind < reference.kinds(); ++kind) {
      const std::array<double, 3> errors = errors_of(reference, type, kind, "");
      for (std::size_t measure = 0; measure < 3; ++measure) {
        const double ratio = errors[measure] / reference.error(type, kind, measure);
        EXPECT_LE(ratio, 1.0) << name_of(type) << " kind " << kind << " measure " << measure;
        EXPECT_GE(ratio, 0.2) << "too good to be true: " << name_of(type) << " kind " << kind;
      }
    }
  }
}

// The search follows the same trials; sums in another order may turn it to a neighbour that is as
// good to some per mille.
TEST(GgmlQuantize, EveryLevelFindsAsGoodScales) {
  const Reference reference;
  for (const GgmlType type : kTypes) {
    for (std::size_t kind = 0; kind < reference.kinds(); kind += 3) {
      const auto best = errors_of(reference, type, kind, "");
      const auto scalar = errors_of(reference, type, kind, "scalar");
      for (std::size_t measure = 0; measure < 3; ++measure) {
        EXPECT_NEAR(scalar[measure], best[measure], 0.01 * best[measure]) << name_of(type);
      }
    }
  }
}

TEST(GgmlQuantize, WhatIsStoredIsWhatWasMeasured) {
  for (const GgmlType type : kTypes) {
    const GgmlLayout& layout = *ggml_layout(type);
    const std::vector<float> x = normal_row(3);
    const std::vector<float> w(kColumns, 2.0F);
    const GgmlRow row = quantize_row(kernels(), layout, x, w);
    double error = 0;
    const std::vector<float> values = values_through_bytes(type, row);
    for (std::size_t i = 0; i < kColumns; ++i) {
      error += 2.0 * std::pow(static_cast<double>(values[i]) - x[i], 2);
    }
    EXPECT_DOUBLE_EQ(weighted_error(layout, x, w, row), error) << name_of(type);
    EXPECT_GE(*std::min_element(row.codes.begin(), row.codes.end()), layout.lowest_code);
  }
}

TEST(GgmlQuantize, CodesAreTheNearestOnes) {
  for (const GgmlType type : kTypes) {
    const GgmlLayout& layout = *ggml_layout(type);
    const std::vector<float> x = normal_row(4);
    const GgmlRow row = quantize_row(kernels(), layout, x, std::vector<float>(kColumns, 1.0F));
    for (std::size_t i = 0; i < kColumns; ++i) {
      const std::size_t g = i / static_cast<std::size_t>(layout.group);
      const auto distance = [&](int code) {
        const float level = layout.values[static_cast<std::size_t>(code)];
        return std::abs(row.scale[g] * level - row.minimum[g] - x[i]);
      };
      for (int code = layout.lowest_code; code < layout.codes(); ++code) {
        // Two codes may be equally far to rounding.
        ASSERT_LE(distance(row.codes[i]), distance(code) * (1 + 1e-5F) + 1e-9F)
            << name_of(type) << ' ' << i;
      }
    }
  }
}

TEST(GgmlQuantize, ValuesOnAGridAreFoundExactly) {
  // A row that the type can hold without error, given as floats.
  for (const GgmlType type : kTypes) {
    const GgmlLayout& layout = *ggml_layout(type);
    std::mt19937 random(9);
    GgmlRow exact = GgmlRow::make(layout, kColumns);
    for (std::size_t b = 0; b < exact.d.size(); ++b) {
      exact.d[b] = 0x2000;  // 2^-7
      if (layout.has_minimum()) {
        exact.dmin[b] = layout.minimum_low < 0 ? 0xac00 : 0x2c00;  // -2^-4, 2^-4
      }
    }
    for (std::size_t g = 0; g < exact.sub_scale.size(); ++g) {
      if (layout.has_sub_scales()) {
        exact.sub_scale[g] = static_cast<std::int8_t>(layout.scale_high - g % 3);
        exact.sub_minimum[g] =
            static_cast<std::int8_t>(layout.has_minimum() ? layout.minimum_high - g % 2 : 0);
      }
    }
    for (std::size_t b = 0; b < exact.d.size(); ++b) {
      exact.apply_scales(layout, b);
    }
    for (std::uint8_t& code : exact.codes) {
      const int codes = layout.codes() - layout.lowest_code;
      code = static_cast<std::uint8_t>(
          layout.lowest_code + static_cast<int>(random() % static_cast<unsigned>(codes)));
    }
    // The ends of the range stand in every group: without them the best range is not the first.
    for (std::size_t i = 0; i < kColumns; i += static_cast<std::size_t>(layout.group)) {
      exact.codes[i] = static_cast<std::uint8_t>(layout.lowest_code);
      exact.codes[i + 1] = static_cast<std::uint8_t>(layout.codes() - 1);
    }
    const std::vector<float> x = values_through_bytes(type, exact);
    const std::vector<float> w(kColumns, 1.0F);
    const double error = weighted_error(layout, x, w, quantize_row(kernels(), layout, x, w));
    double square = 0;
    for (const float value : x) {
      square += static_cast<double>(value) * value;
    }
    // Rounding other rows of this kind leaves about 1 / codes.
    EXPECT_LE(std::sqrt(error / square), 0.05 / layout.codes()) << name_of(type);
  }
}

TEST(GgmlQuantize, RowsAtTheEdgesAreHeld) {
  const float largest = std::numeric_limits<float>::max();
  std::vector<std::vector<float>> rows = {
      std::vector<float>(kColumns, 0.0F),
      std::vector<float>(kColumns, -0.0F),
      std::vector<float>(kColumns, 0.3F),
      std::vector<float>(kColumns, -0.3F),
      std::vector<float>(kColumns, 1e-30F),
      normal_row(5, 1e-7F),
      normal_row(6, 1e4F),
      normal_row(7)};
  rows.back()[100] = 50.0F;  // one far outlier
  for (const GgmlType type : kTypes) {
    const GgmlLayout& layout = *ggml_layout(type);
    for (const std::vector<float>& x : rows) {
      const std::vector<float> w(kColumns, 1.0F);
      const GgmlRow row = quantize_row(kernels(), layout, x, w);
      double square = 0;
      for (const float value : x) {
        square += static_cast<double>(value) * value;
      }
      EXPECT_LE(weighted_error(layout, x, w, row), square) << name_of(type) << ' ' << x[0];
    }
    // Nothing sensible can come of these, but a row of finite numbers must.
    for (const float odd :
         {largest, -largest, std::numeric_limits<float>::infinity(), std::nanf("")}) {
      std::vector<float> x = normal_row(8);
      x[3] = odd;
      const GgmlRow row = quantize_row(kernels(), layout, x, std::vector<float>(kColumns, 1.0F));
      for (const float value : values_through_bytes(type, row)) {
        ASSERT_TRUE(std::isfinite(value)) << name_of(type) << ' ' << odd;
      }
    }
  }
}

TEST(GgmlQuantize, ColumnsWithoutWeightAreNotGivenUp) {
  for (const GgmlType type : kTypes) {
    const GgmlLayout& layout = *ggml_layout(type);
    const std::vector<float> x = normal_row(10);
    const std::vector<float> ones(kColumns, 1.0F);
    const GgmlRow plain = quantize_row(kernels(), layout, x, ones);
    // All weights 0: as if all were 1.
    const GgmlRow none = quantize_row(kernels(), layout, x, std::vector<float>(kColumns, 0.0F));
    EXPECT_EQ(none.codes, plain.codes) << name_of(type);
    // A group of weight 0 among others still follows its values.
    std::vector<float> w = ones;
    std::fill_n(w.begin(), 64, 0.0F);
    const GgmlRow row = quantize_row(kernels(), layout, x, w);
    std::vector<float> first(kColumns, 0.0F);
    std::fill_n(first.begin(), 64, 1.0F);
    EXPECT_LE(weighted_error(layout, x, first, row), 4 * weighted_error(layout, x, first, plain))
        << name_of(type);
  }
}

TEST(GgmlQuantize, MisuseIsALogicError) {
  const GgmlLayout& layout = *ggml_layout(GgmlType::kQ4K);
  const std::vector<float> x(kColumns);
  EXPECT_THROW(
      (void)quantize_row(kernels(), layout, std::span(x).first(100), std::span(x).first(100)),
      std::logic_error);
  EXPECT_THROW((void)quantize_row(kernels(), layout, x, std::span(x).first(256)), std::logic_error);
}

}  // namespace
}  // namespace quern
