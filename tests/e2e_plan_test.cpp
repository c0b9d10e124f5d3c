// SPDX-License-Identifier: Apache-2.0
#include "run_binary.h"
#include "scratch.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <map>
#include <set>
#include <string>
#include <vector>

// Plans for a budget, through the program.
namespace quern {
namespace {

namespace fs = std::filesystem;

using testing::bundled_model;
using testing::calibration_ids;
using testing::error_of;
using testing::run_quern;
using testing::RunResult;
using testing::ScratchDirectory;

using Words = std::vector<std::string>;

class BudgetPlans : public ::testing::Test {
 protected:
  [[nodiscard]] std::string at(const std::string& name) const {
    return (scratch_.path() / name).string();
  }
  // Few options and no check: a second instead of half a minute.
  [[nodiscard]] RunResult run(const std::string& verb, const Words& more) const {
    Words words = {verb, model_, "--calibration", calibration_ids(), "--asymmetric", "--json"};
    words.insert(words.end(), more.begin(), more.end());
    if (std::find(more.begin(), more.end(), "--samples") == more.end()) {
      words.insert(words.end(), {"--samples", "2"});
    }
    return run_quern(words);
  }
  [[nodiscard]] RunResult plan(const Words& budget) const {
    Words words = {"--plan-bits", "2,4,8", "--group-size", "128", "--no-check"};
    words.insert(words.end(), budget.begin(), budget.end());
    return run("plan", words);
  }
  // Bits that the tensors of the quantized linears take per weight; from the headers of OUT.
  [[nodiscard]] static double linear_bits(const Json& manifest) {
    double weights = 0;
    double kept = 0;
    for (const Json& row : manifest["linears"]) {
      weights += row["shape"][0].get<double>() * row["shape"][1].get<double>();
    }
    for (const Json& row : manifest["kept"]) {
      kept += row["bytes"].get<double>();
    }
    return 8 * (manifest["bytes"].get<double>() - kept) / weights;
  }

