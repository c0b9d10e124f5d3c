// SPDX-License-Identifier: Apache-2.0
#include "image/codec.h"

#include <jerror.h>
#include <jpeglib.h>

#include <algorithm>
#include <csetjmp>
#include <cstdio>  // jpeglib.h needs FILE
#include <utility>

namespace quern {
namespace {

constexpr int kExifMarker = JPEG_APP0 + 1;
// Each scan of a progressive file goes over all coefficients; encoders write about ten.
constexpr int kMaxScans = 200;

// What libjpeg's callbacks and the jump out of an error share. No object with a destructor lives
// in the frames that longjmp leaves.
struct JpegReader {
  JpegReader() = default;
  JpegReader(const JpegReader&) = delete;
  JpegReader& operator=(const JpegReader&) = delete;
  ~JpegReader() { jpeg_destroy_decompress(&jpeg); }

  jpeg_decompress_struct jpeg{};
  jpeg_error_mgr errors{};
  jpeg_progress_mgr progress{};
  std::jmp_buf way_out{};
  char message[JMSG_LENGTH_MAX] = "";
  Image image;
  int orientation = 1;
  std::vector<JSAMPLE> row;  // of a picture in CMYK
};

[[noreturn]] void on_error(j_common_ptr jpeg) {
  auto* reader = static_cast<JpegReader*>(jpeg->client_data);
  jpeg->err->format_message(jpeg, reader->message);
  std::longjmp(reader->way_out, 1);  // NOLINT(cert-err52-cpp): libjpeg's way out of an error
}

// Below 0 are warnings: libjpeg goes on with what it has. A file that ends early is no picture.
void on_message(j_common_ptr jpeg, int level) {
  if (level < 0 && jpeg->err->msg_code == JWRN_JPEG_EOF) {
    on_error(jpeg);
  }
}

void on_progress(j_common_ptr jpeg) {
  auto* reader = static_cast<JpegReader*>(jpeg->client_data);
  if (reader->jpeg.input_scan_number > kMaxScans) {
    std::snprintf(reader->message, sizeof(reader->message), "more than %d scans", kMaxScans);
    std::longjmp(reader->way_out, 1);  // NOLINT(cert-err52-cpp)
  }
}

// As Pillow does it: the file holds the inverted inks, as Adobe's programs write them.
void rgb_from_cmyk(const JSAMPLE* cmyk, std::int64_t width, std::uint8_t* rgb) {
  for (std::int64_t x = 0; x < width; ++x) {
    const int light = cmyk[4 * x + 3];
    for (std::int64_t c = 0; c < 3; ++c) {
      const int product = (255 - cmyk[4 * x + c]) * light + 128;
      rgb[3 * x + c] = static_cast<std::uint8_t>(light - (((product >> 8) + product) >> 8));
    }
  }
}

int orientation_of(jpeg_saved_marker_ptr marker) {
  for (; marker != nullptr; marker = marker->next) {
    const auto data = std::as_bytes(std::span(marker->data, marker->data_length));
    if (begins_with(data, "Exif")) {
      return exif_orientation(data);
    }
  }
  return 1;
}

// False after an error; reader.message says which.
bool read_pixels(JpegReader& reader, const ImageSource& source) {
  jpeg_decompress_struct& jpeg = reader.jpeg;
  if (setjmp(reader.way_out) != 0) {  // NOLINT(cert-err52-cpp)
    return false;
  }
  jpeg_create_decompress(&jpeg);
  reader.progress.progress_monitor = on_progress;
  jpeg.progress = &reader.progress;
  jpeg_mem_src(
      &jpeg, reinterpret_cast<const unsigned char*>(source.bytes.data()), source.bytes.size());
  jpeg_save_markers(&jpeg, kExifMarker, 0xFFFF);
  (void)jpeg_read_header(&jpeg, TRUE);
  reader.image = make_image(jpeg.image_width, jpeg.image_height, source);
  reader.orientation = orientation_of(jpeg.marker_list);
  const bool is_cmyk = jpeg.jpeg_color_space == JCS_CMYK || jpeg.jpeg_color_space == JCS_YCCK;
  jpeg.out_color_space = is_cmyk ? JCS_CMYK : JCS_RGB;
  (void)jpeg_start_decompress(&jpeg);
  if (is_cmyk) {
    reader.row.resize(static_cast<std::size_t>(reader.image.width) * 4);
  }
  while (jpeg.output_scanline < jpeg.output_height) {
    std::uint8_t* rgb = reader.image.rgb.data() +
                        static_cast<std::int64_t>(jpeg.output_scanline) * reader.image.width * 3;
    JSAMPROW row = is_cmyk ? reader.row.data() : rgb;
    (void)jpeg_read_scanlines(&jpeg, &row, 1);
    if (is_cmyk) {
      rgb_from_cmyk(row, reader.image.width, rgb);
    }
  }
  (void)jpeg_finish_decompress(&jpeg);
  return true;
}

}  // namespace

bool is_jpeg(std::span<const std::byte> bytes) {
  return begins_with(bytes, "\xFF\xD8\xFF");
}

DecodedImage decode_jpeg(const ImageSource& source) {
  JpegReader reader;
  reader.jpeg.err = jpeg_std_error(&reader.errors);
  reader.errors.error_exit = on_error;
  reader.errors.emit_message = on_message;
  reader.jpeg.client_data = &reader;
  if (!read_pixels(reader, source)) {
    refuse_image("JPEG", reader.message, source);
  }
  DecodedImage decoded;
  decoded.orientation = reader.orientation;
  decoded.image = std::move(reader.image);
  return decoded;
}

}  // namespace quern
