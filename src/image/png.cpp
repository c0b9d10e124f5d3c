// SPDX-License-Identifier: Apache-2.0
#include "image/codec.h"

#include <png.h>

#include <algorithm>
#include <cstring>

namespace quern {
namespace {

// What libpng's callbacks and the jump out of an error share. No object with a destructor lives in
// the frames that longjmp leaves.
struct PngReader {
  explicit PngReader(std::span<const std::byte> bytes) : rest(bytes) {}
  PngReader(const PngReader&) = delete;
  PngReader& operator=(const PngReader&) = delete;
  ~PngReader() { png_destroy_read_struct(&png, &info, nullptr); }

  std::span<const std::byte> rest;
  png_structp png = nullptr;
  png_infop info = nullptr;
  char message[160] = "out of memory";
  Image image;
  bool deep_grey = false;  // 16-bit grey without alpha
  std::vector<png_byte> grey;  // [height, width, 2], big-endian
  std::vector<png_bytep> rows;
};

[[noreturn]] void on_error(png_structp png, png_const_charp message) {
  auto* reader = static_cast<PngReader*>(png_get_error_ptr(png));
  std::strncpy(reader->message, message, sizeof(reader->message) - 1);
  png_longjmp(png, 1);
}

void on_warning(png_structp /*png*/, png_const_charp /*message*/) {}

void on_read(png_structp png, png_bytep out, std::size_t count) {
  auto* reader = static_cast<PngReader*>(png_get_io_ptr(png));
  if (reader->rest.size() < count) {
    png_error(png, "the file ends early");
  }
  std::memcpy(out, reader->rest.data(), count);
  reader->rest = reader->rest.subspan(count);
}

void read_header(PngReader& reader, const ImageSource& source) {
  constexpr png_alloc_size_t kMaxChunk = 8U << 20U;
  png_set_read_fn(reader.png, &reader, on_read);
  png_set_user_limits(reader.png, PNG_UINT_31_MAX, PNG_UINT_31_MAX);  // make_image has our own
  png_set_chunk_malloc_max(reader.png, kMaxChunk);
  png_read_info(reader.png, reader.info);
  const std::int64_t width = png_get_image_width(reader.png, reader.info);
  const std::int64_t height = png_get_image_height(reader.png, reader.info);
  reader.image = make_image(width, height, source);
  const png_byte type = png_get_color_type(reader.png, reader.info);
  const png_byte depth = png_get_bit_depth(reader.png, reader.info);
  reader.deep_grey = type == PNG_COLOR_TYPE_GRAY && depth == 16;
  if (type == PNG_COLOR_TYPE_PALETTE) {
    png_set_palette_to_rgb(reader.png);
  } else if (type == PNG_COLOR_TYPE_GRAY && depth < 8) {
    png_set_expand_gray_1_2_4_to_8(reader.png);
  }
  if (depth == 16 && !reader.deep_grey) {
    png_set_strip_16(reader.png);
  }
  png_set_strip_alpha(reader.png);
  if ((type & PNG_COLOR_MASK_COLOR) == 0 && !reader.deep_grey) {
    png_set_gray_to_rgb(reader.png);
  }
  (void)png_set_interlace_handling(reader.png);
  png_read_update_info(reader.png, reader.info);
}

// False after an error; reader.message says which.
bool read_pixels(PngReader& reader, const ImageSource& source) {
  if (setjmp(png_jmpbuf(reader.png)) != 0) {  // NOLINT: libpng's way out of an error
    return false;
  }
  read_header(reader, source);
  const std::size_t stride =
      static_cast<std::size_t>(reader.image.width) * (reader.deep_grey ? 2U : 3U);
  if (png_get_rowbytes(reader.png, reader.info) != stride) {
    png_error(reader.png, "rows of another length than the header says");
  }
  png_bytep pixels = reader.image.rgb.data();
  if (reader.deep_grey) {
    reader.grey.resize(static_cast<std::size_t>(reader.image.height) * stride);
    pixels = reader.grey.data();
  }
  reader.rows.resize(static_cast<std::size_t>(reader.image.height));
  for (png_bytep& row : reader.rows) {
    row = pixels;
    pixels += stride;
  }
  png_read_image(reader.png, reader.rows.data());
  png_read_end(reader.png, reader.info);
  return true;
}

// Pillow clips what does not fit into 8 bits.
void widen_grey(PngReader& reader) {
  for (std::size_t i = 0; i < reader.grey.size() / 2; ++i) {
    const png_byte value =
        reader.grey[2 * i] == 0 ? reader.grey[2 * i + 1] : static_cast<png_byte>(255);
    std::fill_n(reader.image.rgb.begin() + static_cast<std::ptrdiff_t>(3 * i), 3, value);
  }
}

}  // namespace

bool is_png(std::span<const std::byte> bytes) {
  return begins_with(bytes, "\x89PNG\r\n\x1a\n");
}

DecodedImage decode_png(const ImageSource& source) {
  PngReader reader(source.bytes);
  reader.png = png_create_read_struct(PNG_LIBPNG_VER_STRING, &reader, on_error, on_warning);
  if (reader.png != nullptr) {
    reader.info = png_create_info_struct(reader.png);
  }
  if (reader.info == nullptr || !read_pixels(reader, source)) {
    refuse_image("PNG", reader.message, source);
  }
  if (reader.deep_grey) {
    widen_grey(reader);
  }
  DecodedImage decoded;
  png_uint_32 size = 0;
  png_bytep exif = nullptr;
  if (png_get_eXIf_1(reader.png, reader.info, &size, &exif) != 0) {
    decoded.orientation = exif_orientation(std::as_bytes(std::span(exif, size)));
  }
  decoded.image = std::move(reader.image);
  return decoded;
}

}  // namespace quern
