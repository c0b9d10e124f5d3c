// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

namespace quern {

// A picture in 8-bit RGB, rows from the top.
struct Image {
  std::int64_t width = 0;
  std::int64_t height = 0;
  std::vector<std::uint8_t> rgb;  // [height, width, 3]
};

// Larger pictures are refused before their pixels are read: 384 MiB of RGB.
inline constexpr std::int64_t kMaxImagePixels = std::int64_t{1} << 27;

// Decodes untrusted bytes by their content (the codecs of codec.h), turned upright as EXIF says, in
// RGB as Pillow's convert("RGB") gives it: grey is copied to all channels, a palette looked up, an
// alpha channel dropped, 16 bits a channel cut to the upper 8 (grey alone: clipped at 255). Throws
// ParseError for what is broken, UnsupportedError for what is no such picture or too large.
[[nodiscard]] Image decode_image(
    std::span<const std::byte> bytes,
    const std::string& where,
    std::int64_t max_pixels = kMaxImagePixels);
[[nodiscard]] Image read_image(const std::filesystem::path& path);

}  // namespace quern
