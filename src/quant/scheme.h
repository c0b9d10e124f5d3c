// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "quant/ggml_types.h"
#include "tensor/tensor.h"

#include <cstdint>
#include <optional>
#include <string>

namespace quern {

// The grid of one linear, in the vocabulary of compressed-tensors. Values are scale * (code - zero)
// with codes 0 … 2^bits - 1.
struct QuantScheme {
  int bits = 4;
  bool symmetric = true;  // zero = 2^(bits-1) everywhere
  std::int64_t group_size = 128;  // columns that share a scale; 0: the whole row ("channel")
  // A ggml block type instead of a grid of free scales; the fields above then follow from it.
  std::optional<GgmlType> ggml = {};

  [[nodiscard]] std::int64_t group_width(std::int64_t in_features) const noexcept {
    return group_size == 0 ? in_features : group_size;
  }
  // Groups in a row; the last one may be shorter.
  [[nodiscard]] std::int64_t groups(std::int64_t in_features) const noexcept {
    return (in_features + group_width(in_features) - 1) / group_width(in_features);
  }
  [[nodiscard]] int max_code() const noexcept { return (1 << bits) - 1; }
  [[nodiscard]] int symmetric_zero() const noexcept { return 1 << (bits - 1); }

  friend bool operator==(const QuantScheme&, const QuantScheme&) = default;
};

// The scheme of a type of ggml_layout().
[[nodiscard]] QuantScheme ggml_scheme(GgmlType type);

// What a file format does to the numbers of a grid. Codes are always chosen with scales and zero
// points as they will be stored.
struct StorageRules {
  DType scale_dtype = DType::kF16;  // F16, BF16 or F32
  bool minimum_zero_one = false;  // zero point 0 cannot be stored (GPTQ v1)

  friend bool operator==(const StorageRules&, const StorageRules&) = default;
};

// Integer activations of a linear: W8A8, W4A8 (methods.md 5). Symmetric; a row of inputs is rounded
// to scale * (-2^(bits-1) … 2^(bits-1)-1) before the product.
struct ActivationScheme {
  int bits = 16;  // 16: inputs stay floats
  bool dynamic = true;  // scale of each token = max |x| / (2^(bits-1)-1), at run time
  float scale = 0;  // of all tokens, when not dynamic

  [[nodiscard]] bool active() const noexcept { return bits < 16; }

  friend bool operator==(const ActivationScheme&, const ActivationScheme&) = default;
};

}  // namespace quern
