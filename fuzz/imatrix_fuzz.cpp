// SPDX-License-Identifier: Apache-2.0
// Importance matrices, GGUF and legacy, from arbitrary bytes: either quern::Error, or finite
// importances of the stated sizes.
#include "base/error.h"
#include "format/imatrix.h"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::span<const std::byte> file(reinterpret_cast<const std::byte*>(data), size);
  try {
    const quern::Imatrix imatrix = quern::parse_imatrix(file, "input");
    for (const auto& [name, entry] : imatrix.entries) {
      const std::vector<float> importance = entry.importance();
      if (entry.matrices() == 0 || importance.size() != entry.sums.size() ||
          importance.size() % entry.counts.size() != 0 || importance.size() * 4 > size) {
        std::abort();
      }
      for (const float value : importance) {
        if (std::isnan(value) || value < 0) {
          std::abort();
        }
      }
    }
  } catch (const quern::Error& error) {
    (void)error.three_lines();
  }
  return 0;
}
