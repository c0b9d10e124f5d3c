// SPDX-License-Identifier: Apache-2.0
// The vision tower and prompts with images against transformers in float64
// (testdata/random-models/README.md).
#include "nn/vision.h"

#include "base/error.h"
#include "base/file.h"
#include "nn/generate.h"
#include "run_binary.h"
#include "running_model.h"
#include "scratch.h"

#include <gtest/gtest.h>

namespace quern {
namespace {

using testing::golden_texts;
using testing::GoldenText;
using testing::Ids;
using testing::relative_difference;
using testing::run_quern;
using testing::RunResult;
using testing::test_model;
using testing::values_of;

const char* const kVisionModel = "random-models/qwen3.5-vision";

// Of the largest value. The reference's own float32 is off by 1e-6 (features) and 7e-5 (logits).
constexpr double kFeatureTolerance = 1e-5;
constexpr double kLogitTolerance = 5e-5;

// The random model, its tower, and the rows of its golden files.
class Vision : public ::testing::Test {
 protected:
  struct Row {
    Ids ids;
    std::vector<PreparedImage> images;
    std::vector<float> pixels;
    std::vector<float> features;
  };

  static std::filesystem::path directory() { return test_model(kVisionModel); }

  Row row(std::size_t index) {
    Row row;
    row.ids = read_json(directory() / "golden/ids.json").at(index).get<Ids>();
    const Json names = read_json(directory() / "golden/images.json");
    for (const Json& name : names.at(index)) {
      row.images.push_back(tower_.prepare(directory() / name.get<std::string>()));
      const std::vector<float> patches = tower_.patches(row.images.back());
      const std::vector<float> features = tower_.features(row.images.back(), patches);
      row.pixels.insert(row.pixels.end(), patches.begin(), patches.end());
      row.features.insert(row.features.end(), features.begin(), features.end());
    }
    return row;
  }
  // The row as the beginning of a sequence.
  std::shared_ptr<ImagePrompt> prompt(const Row& row) {
    auto prompt = std::make_shared<ImagePrompt>(tower_.plan(row.ids, row.images, "test"));
    prompt->features = row.features;
    return prompt;
  }
  std::vector<float> logits(const std::vector<float>& hidden) {
    std::vector<float> all;
    model_.decoder().for_logits(hidden, [&](std::int64_t, std::int64_t rows, const float* part) {
      all.insert(all.end(), part, part + rows * model_.config().vocab_size);
    });
    return all;
  }
  // Through the cache, `chunk` tokens at a time.
  std::vector<float> logits_in_chunks(
      const std::shared_ptr<const ImagePrompt>& prompt, const Ids& ids, std::size_t chunk) {
    Sequence sequence;
    sequence.images = prompt;
    std::vector<float> all;
    for (std::size_t begin = 0; begin < ids.size(); begin += chunk) {
      const auto part = std::span(ids).subspan(begin, std::min(chunk, ids.size() - begin));
      const std::vector<float> some = logits(model_.decoder().forward(part, sequence));
      all.insert(all.end(), some.begin(), some.end());
    }
    return all;
  }

