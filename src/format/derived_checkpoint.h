// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/json.h"
#include "tensor/checkpoint.h"

#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

namespace quern {

// A tensor that is made from others of the checkpoint when it is asked for.
struct DerivedTensor {
  DType dtype = DType::kBF16;
  Shape shape;
  std::function<std::vector<std::byte>()> make;
};

// A checkpoint in floats ("dense") whose tensors are those of `source` but for `derived`, which
// take the place of those of that name, and `dropped`. A derived tensor has no bytes in tensors();
// find() and load_linear() make it, and it stays until it was released as often as it was asked
// for. `config` takes the place of the source's.
[[nodiscard]] std::unique_ptr<Checkpoint> derive_checkpoint(
    std::unique_ptr<Checkpoint> source,
    Json config,
    std::map<std::string, DerivedTensor> derived,
    const std::set<std::string>& dropped);

// An FP8 release with its weights as BF16, each made when it is used; any other `source` itself.
[[nodiscard]] std::unique_ptr<Checkpoint> with_plain_weights(std::unique_ptr<Checkpoint> source);

}  // namespace quern
