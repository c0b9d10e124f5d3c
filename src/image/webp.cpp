// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "image/codec.h"

#include <webp/decode.h>
#include <webp/demux.h>

#include <memory>

namespace quern {
namespace {

int orientation_of(const WebPData& data) {
  const std::unique_ptr<WebPDemuxer, decltype(&WebPDemuxDelete)> demuxer(
      WebPDemux(&data), WebPDemuxDelete);
  int orientation = 1;
  WebPChunkIterator chunk{};
  if (demuxer && WebPDemuxGetChunk(demuxer.get(), "EXIF", 1, &chunk) != 0) {
    orientation = exif_orientation(std::as_bytes(std::span(chunk.chunk.bytes, chunk.chunk.size)));
  }
  WebPDemuxReleaseChunkIterator(&chunk);
  return orientation;
}

}  // namespace

bool is_webp(std::span<const std::byte> bytes) {
  return begins_with(bytes, "RIFF") && bytes.size() >= 8 && begins_with(bytes.subspan(8), "WEBP");
}

DecodedImage decode_webp(const ImageSource& source) {
  const std::span<const std::byte> bytes = source.bytes;
  const auto* data = reinterpret_cast<const std::uint8_t*>(bytes.data());
  WebPBitstreamFeatures features{};
  if (WebPGetFeatures(data, bytes.size(), &features) != VP8_STATUS_OK) {
    refuse_image("WebP", "its header is damaged or cut off", source);
  }
  if (features.has_animation != 0) {
    throw UnsupportedError(
        "an animated WebP image",
        source.where,
        "expected a still picture",
        "save one of its frames as PNG");
  }
  DecodedImage decoded;
  decoded.image = make_image(features.width, features.height, source);
  const std::uint8_t* pixels = WebPDecodeRGBInto(
      data, bytes.size(), decoded.image.rgb.data(), decoded.image.rgb.size(), features.width * 3);
  if (pixels == nullptr) {
    refuse_image("WebP", "its pixels are damaged or cut off", source);
  }
  decoded.orientation = orientation_of({data, bytes.size()});
  return decoded;
}

}  // namespace quern