  testing::RunningModel model_{directory(), 2};
  VisionTower tower_{model_.context(), model_.decoder().model()};
  std::vector<GoldenText> texts_ = golden_texts(directory());
  std::unique_ptr<TensorStore> golden_ =
      SafetensorsStore::open(directory() / "golden/vision.safetensors");
};

TEST_F(Vision, PixelValuesAndFeatures) {
  for (const std::size_t i : {0, 1}) {
    const Row row = this->row(i);
    const std::string suffix = "." + std::to_string(i);
    EXPECT_LE(
        relative_difference(row.pixels, values_of<float>(*golden_->find("pixel_values" + suffix))),
        1e-7);
    EXPECT_LE(
        relative_difference(
            row.features, values_of<float>(*golden_->find("image_features" + suffix))),
        kFeatureTolerance);
  }
}

TEST_F(Vision, LogitsWithTwoImagesAndTextAfter) {
  for (std::size_t i = 0; i < texts_.size(); ++i) {
    const Row row = this->row(i);
    const auto prompt = this->prompt(row);
    for (const std::size_t chunk : {1000, 1, 7}) {
      EXPECT_LE(
          relative_difference(logits_in_chunks(prompt, prompt->ids, chunk), texts_[i].logits),
          kLogitTolerance)
          << i << " by " << chunk;
    }
  }
}

// What comes after the prompt stands behind the largest position, not behind the last token.
TEST_F(Vision, DecodingGoesOnAfterAnImage) {
  constexpr std::size_t kAfter = 7;
  for (const std::size_t i : {0, 1}) {
    Row row = this->row(i);
    const Ids whole = prompt(row)->ids;
    EXPECT_EQ(whole.size() * 307, texts_[i].logits.size());
    row.ids.resize(row.ids.size() - (i == 0 ? kAfter : 6));
    const auto shorter = prompt(row);
    ASSERT_LT(shorter->ids.size(), whole.size());
    EXPECT_LT(shorter->positions.next, static_cast<std::int64_t>(shorter->ids.size()));
    EXPECT_LE(
        relative_difference(logits_in_chunks(shorter, whole, 1), texts_[i].logits),
        kLogitTolerance);
  }
}

TEST_F(Vision, GenerateGoesOnFromTheImages) {
  const Row row = this->row(0);
  GenerateOptions options;
  options.max_tokens = 3;
  options.images = prompt(row);
  Sampler sampler({}, 0);
  const GenerateResult result =
      generate(model_.context(), model_.decoder(), options.images->ids, sampler, options);
  ASSERT_EQ(result.ids.size(), 3U);
  const auto best = std::max_element(texts_[0].logits.end() - 307, texts_[0].logits.end());
  EXPECT_EQ(result.ids[0], best - (texts_[0].logits.end() - 307));
  Ids all = options.images->ids;
  all.insert(all.end(), result.ids.begin(), result.ids.end() - 1);
  const std::vector<float> logits = logits_in_chunks(options.images, all, all.size());
  EXPECT_EQ(
      result.ids[2], std::max_element(logits.end() - 307, logits.end()) - (logits.end() - 307));
}

TEST_F(Vision, ThreadsDoNotChangeABit) {
  const Row two = row(0);
  testing::RunningModel other(directory(), 5);
  VisionTower tower(other.context(), other.decoder().model());
  std::vector<float> features;
  for (const PreparedImage& image : two.images) {
    const std::vector<float> some = tower.features(image, tower.patches(image));
    features.insert(features.end(), some.begin(), some.end());
  }
  EXPECT_EQ(features, two.features);
}

TEST_F(Vision, TextAloneIsTheSameWithAPromptWithoutImages) {
  const Ids ids = row(2).ids;
  const std::vector<std::uint8_t> axes(8, 0);
  const auto prompt =
      std::make_shared<const ImagePrompt>(make_image_prompt(ids, {}, 300, axes, "test"));
  EXPECT_EQ(logits_in_chunks(prompt, ids, 1000), model_.logits_in_chunks(ids, 1000));
}

// The worked example that was checked against transformers: images of 2 x 3 and 4 x 2 tokens.
TEST(ImagePrompt, PositionsOfTwoImages) {
  constexpr std::int32_t kImage = 9;
  const Ids ids = {1, 1, 1, 2, kImage, 3, 1, 1, 2, kImage, 3, 1, 1, 1, 1};
  const std::vector<ImageGrid> grids = {{2, 3}, {4, 2}};
  const std::vector<std::uint8_t> axes = {0, 1, 2};
  const ImagePrompt prompt = make_image_prompt(ids, grids, kImage, axes, "test");
  ASSERT_EQ(prompt.ids.size(), 27U);
  const std::vector<std::vector<int>> expected = {
      {0,  1,  2,  3,  4,  4,  4,  4,  4,  4,  7,  8,  9, 10,
       11, 11, 11, 11, 11, 11, 11, 11, 15, 16, 17, 18, 19},
      {0,  1,  2,  3,  4,  4,  4,  5,  5,  5,  7,  8,  9, 10,
       11, 11, 12, 12, 13, 13, 14, 14, 15, 16, 17, 18, 19},
      {0,  1,  2,  3,  4,  5,  6,  4,  5,  6,  7,  8,  9, 10,
       11, 12, 11, 12, 11, 12, 11, 12, 15, 16, 17, 18, 19}};
  for (std::size_t axis = 0; axis < 3; ++axis) {
    for (std::int64_t t = 0; t < 27; ++t) {
      EXPECT_EQ(prompt.positions.at(t, axis), expected[axis][static_cast<std::size_t>(t)])
          << axis << " " << t;
    }
    EXPECT_EQ(prompt.positions.at(27, axis), 20);
    EXPECT_EQ(prompt.positions.at(30, axis), 23);
  }
  // The same when the tokens are written out already.
  const ImagePrompt again = make_image_prompt(prompt.ids, grids, kImage, axes, "test");
  EXPECT_EQ(again.ids, prompt.ids);
  EXPECT_EQ(again.positions.tokens, prompt.positions.tokens);
  EXPECT_EQ(again.feature_rows, prompt.feature_rows);
}

TEST(ImagePrompt, RefusesOtherNumbersOfImageTokens) {
  const std::vector<ImageGrid> grids = {{2, 3}, {4, 2}};
  const std::vector<std::uint8_t> axes = {0};
  const auto plan = [&](const Ids& ids) { return make_image_prompt(ids, grids, 9, axes, "test"); };
  EXPECT_THROW((void)plan({1, 2}), UsageError);
  EXPECT_THROW((void)plan({9, 1}), UsageError);
  EXPECT_THROW((void)plan({9, 9, 9}), UsageError);
  Ids apart(15, 9);
  apart[3] = 1;  // 14 image tokens, the first image's not side by side
  EXPECT_THROW((void)plan(apart), UsageError);
  EXPECT_NO_THROW((void)plan({9, 9}));
}

TEST(SmartResize, IsTheReferencesRule) {
  using Size = std::pair<std::int64_t, std::int64_t>;
  const auto resized = [](std::int64_t height, std::int64_t width) {
    return smart_resize(height, width, 32, 65536, 16777216, "test");
  };
  EXPECT_EQ(resized(1080, 1920), (Size{1088, 1920}));
  EXPECT_EQ(resized(100, 60), (Size{352, 224}));
  EXPECT_EQ(resized(16, 16), (Size{256, 256}));
  EXPECT_EQ(resized(48, 80), (Size{224, 352}));
  EXPECT_EQ(resized(4096, 4096), (Size{4096, 4096}));
  EXPECT_EQ(resized(5000, 7000), (Size{3456, 4832}));
  // Halves go to the even side: 1.5 and 2.5 steps are both 2.
  EXPECT_EQ(smart_resize(48, 80, 32, 1, 1 << 20, "test"), (Size{64, 64}));
  EXPECT_EQ(smart_resize(10, 100, 32, 1, 1 << 20, "test"), (Size{32, 32}));
  EXPECT_NO_THROW((void)resized(10, 2000));
  EXPECT_THROW((void)resized(10, 2001), UnsupportedError);
  EXPECT_THROW((void)resized(2001, 10), UnsupportedError);
}

// The random model with another configuration.
class EditedVision : public ::testing::Test {
 protected:
  void SetUp() override {
    for (const char* name : {"config.json", "preprocessor_config.json", "model.safetensors"}) {
      std::filesystem::copy(test_model(kVisionModel) / name, scratch_.path() / name);
    }
  }
  void edit(const std::string& file, const std::function<void(Json&)>& change) {
    Json json = read_json(scratch_.path() / file);
    change(json);
    std::filesystem::remove(scratch_.path() / file);
    write_file(scratch_.path() / file, json.dump());
  }
  void open() {
    testing::RunningModel model(scratch_.path());

    const VisionTower tower(model.context(), model.decoder().model());
    EXPECT_EQ(tower.config().depth, 2);
  }

