// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>

namespace quern {

// The grid of one linear, in the vocabulary of compressed-tensors. Values are scale * (code - zero)
// with codes 0 … 2^bits - 1.
struct QuantScheme {
  int bits = 4;
  bool symmetric = true;  // zero = 2^(bits-1) everywhere
  std::int64_t group_size = 128;  // columns that share a scale; 0: the whole row ("channel")

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

}  // namespace quern
