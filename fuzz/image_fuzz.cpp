// SPDX-License-Identifier: Apache-2.0
// PNG, JPEG and WebP from arbitrary bytes: either quern::Error, or a picture of the stated size.
#include "base/error.h"
#include "image/image.h"

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  constexpr std::int64_t kMaxPixels = 1 << 20;
  const std::span<const std::byte> file(reinterpret_cast<const std::byte*>(data), size);
  try {
    const quern::Image image = quern::decode_image(file, "input", kMaxPixels);
    if (image.width < 1 || image.height < 1 || image.width > kMaxPixels / image.height ||
        image.rgb.size() != static_cast<std::size_t>(image.width * image.height * 3)) {
      std::abort();
    }
  } catch (const quern::Error& error) {
    (void)error.three_lines();
  }
  return 0;
}
