// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "base/file.h"
#include "format/side_files.h"
#include "scratch.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

namespace quern {
namespace {

TEST(SideFiles, CopiesWhatBelongsToTheModelAndNothingElse) {
  const testing::ScratchDirectory source;
  const testing::ScratchDirectory target;
  const std::vector<std::string> wanted = {
      "LICENSE",
      "NOTICE.txt",
      "USE_POLICY.md",
      "added_tokens.json",
      "chat_template.jinja",
      "generation_config.json",
      "merges.txt",
      "preprocessor_config.json",
      "special_tokens_map.json",
      "tokenizer.json",
      "tokenizer.model",
      "tokenizer_config.json",
      "video_preprocessor_config.json",
      "vocab.json"};
  const std::vector<std::string> unwanted = {
      ".gitattributes",
      "README.md",
      "config.json",
      "model.gguf",
      "model.safetensors",
      "model.safetensors.index.json",
      "modeling_qwen.py",
      "pytorch_model.bin",
      "quantize_config.json",
      "rng_state.pth"};
  for (const auto* list : {&wanted, &unwanted}) {
    for (const std::string& name : *list) {
      write_file(source.path() / name, "content of " + name);
    }
  }
  std::filesystem::create_directory(source.path() / "onnx");
  std::filesystem::create_symlink(
      source.path() / "tokenizer.json", source.path() / "tokenizer_link.json");

  const SideFiles files = copy_side_files(source.path(), target.path());
  std::vector<std::string> expected = wanted;
  expected.push_back("tokenizer_link.json");  // the hub's cache is made of links
  std::sort(expected.begin(), expected.end());
  EXPECT_EQ(files.copied, expected);
  EXPECT_EQ(files.skipped.size(), unwanted.size() + 1);
  for (const SideFiles::Skipped& skipped : files.skipped) {
    EXPECT_FALSE(skipped.reason.empty()) << skipped.name;
    EXPECT_FALSE(std::filesystem::exists(target.path() / skipped.name));
    if (skipped.name == "modeling_qwen.py") {
      EXPECT_NE(skipped.reason.find("code"), std::string::npos);
    }
  }
  for (const std::string& name : wanted) {
    EXPECT_EQ(read_file(target.path() / name), "content of " + name);
  }
  EXPECT_THROW((void)copy_side_files(source.path(), source.path()), UsageError);
  EXPECT_THROW((void)copy_side_files(source.path() / "none", target.path()), IoError);
}

}  // namespace
}  // namespace quern
