// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/json.h"
#include "format/checkpoint.h"
#include "format/safetensors.h"
#include "golden.h"
#include "nn/decoder.h"
#include "quant_fixture.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

namespace quern::testing {

using Ids = std::vector<std::int32_t>;

// "models/tiny-qwen3" below testdata/.
inline std::filesystem::path test_model(const std::string& name) {
  return std::filesystem::path(QUERN_TESTDATA) / name;
}

// A model with everything that runs it.
class RunningModel {
 public:
  explicit RunningModel(
      const std::filesystem::path& directory, int threads = 1, const std::string& isa = "")
      : context_(threads, isa),
        model_(load_model(open_checkpoint(directory))),
        decoder_(*context_, model_) {}
  RunningModel(const RunningModel&) = delete;
  RunningModel& operator=(const RunningModel&) = delete;

  [[nodiscard]] const Context& context() const { return *context_; }
  [[nodiscard]] const ModelConfig& config() const { return model_.graph.config; }
  Decoder& decoder() { return decoder_; }

  // Logits [ids, vocab] of the whole text at once.
  std::vector<float> logits(std::span<const std::int32_t> ids) {
    return logits_of(decoder_.forward(ids));
  }
  // The same through the cache, `chunk` tokens at a time.
  std::vector<float> logits_in_chunks(std::span<const std::int32_t> ids, std::size_t chunk) {
    Sequence sequence;
    std::vector<float> all;
    for (std::size_t begin = 0; begin < ids.size(); begin += chunk) {
      const auto part = ids.subspan(begin, std::min(chunk, ids.size() - begin));
      const std::vector<float> some = logits_of(decoder_.forward(part, sequence));
      all.insert(all.end(), some.begin(), some.end());
    }
    return all;
  }

 private:
  std::vector<float> logits_of(const std::vector<float>& hidden) {
    std::vector<float> all;
    decoder_.for_logits(hidden, [&](std::int64_t, std::int64_t rows, const float* logits) {
      all.insert(all.end(), logits, logits + rows * config().vocab_size);
    });
    return all;
  }

  TestContext context_;
  Model model_;
  Decoder decoder_;
};

// One text of a golden file: its ids and the reference's logits [ids, vocab].
struct GoldenText {
  std::string name;
  Ids ids;
  std::vector<float> logits;
};

// The texts whose logits are in golden/logits.safetensors.
inline std::vector<GoldenText> golden_texts(const std::filesystem::path& directory) {
  const Json ids = read_json(directory / "golden/ids.json");
  const auto store = SafetensorsStore::open(directory / "golden/logits.safetensors");
  std::vector<GoldenText> texts;
  for (const auto& [name, view] : store->tensors()) {
    const std::size_t index = std::stoul(name.substr(std::string("logits.").size()));
    texts.push_back({name, ids.at(index).get<Ids>(), values_of<float>(view)});
  }
  return texts;
}

// The largest difference over the largest value of `expected`; infinity for another length or a
// value that is no number.
inline double relative_difference(
    const std::vector<float>& values, const std::vector<float>& expected) {
  if (values.size() != expected.size()) {
    return HUGE_VAL;
  }
  double difference = 0;
  double largest = 0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const double d = std::fabs(static_cast<double>(values[i]) - expected[i]);
    difference = d <= difference ? difference : std::isnan(d) ? HUGE_VAL : d;
    largest = std::max(largest, std::fabs(static_cast<double>(expected[i])));
  }
  return difference / largest;
}

// A model's directory as a test name: letters and digits.
inline std::string test_name(const std::string& directory) {
  std::string name = std::filesystem::path(directory).filename().string();
  std::replace_if(
      name.begin(), name.end(), [](char c) { return c == '-' || c == '.'; }, '_');
  return name;
}

}  // namespace quern::testing
