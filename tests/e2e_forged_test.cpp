// SPDX-License-Identifier: Apache-2.0
#include "forged.h"
#include "forged_packed.h"
#include "forged_tokenizers.h"
#include "run_binary.h"
#include "scratch.h"

#include <gtest/gtest.h>

#include <string>

// Broken checkpoints and tokenizers given to the program: three lines, exit code 2 or 3, no crash.
namespace quern {
namespace {

using testing::error_of;
using testing::run_quern;
using testing::RunResult;
using testing::ScratchDirectory;

using Words = std::vector<std::string>;

void expect_refused(const std::string& name, const Words& words) {
  const RunResult result = run_quern(words);
  EXPECT_EQ(result.signal, 0) << name;
  EXPECT_TRUE(result.code == 2 || result.code == 3)
      << name << " " << words[0] << ": " << result.code << "\n"
      << result.err;
  EXPECT_FALSE(result.err.empty()) << name;
  EXPECT_EQ(result.err, error_of(result)) << name << " " << words[0];
  EXPECT_TRUE(result.out.empty()) << name << result.out;
}

TEST(ForgedThroughTheProgram, TheUnbrokenOnesAreAccepted) {
  std::vector<testing::ForgedCase> all = testing::good_checkpoints();
  for (const testing::ForgedCase& good : testing::good_packed_checkpoints()) {
    all.push_back(good);
  }
  for (const testing::ForgedCase& good : all) {
    const ScratchDirectory scratch;
    testing::write_files(scratch.path(), good.files);
    EXPECT_EQ(run_quern({"inspect", scratch.path()}).code, 0) << good.name;
    EXPECT_EQ(run_quern({"verify", scratch.path()}).code, 0) << good.name;
  }
}

TEST(ForgedThroughTheProgram, Checkpoints) {
  std::vector<testing::ForgedCase> cases = testing::forged_cases();
  EXPECT_GE(cases.size(), 100U);
  for (const testing::ForgedCase& forged : testing::forged_packed_cases()) {
    cases.push_back(forged);
  }
  for (const testing::ForgedCase& forged : cases) {
    const ScratchDirectory scratch;
    testing::write_files(scratch.path() / "model", forged.files);
    testing::write_input_ids(scratch.path() / "ids.safetensors", testing::some_ids(1, 4, 64));
    const std::string model = scratch.path() / "model";
    const std::string ids = scratch.path() / "ids.safetensors";
    const std::string out = scratch.path() / "out.safetensors";
    expect_refused(forged.name, {"logits", model, "--ids", ids, "-o", out});
    EXPECT_FALSE(std::filesystem::exists(out)) << forged.name;
  }
}

TEST(ForgedThroughTheProgram, CheckpointsToInspectAndVerify) {
  for (const testing::ForgedCase& forged : testing::forged_cases()) {
    const ScratchDirectory scratch;
    testing::write_files(scratch.path(), forged.files);
    // What lies in the values of a tensor is not read by these; whatever else must be refused.
    for (const char* verb : {"inspect", "verify"}) {
      const RunResult result = run_quern({verb, scratch.path()});
      EXPECT_EQ(result.signal, 0) << forged.name;
      EXPECT_TRUE(result.code == 0 || result.code == 1 || result.code == 3)
          << forged.name << " " << verb << ": " << result.code;
      if (result.code == 3) {
        EXPECT_EQ(result.err, error_of(result)) << forged.name << " " << verb;
      }
    }
  }
}

TEST(ForgedThroughTheProgram, Tokenizers) {
  for (const testing_files::ForgedTokenizer& forged : testing_files::forged_tokenizers()) {
    const ScratchDirectory scratch;
    testing::write_files(scratch.path(), forged.files);
    expect_refused(
        forged.name,
        {"tokenize", scratch.path(), "--text", forged.text.empty() ? "ab" : forged.text});
  }
}

}  // namespace
}  // namespace quern
