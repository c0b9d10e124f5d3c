// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "forged.h"
#include "forged_packed.h"
#include "format/checkpoint.h"
#include "quant/packed_linear.h"
#include "scratch.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <string>

namespace quern {
namespace {

using testing::ForgedCase;
using testing::ScratchDirectory;

// Reads everything that an engine would.
void load(const std::filesystem::path& directory) {
  const auto checkpoint = open_checkpoint(directory);
  for (const testing::ForgedPlain& plain : testing::forged_plain_tensors()) {
    (void)checkpoint->tensors().require(plain.name, plain.shape);
  }
  for (const testing::ForgedLinear& linear : testing::forged_linears()) {
    (void)checkpoint->load_linear(linear.name, linear.out, linear.in);
  }
}

std::vector<ForgedCase> joined(std::vector<ForgedCase> a, const std::vector<ForgedCase>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

TEST(Forged, TheUnbrokenCheckpointsLoad) {
  for (const ForgedCase& good :
       joined(testing::good_checkpoints(), testing::good_packed_checkpoints())) {
    const ScratchDirectory scratch;
    testing::write_files(scratch.path(), good.files);
    EXPECT_NO_THROW(load(scratch.path())) << good.name;
    const auto checkpoint = open_checkpoint(scratch.path());
    EXPECT_EQ(checkpoint->format(), good.name);
    const testing::ForgedLinear linear = testing::forged_linears().front();
    EXPECT_EQ(checkpoint->is_quantized(linear.name), good.name != "dense");
    const StoredLinear stored = checkpoint->load_linear(linear.name, linear.out, linear.in);
    EXPECT_EQ(stored.quantized != nullptr, good.name != "dense");
    EXPECT_NE(stored.quantized != nullptr, stored.dense.has_value());
  }
}

TEST(Forged, EveryLieIsAnErrorOfThreeLines) {
  EXPECT_GE(testing::forged_cases().size(), 100U);
  EXPECT_GE(testing::forged_packed_cases().size(), 80U);
  const std::vector<ForgedCase> cases =
      joined(testing::forged_cases(), testing::forged_packed_cases());
  std::set<std::string> names;
  for (const ForgedCase& forged : cases) {
    EXPECT_TRUE(names.insert(forged.name).second) << forged.name << " stands twice";
    const ScratchDirectory scratch;
    testing::write_files(scratch.path(), forged.files);
    try {
      load(scratch.path());
      ADD_FAILURE() << forged.name << ": was accepted";
    } catch (const Error& error) {
      const int code = exit_code(error.kind());
      EXPECT_TRUE(code == 2 || code == 3) << forged.name << ": exit code " << code;
      const std::string text = error.three_lines();
      EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 3) << forged.name << '\n' << text;
      EXPECT_FALSE(error.failed().empty() || error.reason().empty() || error.hint().empty())
          << forged.name << '\n'
          << text;
      if (std::getenv("QUERN_SHOW_ERRORS") != nullptr) {  // NOLINT(concurrency-mt-unsafe)
        std::cout << "[" << forged.name << "]\n" << text;
      }
    } catch (const std::exception& error) {
      ADD_FAILURE() << forged.name << ": " << error.what();
    }
  }
}

}  // namespace
}  // namespace quern
