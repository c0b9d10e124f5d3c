// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "tensor/tensor.h"

#include <cstdint>
#include <map>
#include <string>

namespace quern {

// A store that shows some tensors of its files (fused experts) as several others.
class DividedStore : public TensorStore {
 public:
  // In how many parts each of them is shown.
  [[nodiscard]] virtual std::map<std::string, std::int64_t> divided() const = 0;
};

// The tensors of the files that `store` divides; none when it is of another kind.
[[nodiscard]] inline std::map<std::string, std::int64_t> divided_tensors(const TensorStore& store) {
  const auto* divided = dynamic_cast<const DividedStore*>(&store);
  return divided == nullptr ? std::map<std::string, std::int64_t>() : divided->divided();
}

}  // namespace quern
