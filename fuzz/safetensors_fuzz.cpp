// SPDX-License-Identifier: Apache-2.0
// The safetensors parser on arbitrary bytes: either quern::Error, or views that lie inside the
// input and cover its data.
#include "base/error.h"
#include "format/safetensors.h"

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::span<const std::byte> file(reinterpret_cast<const std::byte*>(data), size);
  try {
    const quern::SafetensorsContent content = quern::parse_safetensors(file, "input");
    std::size_t covered = 0;
    for (const auto& [name, view] : content.tensors) {
      const bool inside = view.bytes.empty() ||
                          (view.bytes.data() >= file.data() &&
                           view.bytes.data() + view.bytes.size() <= file.data() + file.size());
      const bool right_size = view.bytes.empty() || static_cast<std::size_t>(view.count()) *
                                                            quern::dtype_size(view.dtype) ==
                                                        view.bytes.size();
      if (!inside || !right_size) {
        std::abort();
      }
      covered += view.bytes.size();
    }
    if (covered > size) {
      std::abort();
    }
  } catch (const quern::Error& error) {
    (void)error.three_lines();
  }
  return 0;
}