  ScratchDirectory scratch_;
  std::string model_ = bundled_model("tiny-qwen2.5");
};

TEST_F(BudgetPlans, KeepTheirBudgetAndLoseLessWithMore) {
  double before = std::numeric_limits<double>::infinity();
  std::uint64_t smaller = 0;
  for (const double bits : {2.5, 3.3, 4.4, 7.0, 12.0}) {
    const RunResult result = plan({"--linear-bpw", std::to_string(bits)});
    ASSERT_EQ(result.code, 0) << result.err;
    const Json document = result.json();
    EXPECT_EQ(document["schema"], "quern.plan/1");
    EXPECT_EQ(document["budget"]["linear_bpw"].get<double>(), bits);
    EXPECT_GT(document["constraints"].size(), 2U);
    const auto bytes = document["predicted"]["bytes"].get<std::uint64_t>();
    const auto loss = document["predicted"]["kl"].get<double>();
    EXPECT_LE(loss, before) << bits;
    EXPECT_GE(bytes, smaller) << bits;
    before = loss;
    smaller = bytes;
    double weights = 0;
    double stored = 0;
    std::map<std::string, Json> of_site;
    for (const Json& linear : document["linears"]) {
      const std::string name = linear["name"];
      if (linear["role"] == "embedding") {
        EXPECT_EQ(linear["method"], "keep");  // not counted, so not touched
        continue;
      }
      ASSERT_EQ(linear["options"].size(), 3U) << name;
      EXPECT_GT(linear["sensitivity"].get<double>(), 0) << name;
      EXPECT_NE(linear["reason"].get<std::string>().find("mean sensitivity"), std::string::npos);
      weights += linear["shape"][0].get<double>() * linear["shape"][1].get<double>();
      for (const Json& option : linear["options"]) {
        stored += option["bits"] == linear["bits"] ? option["bytes"].get<double>() : 0.0;
      }
      // GPTQ readers merge q, k and v; gate and up.
      const std::string role = linear["role"];
      const std::string layer = name.substr(0, name.find(".", std::string("model.layers.").size()));
      const std::string site = role == "k" || role == "v" ? "q" : role == "up" ? "gate" : role;
      const Json& first = of_site.try_emplace(layer + site, linear["bits"]).first->second;
      EXPECT_EQ(first, linear["bits"]) << name;
    }
    EXPECT_LE(8 * stored / weights, bits);
    if (bits < 12) {
      EXPECT_GT(8 * stored / weights, bits - 0.5);  // no step of a unit is as large
    }
  }
}

TEST_F(BudgetPlans, PredictedBytesAreTheWrittenOnes) {
  const Words quick = {"--sweeps", "0", "--refits", "0", "--plan-bits", "2,3,8", "--no-check"};
  const auto quantize = [&](const std::string& out, const Words& budget) {
    Words words = {"-o", at(out), "--group-size", "128"};
    words.insert(words.end(), quick.begin(), quick.end());
    words.insert(words.end(), budget.begin(), budget.end());
    return run("quantize", words);
  };
  // Embeddings are 2.1 MB of this model, which is 8.4 MB.
  const RunResult sized = quantize("sized", {"--target-size", "3600000"});
  ASSERT_EQ(sized.code, 0) << sized.err;
  const Json made = sized.json();
  const auto bytes = made["bytes"].get<std::uint64_t>();
  EXPECT_EQ(sized.json()["predicted"]["bytes"].get<std::uint64_t>(), bytes);
  EXPECT_EQ(fs::file_size(at("sized/model.safetensors")), bytes);
  EXPECT_LE(bytes, 3600000U);
  EXPECT_GT(bytes, 3500000U);

  const RunResult linear = quantize("linear", {"--linear-bpw", "3.1"});
  ASSERT_EQ(linear.code, 0) << linear.err;
  EXPECT_LE(linear_bits(linear.json()), 3.1 + 0.05);  // the file's header is in it
  EXPECT_EQ(linear.json()["predicted"]["bytes"], linear.json()["bytes"]);

  const double whole = 8.0 * static_cast<double>(bytes) / made["parameters"].get<double>();
  const RunResult plan_again =
      run("plan",
          {"--group-size",
           "128",
           "--plan-bits",
           "2,3,8",
           "--no-check",
           "--bpw",
           std::to_string(whole + 1e-6)});
  ASSERT_EQ(plan_again.code, 0) << plan_again.err;
  EXPECT_EQ(plan_again.json()["predicted"]["bytes"].get<std::uint64_t>(), bytes);
}

TEST_F(BudgetPlans, AreFilesThatCanBeEditedObeyedAndExplained) {
  const Words words = {"--linear-bpw", "4", "-o", at("plan.json")};
  ASSERT_EQ(plan(words).code, 0);
  Json document = read_json(at("plan.json"));
  Json& down = document["linears"][6];
  EXPECT_TRUE(down["name"].get<std::string>().ends_with("0.mlp.down_proj"));
  down["bits"] = 3;  // none of its options
  down["reason"] = "because I say so";
  write_file(at("plan.json"), document.dump());
  const Words obey = {"--plan", at("plan.json"), "--sweeps", "0", "--refits", "0", "-o", at("out")};
  const RunResult result = run("quantize", obey);
  ASSERT_EQ(result.code, 0) << result.err;
  const Json manifest = result.json();
  ASSERT_EQ(manifest["linears"].size() + 1, document["linears"].size());  // but the embedding
  for (std::size_t i = 0; i < manifest["linears"].size(); ++i) {
    EXPECT_EQ(manifest["linears"][i]["bits"], document["linears"][i]["bits"]);
  }
  EXPECT_TRUE(manifest["predicted"]["kl"].is_null());  // not known of what was edited

  const auto explain = [&](const std::string& name) {
    return run_quern({"plan", model_, "--plan", at("plan.json"), "--explain", name});
  };
  const RunResult edited = explain("layers.0.mlp.down_proj");
  ASSERT_EQ(edited.code, 0) << edited.err;
  EXPECT_NE(edited.out.find("because I say so"), std::string::npos) << edited.out;
  const RunResult other = explain("model.layers.1.self_attn.o_proj");
  ASSERT_EQ(other.code, 0) << other.err;
  EXPECT_NE(other.out.find("mean sensitivity"), std::string::npos) << other.out;
  EXPECT_NE(other.out.find("-> gptq"), std::string::npos) << other.out;
  EXPECT_NE(other.out.find("nats per token"), std::string::npos) << other.out;
  EXPECT_EQ(explain("down_proj").code, 2);  // of which layer?
  EXPECT_EQ(explain("nothing").code, 2);
}

TEST_F(BudgetPlans, BelowTheFloorNameTheSmallest) {
  for (const std::string option : {"--linear-bpw", "--bpw", "--target-size", "--fit-ram"}) {
    const RunResult refused = plan({option, "1.5"});
    EXPECT_EQ(refused.code, 2) << option << refused.err;
    const std::string error = error_of(refused);
    EXPECT_NE(error.find("safety floor"), std::string::npos) << error;
    const std::size_t hint = error.find("try: " + option + " ");
    ASSERT_NE(hint, std::string::npos) << error;
    std::string value = error.substr(hint + 6 + option.size());
    value.erase(value.find_last_not_of("\n ") + 1);
    const RunResult taken = plan({option, value});
    EXPECT_EQ(taken.code, 0) << option << " " << value << taken.err;
    const Json document = taken.json();
    for (const Json& linear : document["linears"]) {
      EXPECT_EQ(linear.value("bits", 2), 2) << option;
    }
  }
}

TEST_F(BudgetPlans, CountTheTablesWhereTheFormatHoldsThem) {
  const auto table = [&](const Words& words) {
    const RunResult result = plan(words);
    EXPECT_EQ(result.code, 0) << result.err;
    const Json row = result.json()["linears"].back();
    EXPECT_EQ(row["role"], "embedding");
    return row;
  };
  // 2.1 MB in 16 bits: 8 of them buy every other linear more than they lose.
  const Json shared = table({"--format", "quern", "--target-size", "3MB"});
  EXPECT_EQ(shared["bits"], 8);
  EXPECT_EQ(shared["options"].size(), 2U);
  EXPECT_GT(shared["options"][0]["loss"].get<double>(), 0);
  EXPECT_EQ(shared["options"][1]["loss"].get<double>(), 0);
  EXPECT_EQ(table({"--format", "gptq", "--target-size", "4MB"})["method"], "keep");
  EXPECT_EQ(
      table({"--format", "quern", "--target-size", "4MB", "--embedding-bits", "16"})["method"],
      "keep");
  EXPECT_EQ(
      table({"--format", "quern", "--target-size", "4MB", "--embedding-bits", "6"})["bits"], 6);
}

TEST_F(BudgetPlans, AreTypesInGguf) {
  Words words = {"-o", at("out.gguf"), "--format", "gguf", "--target-size", "2700000"};
  for (const char* word : {"--sweeps", "0", "--refits", "0", "--plan-bits", "2,4", "--no-check"}) {
    words.emplace_back(word);
  }
  const RunResult result = run("quantize", words);
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(
      result.json()["predicted"]["bytes"].get<std::uint64_t>(), fs::file_size(at("out.gguf")));
  EXPECT_LE(fs::file_size(at("out.gguf")), 2700000U);
  std::set<int> widths;
  const Json made = result.json();
  for (const Json& linear : made["linears"]) {
    widths.insert(linear["bits"].get<int>());
  }
  EXPECT_EQ(widths, (std::set<int>{2, 4, 8}));
}

TEST_F(BudgetPlans, MemoryCountsTheCache) {
  const auto bytes = [&](const std::string& context) {
    const RunResult result = plan({"--fit-ram", "136MiB", "--fit-context", context});
    EXPECT_EQ(result.code, 0) << result.err;
    return result.json()["predicted"]["bytes"].get<std::uint64_t>();
  };
  EXPECT_GT(bytes("128"), bytes("5200"));
}

TEST_F(BudgetPlans, LossesAddUp) {
  const RunResult result = run(
      "plan", {"--samples", "20", "--plan-bits", "3,4", "--group-size", "64", "--linear-bpw", "4"});
  ASSERT_EQ(result.code, 0) << result.err;
  const Json check = result.json()["additivity"];
  ASSERT_EQ(check["predicted"].size(), check["measured"].size());
  ASSERT_GT(check["predicted"].size(), 5U);
  // methods.md 11.1 asks for more than 0.95 before a plan is trusted; two windows of text.
  EXPECT_GT(check["correlation"].get<double>(), 0.9) << check;
  EXPECT_GT(check["slope"].get<double>(), 0.6) << check;
  EXPECT_LT(check["slope"].get<double>(), 1.6) << check;
}

TEST_F(BudgetPlans, SameInputSamePlan) {
  const auto rows = [&](const std::string& threads) {
    const RunResult result = plan({"--linear-bpw", "3.5", "--threads", threads});
    EXPECT_EQ(result.code, 0) << result.err;
    return result.json()["linears"].dump();
  };
  EXPECT_EQ(rows("1"), rows("2"));
}

TEST_F(BudgetPlans, MisuseIsRefused) {
  const auto refused = [&](int code, const Words& words) {
    const RunResult result = run("plan", words);
    EXPECT_EQ(result.code, code) << result.err;
    EXPECT_FALSE(error_of(result).empty()) << result.err;
  };
  refused(2, {"--bpw", "4", "--linear-bpw", "4"});
  refused(2, {"--bpw", "4", "--plan", "x.json"});
  refused(2, {"--bpw", "nan"});
  refused(2, {"--linear-bpw", "-3"});
  refused(2, {"--target-size", "big"});
  refused(2, {"--fit-ram", "1TiB", "--fit-context", "0"});
  refused(2, {"--linear-bpw", "4", "--plan-bits", "1"});
  refused(2, {"--linear-bpw", "4", "--plan-bits", "4,x"});
  refused(2, {"--linear-bpw", "4", "--fused-alike", "--fused-apart"});
  refused(2, {"--linear-bpw", "4", "--plan-bits", "5"});  // GPTQ holds no linear so
}

}  // namespace
}  // namespace quern
