// SPDX-License-Identifier: Apache-2.0
// Decoding against Pillow and scaling against torch, byte for byte
// (testdata/random-models/README.md), and files that are broken on purpose.
#include "image/image.h"

#include "base/error.h"
#include "base/file.h"
#include "golden.h"
#include "image/resize.h"
#include "running_model.h"

#include <gtest/gtest.h>

#include <array>
#include <random>

namespace quern {
namespace {

using testing::test_model;
using testing::values_of;

const char* const kVisionModel = "random-models/qwen3.5-vision";

std::filesystem::path image_path(const std::string& name) {
  return test_model(kVisionModel) / "images" / name;
}

std::vector<std::string> image_names() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(image_path(""))) {
    names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

Image decode(const std::string& bytes) {
  return decode_image(std::as_bytes(std::span(bytes)), "test");
}

// What decode_image says about `bytes`; empty when it takes them.
std::string refusal(const std::string& bytes) {
  try {
    (void)decode(bytes);
  } catch (const Error& error) {
    EXPECT_EQ(exit_code(error.kind()), 3);
    return error.three_lines();
  }
  return "";
}

TEST(DecodeImage, IsWhatPillowDecodes) {
  const auto golden =
      SafetensorsStore::open(test_model(kVisionModel) / "golden/vision.safetensors");
  ASSERT_GE(image_names().size(), 20U);
  for (const std::string& name : image_names()) {
    const Image image = read_image(image_path(name));
    const TensorView* view = golden->find("rgb." + name);
    ASSERT_NE(view, nullptr) << name;
    EXPECT_EQ(view->shape, (Shape{image.height, image.width, 3})) << name;
    EXPECT_EQ(image.rgb, values_of<std::uint8_t>(*view)) << name;
  }
}

TEST(ResizeBicubic, IsWhatTorchComputes) {
  const auto golden =
      SafetensorsStore::open(test_model(kVisionModel) / "golden/vision.safetensors");
  ThreadPool pool(2);
  for (const std::string& name : image_names()) {
    const TensorView* view = golden->find("scaled." + name);
    ASSERT_NE(view, nullptr) << name;
    const Image image =
        resize_bicubic(pool, read_image(image_path(name)), view->shape[1], view->shape[0]);
    EXPECT_EQ(image.rgb, values_of<std::uint8_t>(*view)) << name;
  }
}

TEST(ResizeBicubic, AtTheEdges) {
  ThreadPool pool(1);
  const Image dot{1, 1, {7, 8, 9}};
  const Image wide = resize_bicubic(pool, dot, 5, 1);
  EXPECT_EQ(wide.rgb, (std::vector<std::uint8_t>{7, 8, 9, 7, 8, 9, 7, 8, 9, 7, 8, 9, 7, 8, 9}));
  Image white{300, 200, std::vector<std::uint8_t>(300 * 200 * 3, 255)};
  const Image small = resize_bicubic(pool, white, 1, 1);
  EXPECT_EQ(small.rgb, (std::vector<std::uint8_t>{255, 255, 255}));
}

TEST(DecodeImage, FilesThatEndEarlyAreRefused) {
  for (const std::string& name : image_names()) {
    const std::string bytes = read_file(image_path(name));
    for (const std::size_t parts : {1, 4, 7}) {
      const std::string cut = bytes.substr(0, bytes.size() * parts / 8);
      EXPECT_NE(refusal(cut).find("broken"), std::string::npos) << name << " at " << parts;
    }
  }
}

TEST(DecodeImage, OtherFilesAreRefused) {
  for (const std::string& bytes :
       {std::string(), std::string("{}"), std::string("GIF89a\1\0\1\0"), std::string(4096, '\0')}) {
    EXPECT_NE(refusal(bytes).find("no image that quern reads"), std::string::npos);
  }
  EXPECT_NE(refusal("\x89PNG\r\n\x1a\n").find("PNG image is broken"), std::string::npos);
  EXPECT_NE(refusal("\xFF\xD8\xFF").find("JPEG image is broken"), std::string::npos);
  EXPECT_NE(refusal("RIFF????WEBP").find("WebP image is broken"), std::string::npos);
}

TEST(DecodeImage, SizesThatCannotBe) {
  std::string jpeg = read_file(image_path("420.jpg"));
  const std::size_t frame = jpeg.find("\xFF\xC0");
  ASSERT_NE(frame, std::string::npos);
  jpeg.replace(frame + 5, 4, "\xFF\xDC\xFF\xDC");  // height and width: 65500, as many as JPEG has
  EXPECT_NE(refusal(jpeg).find("too large"), std::string::npos);
  jpeg.replace(frame + 5, 4, std::string(4, '\0'));
  EXPECT_NE(refusal(jpeg).find("broken"), std::string::npos);
  const std::string corpus = std::string(QUERN_TESTDATA) + "/../fuzz/corpus/image/";
  EXPECT_NE(refusal(read_file(corpus + "png_huge")).find("too large"), std::string::npos);
  EXPECT_FALSE(refusal(read_file(corpus + "png_no_pixels")).empty());
}

TEST(DecodeImage, HoldsToTheGivenSize) {
  const std::string bytes = read_file(image_path("rgb.png"));
  const auto span = std::as_bytes(std::span(bytes));
  EXPECT_EQ(decode_image(span, "test", 90 * 53).width, 90);
  EXPECT_THROW((void)decode_image(span, "test", 90 * 53 - 1), UnsupportedError);
}

// Any damage gives a picture or an error; the sanitizer builds watch the rest.
TEST(DecodeImage, DamagedBytesDoNoHarm) {
  std::mt19937 random(3);
  for (const std::string& name : image_names()) {
    const std::string bytes = read_file(image_path(name));
    for (int round = 0; round < 40; ++round) {
      std::string damaged = bytes;
      for (int k = 0; k < 3; ++k) {
        damaged[random() % damaged.size()] = static_cast<char>(random());
      }
      try {
        const Image image = decode_image(std::as_bytes(std::span(damaged)), "test", 1 << 20);
        EXPECT_EQ(image.rgb.size(), static_cast<std::size_t>(image.width * image.height * 3));
      } catch (const Error& error) {
        EXPECT_EQ(exit_code(error.kind()), 3) << error.three_lines();
      }
    }
  }
}

TEST(ReadImage, FilesThatAreNotThere) {
  EXPECT_THROW((void)read_image(image_path("nothing.png")), IoError);
  EXPECT_THROW((void)read_image(image_path("")), IoError);
}

}  // namespace
}  // namespace quern
