// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "image/image.h"

#include <string_view>

namespace quern {

// The bytes of an image file, its name for messages, and the size up to which it is decoded.
struct ImageSource {
  std::span<const std::byte> bytes;
  std::string where;
  std::int64_t max_pixels = kMaxImagePixels;
};

// A picture as its file holds it, and how it is turned upright: EXIF's orientation, 1 … 8.
struct DecodedImage {
  Image image;
  int orientation = 1;
};

// One file format: one file, one line in image.cpp. `decode` throws as decode_image does.
struct ImageCodec {
  std::string_view name;
  bool (*recognises)(std::span<const std::byte> bytes);
  DecodedImage (*decode)(const ImageSource& source);
};

[[nodiscard]] bool is_png(std::span<const std::byte> bytes);
[[nodiscard]] DecodedImage decode_png(const ImageSource& source);
[[nodiscard]] bool is_jpeg(std::span<const std::byte> bytes);
[[nodiscard]] DecodedImage decode_jpeg(const ImageSource& source);
[[nodiscard]] bool is_webp(std::span<const std::byte> bytes);
[[nodiscard]] DecodedImage decode_webp(const ImageSource& source);

// What every codec does with the sizes in a file's header: refuses 0 and too many pixels, else
// gives a picture of that size.
[[nodiscard]] Image make_image(std::int64_t width, std::int64_t height, const ImageSource& source);

// For what the library says about a broken file.
[[noreturn]] void refuse_image(
    std::string_view format, const std::string& reason, const ImageSource& source);

[[nodiscard]] bool begins_with(std::span<const std::byte> bytes, std::string_view magic);

// The orientation in a block of EXIF data, with or without "Exif\0\0" before it; 1 when there is
// none or it makes no sense.
[[nodiscard]] int exif_orientation(std::span<const std::byte> exif);

// The picture turned upright.
[[nodiscard]] Image turned_upright(Image image, int orientation);

}  // namespace quern
