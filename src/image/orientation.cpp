// SPDX-License-Identifier: Apache-2.0
#include "image/codec.h"

#include <algorithm>
#include <utility>

namespace quern {
namespace {

constexpr std::string_view kExifPrefix("Exif\0\0", 6);

// Integers of a TIFF block in its byte order; reads behind the end give 0.
class Tiff {
 public:
  Tiff(std::span<const std::byte> bytes, bool big_endian) : bytes_(bytes), big_(big_endian) {}

  [[nodiscard]] std::uint32_t integer(std::uint64_t offset, unsigned size) const {
    if (offset > bytes_.size() || bytes_.size() - offset < size) {
      return 0;
    }
    std::uint32_t value = 0;
    for (unsigned i = 0; i < size; ++i) {
      const std::uint64_t at = offset + (big_ ? i : size - 1 - i);
      value = value << 8U | std::to_integer<std::uint32_t>(bytes_[at]);
    }
    return value;
  }

 private:
  std::span<const std::byte> bytes_;
  bool big_;
};

}  // namespace

int exif_orientation(std::span<const std::byte> exif) {
  constexpr std::uint32_t kOrientation = 0x112;
  constexpr std::uint32_t kShort = 3;
  constexpr std::uint64_t kEntryBytes = 12;
  if (begins_with(exif, kExifPrefix)) {
    exif = exif.subspan(kExifPrefix.size());
  }
  const bool big_endian = begins_with(exif, std::string_view("MM\0*", 4));
  if (!big_endian && !begins_with(exif, std::string_view("II*\0", 4))) {
    return 1;
  }
  const Tiff tiff(exif, big_endian);
  const std::uint64_t directory = tiff.integer(4, 4);
  const std::uint32_t entries = tiff.integer(directory, 2);
  for (std::uint32_t i = 0; i < entries; ++i) {
    const std::uint64_t entry = directory + 2 + i * kEntryBytes;
    if (tiff.integer(entry, 2) == kOrientation && tiff.integer(entry + 2, 2) == kShort) {
      const std::uint32_t value = tiff.integer(entry + 8, 2);
      return value >= 1 && value <= 8 ? static_cast<int>(value) : 1;
    }
  }
  return 1;
}

Image turned_upright(Image image, int orientation) {
  if (orientation == 1) {
    return image;
  }
  const bool swaps = orientation >= 5;
  const bool from_right = orientation == 2 || orientation == 3 || orientation >= 7;
  const bool from_below =
      orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
  Image out;
  out.width = swaps ? image.height : image.width;
  out.height = swaps ? image.width : image.height;
  out.rgb.resize(image.rgb.size());
  std::uint8_t* target = out.rgb.data();
  for (std::int64_t y = 0; y < out.height; ++y) {
    for (std::int64_t x = 0; x < out.width; ++x) {
      std::int64_t column = swaps ? y : x;
      std::int64_t row = swaps ? x : y;
      column = from_right ? image.width - 1 - column : column;
      row = from_below ? image.height - 1 - row : row;
      target = std::copy_n(image.rgb.data() + (row * image.width + column) * 3, 3, target);
    }
  }
  return out;
}

}  // namespace quern
