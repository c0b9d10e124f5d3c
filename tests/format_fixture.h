// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "format/safetensors_writer.h"
#include "golden.h"
#include "quant/packed_linear.h"
#include "tensor/tensor.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <random>
#include <string>
#include <vector>

namespace quern::testing {

// Any codes, zero points and scales that `dtype` holds exactly.
inline PackedLinear random_linear(
    const QuantScheme& scheme,
    std::int64_t out,
    std::int64_t in,
    DType dtype = DType::kF16,
    unsigned seed = 7) {
  std::mt19937 random(seed);  // fixed: the bytes of a failure must be found again
  PackedLinear packed = PackedLinear::make(scheme, out, in, dtype);
  std::vector<std::uint8_t> row(static_cast<std::size_t>(in));
  const auto mask = static_cast<unsigned>(scheme.max_code());
  for (std::int64_t o = 0; o < out; ++o) {
    std::generate(
        row.begin(), row.end(), [&] { return static_cast<std::uint8_t>(random() & mask); });
    packed.set_row_codes(o, row);
  }
  for (float& scale : packed.scales) {
    scale = 0.001F + static_cast<float>(random() % 1000U) * 1e-4F;
  }
  const Shape shape = {static_cast<std::int64_t>(packed.scales.size())};
  const std::vector<std::byte> stored = from_float(packed.scales, dtype);
  packed.scales = to_float({dtype, shape, stored});
  for (std::uint8_t& zero : packed.zeros) {
    zero = static_cast<std::uint8_t>(random() & mask);
  }
  return packed;
}

inline void expect_same(const PackedLinear& a, const PackedLinear& b) {
  EXPECT_EQ(a.scheme, b.scheme);
  EXPECT_EQ(a.codes, b.codes);
  EXPECT_EQ(a.scales, b.scales);
  EXPECT_EQ(a.zeros, b.zeros);
  EXPECT_EQ(a.group_index, b.group_index);
  EXPECT_EQ(a.scale_dtype, b.scale_dtype);
}

// Tensors as a file holds them, by the end of their names.
class StoredTensors {
 public:
  StoredTensors(
      std::vector<TensorDeclaration> declarations, std::vector<std::vector<std::byte>> contents)
      : declarations_(std::move(declarations)), contents_(std::move(contents)) {
    EXPECT_EQ(declarations_.size(), contents_.size());
    for (std::size_t i = 0; i < declarations_.size(); ++i) {
      EXPECT_EQ(
          static_cast<std::size_t>(view(i).count()) * dtype_size(declarations_[i].dtype),
          contents_[i].size())
          << declarations_[i].name;
    }
  }
  [[nodiscard]] const TensorDeclaration* find(const std::string& suffix) const {
    for (const TensorDeclaration& declaration : declarations_) {
      if (declaration.name.ends_with("." + suffix)) {
        return &declaration;
      }
    }
    return nullptr;
  }
  [[nodiscard]] TensorView get(const std::string& suffix) const {
    return view(static_cast<std::size_t>(find(suffix) - declarations_.data()));
  }
  [[nodiscard]] const std::vector<TensorDeclaration>& declarations() const { return declarations_; }

 private:
  [[nodiscard]] TensorView view(std::size_t i) const {
    return {declarations_[i].dtype, declarations_[i].shape, contents_[i]};
  }
  std::vector<TensorDeclaration> declarations_;
  std::vector<std::vector<std::byte>> contents_;
};

inline bool same_bytes(const TensorView& a, const TensorView& b) {
  return a.dtype == b.dtype && a.shape == b.shape &&
         std::equal(a.bytes.begin(), a.bytes.end(), b.bytes.begin(), b.bytes.end());
}

}  // namespace quern::testing
