// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "format/safetensors_writer.h"
#include "tensor/tensor.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace quern::fuzz {

// Deals the input out to tensors; behind its end there are zeros.
class Dealer {
 public:
  explicit Dealer(std::span<const std::byte> input) : input_(input) {}
  std::uint8_t byte() {
    const std::vector<std::byte> one = bytes(1);
    return static_cast<std::uint8_t>(one[0]);
  }
  std::vector<std::byte> bytes(std::size_t count) {
    std::vector<std::byte> out(count);
    const std::size_t taken = std::min(count, input_.size());
    std::copy_n(input_.begin(), taken, out.begin());
    input_ = input_.subspan(taken);
    return out;
  }
  // Contents for a declared tensor.
  std::vector<std::byte> contents(const TensorDeclaration& declaration) {
    std::size_t count = dtype_size(declaration.dtype);
    for (const std::int64_t extent : declaration.shape) {
      count *= static_cast<std::size_t>(extent);
    }
    return bytes(count);
  }

 private:
  std::span<const std::byte> input_;
};

}  // namespace quern::fuzz