  testing::ScratchDirectory scratch_;
};

TEST_F(EditedVision, TowersThatComputeOtherwiseAreRefused) {
  const std::vector<std::pair<std::string, Json>> changes = {
      {"deepstack_visual_indexes", {0, 1}},
      {"hidden_act", "gelu"},
      {"in_channels", 1},
      {"window_size", 112},
      {"patch_size", {8, 8}},
      {"num_position_embeddings", 26},
      {"num_heads", 5},
      {"out_hidden_size", 65},
      {"model_type", "qwen3_vl"},
      {"rope_parameters", {{"rope_type", "yarn"}}}};
  for (const auto& [key, value] : changes) {
    edit("config.json", [&, &key = key, &value = value](Json& config) {
      config["vision_config"][key] = value;
    });
    EXPECT_THROW(open(), UnsupportedError) << key;
    std::filesystem::remove(scratch_.path() / "config.json");
    std::filesystem::copy(
        test_model(kVisionModel) / "config.json", scratch_.path() / "config.json");
  }
  edit("config.json", [](Json& config) {
    config["text_config"]["rope_parameters"]["mrope_interleaved"] = false;
  });
  EXPECT_THROW(open(), UnsupportedError);
}

TEST_F(EditedVision, ConfigurationsThatDoNotFitTheWeights) {
  edit("config.json", [](Json& config) { config["vision_config"]["depth"] = 3; });
  EXPECT_THROW(open(), ParseError);
  edit("config.json", [](Json& config) {
    config["vision_config"]["depth"] = 2;
    config["vision_config"]["intermediate_size"] = 81;
  });
  EXPECT_THROW(open(), ParseError);
}

TEST_F(EditedVision, PreprocessingThatMakesNoSense) {
  const auto expect_refused = [&](const std::string& key, const Json& value) {
    edit("preprocessor_config.json", [&](Json& config) { config[key] = value; });
    EXPECT_ANY_THROW(open()) << key;
    std::filesystem::remove(scratch_.path() / "preprocessor_config.json");
    std::filesystem::copy(
        test_model(kVisionModel) / "preprocessor_config.json",
        scratch_.path() / "preprocessor_config.json");
  };
  expect_refused("do_resize", false);
  expect_refused("resample", 2);
  expect_refused("patch_size", 16);
  expect_refused("merge_size", 1);
  expect_refused("image_mean", {0.5, 0.5});
  expect_refused("image_std", {0.5, 0, 0.5});
  expect_refused("size", {{"shortest_edge", 10}, {"longest_edge", 9}});
  expect_refused("size", {{"shortest_edge", 0}, {"longest_edge", 9}});
  expect_refused("size", {{"height", 10}});
  EXPECT_NO_THROW(open());
}

TEST_F(EditedVision, TheProcessorsFileDoesAsWell) {
  const Json own = read_json(scratch_.path() / "preprocessor_config.json");
  std::filesystem::remove(scratch_.path() / "preprocessor_config.json");
  EXPECT_THROW(open(), IoError);
  write_file(scratch_.path() / "processor_config.json", Json{{"image_processor", own}}.dump());
  EXPECT_NO_THROW(open());
}

TEST(VisionCli, LogitsWithImages) {
  const testing::ScratchDirectory scratch;
  const std::filesystem::path model = test_model(kVisionModel);
  const std::string out = (scratch.path() / "logits.safetensors").string();
  // File names are looked for beside the list of images as well.
  Json names = read_json(model / "golden/images.json");
  for (Json& row : names) {
    for (Json& name : row) {
      name = "../" + name.get<std::string>();
    }
  }
  const std::string list = (scratch.path() / "images.json").string();
  std::filesystem::create_directory(scratch.path() / "below");
  std::filesystem::copy(
      model / "images", scratch.path() / "images", std::filesystem::copy_options::recursive);
  write_file(scratch.path() / "below/images.json", names.dump());
  const RunResult result = run_quern(
      {"logits",
       model.string(),
       "--ids",
       (model / "golden/ids.json").string(),
       "--images",
       (scratch.path() / "below/images.json").string(),
       "-o",
       out,
       "--hidden",
       "--json"});
  ASSERT_EQ(result.code, 0) << result.err;
  const auto store = SafetensorsStore::open(out);
  const auto golden = SafetensorsStore::open(model / "golden/vision.safetensors");
  for (const GoldenText& text : golden_texts(model)) {
    ASSERT_NE(store->find(text.name), nullptr);
    EXPECT_LE(
        relative_difference(values_of<float>(*store->find(text.name)), text.logits),
        kLogitTolerance);
  }
  for (const char* name : {"pixel_values.0", "pixel_values.1"}) {
    EXPECT_EQ(store->find(name)->shape, golden->find(name)->shape);
  }
  for (const char* name : {"image_features.0", "image_features.1"}) {
    EXPECT_LE(
        relative_difference(
            values_of<float>(*store->find(name)), values_of<float>(*golden->find(name))),
        kFeatureTolerance);
  }
  EXPECT_EQ(store->find("pixel_values.2"), nullptr);
}

TEST(VisionCli, WhatCannotBeIsRefused) {
  const testing::ScratchDirectory scratch;
  const std::filesystem::path model = test_model(kVisionModel);
  const std::string list = (scratch.path() / "images.json").string();
  const auto run = [&](const std::filesystem::path& directory, const std::string& images) {
    std::filesystem::remove(list);
    write_file(list, images);
    return run_quern(
        {"logits",
         directory.string(),
         "--ids",
         (model / "golden/ids.json").string(),
         "--images",
         list,
         "-o",
         (scratch.path() / "out.safetensors").string()});
  };
  const std::string image = (model / "images/rgb.png").string();
  const RunResult blind = run(test_model("random-models/qwen3.5"), R"([["a.png"], [], []])");
  EXPECT_EQ(blind.code, 3);
  EXPECT_NE(blind.err.find("no vision tower"), std::string::npos) << blind.err;
  EXPECT_EQ(run(model, "[]").code, 3);
  EXPECT_EQ(run(model, "{}").code, 3);
  EXPECT_EQ(run(model, R"([["a.png"], [], 3])").code, 3);
  EXPECT_EQ(run(model, R"([[1], [], []])").code, 3);
  EXPECT_EQ(run(model, R"([["nothing.png"], [], []])").code, 3);
  EXPECT_EQ(run(model, Json({{list}, Json::array(), Json::array()}).dump()).code, 3);
  const RunResult fewer = run(model, Json({{image}, {image}, Json::array()}).dump());
  EXPECT_EQ(fewer.code, 2) << fewer.err;
  EXPECT_FALSE(std::filesystem::exists(scratch.path() / "out.safetensors"));
}

}  // namespace
}  // namespace quern
