// SPDX-License-Identifier: Apache-2.0
#include "image/image.h"

#include "base/error.h"
#include "base/mapped_file.h"
#include "image/codec.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

namespace quern {
namespace {

constexpr ImageCodec kCodecs[] = {
    {"PNG", is_png, decode_png},
    {"JPEG", is_jpeg, decode_jpeg},
    {"WebP", is_webp, decode_webp},
};

}  // namespace

bool begins_with(std::span<const std::byte> bytes, std::string_view magic) {
  return bytes.size() >= magic.size() &&
         std::equal(magic.begin(), magic.end(), bytes.begin(), [](char a, std::byte b) {
           return static_cast<unsigned char>(a) == std::to_integer<unsigned char>(b);
         });
}

void refuse_image(std::string_view format, const std::string& reason, const ImageSource& source) {
  throw ParseError(
      fmt::format("the {} image is broken", format),
      source.where,
      printable(reason),
      "get the file again, or open it in an image editor and save it anew");
}

Image make_image(std::int64_t width, std::int64_t height, const ImageSource& source) {
  if (width < 1 || height < 1) {
    throw ParseError(
        "the image is empty",
        source.where,
        fmt::format("expected at least one pixel, found {} x {}", width, height),
        "use another file");
  }
  if (width > source.max_pixels / height) {
    throw UnsupportedError(
        "the image is too large",
        source.where,
        fmt::format("expected up to {} pixels, found {} x {}", source.max_pixels, width, height),
        "scale it down first");
  }
  Image image;
  image.width = width;
  image.height = height;
  image.rgb.resize(static_cast<std::size_t>(width * height * 3));
  return image;
}

Image decode_image(
    std::span<const std::byte> bytes, const std::string& where, std::int64_t max_pixels) {
  std::string known;
  for (const ImageCodec& codec : kCodecs) {
    if (codec.recognises(bytes)) {
      DecodedImage decoded = codec.decode({bytes, where, max_pixels});
      return turned_upright(std::move(decoded.image), decoded.orientation);
    }
    known += (known.empty() ? "" : ", ") + std::string(codec.name);
  }
  throw UnsupportedError(
      "the file is no image that quern reads",
      where,
      fmt::format("expected one of {}, found {} bytes of something else", known, bytes.size()),
      "convert it to PNG");
}

Image read_image(const std::filesystem::path& path) {
  const MappedFile file(path);
  return decode_image(file.bytes(), path.string());
}

}  // namespace quern
