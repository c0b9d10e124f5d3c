// SPDX-License-Identifier: Apache-2.0
#include "run_binary.h"
#include "scratch.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>

// What people type, and mistype.
namespace quern {
namespace {

namespace fs = std::filesystem;

using testing::bundled_model;
using testing::error_of;
using testing::ForgedFile;
using testing::run_quern;
using testing::RunResult;
using testing::ScratchDirectory;

using Words = std::vector<std::string>;

class CommandLine : public ::testing::Test {
 protected:
  [[nodiscard]] std::string at(const std::string& name) const {
    return (scratch_.path() / name).string();
  }
  [[nodiscard]] std::string file(const std::string& name, const std::string& content) const {
    write_file(at(name), content);
    return at(name);
  }
  // Three lines, this exit code, this in the lines.
  static void refused(int code, const Words& words, const std::string& part = "") {
    const RunResult result = run_quern(words);
    std::string typed;
    for (const std::string& word : words) {
      typed += word.substr(0, 60) + " ";
    }
    EXPECT_EQ(result.code, code) << typed << "\n" << result.err;
    EXPECT_EQ(result.signal, 0) << typed;
    EXPECT_FALSE(error_of(result).empty()) << typed << "\n" << result.err;
    EXPECT_NE(error_of(result).find(part), std::string::npos) << typed << "\n" << result.err;
    EXPECT_TRUE(result.out.empty()) << typed << result.out;
  }
  void refused_quantize(int code, const Words& more, const std::string& part = "") const {
    Words words = {"quantize", model_, "-o", at("out")};
    words.insert(words.end(), more.begin(), more.end());
    refused(code, words, part);
    EXPECT_FALSE(fs::exists(at("out")));
  }

  ScratchDirectory scratch_;
  std::string model_ = bundled_model("tiny-qwen2.5");
};

TEST_F(CommandLine, VerbsAndOptions) {
  refused(2, {}, "no verb");
  refused(2, {"quantise", "x"}, "try: quern quantize");
  refused(2, {"tokenise", "x"}, "try: quern tokenize");
  refused(2, {"--threads", "2", "evel"}, "unknown verb");
  refused(2, {"--threads", "2", "quantize", "--bogus"}, "quern quantize");
  refused(2, {"quantize", "-o", "out"}, "MODEL");
  refused(2, {"quantize", model_}, "--output");
  refused(2, {"quantize", model_, "extra", "-o", "out"}, "extra");
  refused_quantize(2, {"--bogus"}, "--bogus");
  refused_quantize(2, {"--bits", "9"}, "2 to 8");
  refused_quantize(2, {"--bits", "0"}, "2 to 8");
  refused_quantize(2, {"--bits", "1"}, "2 to 8");
  refused_quantize(2, {"--bits", "-4"});
  refused_quantize(2, {"--bits", "4.5"});
  refused_quantize(2, {"--bits", "99999999999999999999"});
  refused_quantize(2, {"--bits", "four"});
  refused_quantize(2, {"--group-size", "0"}, "group size");
  refused_quantize(2, {"--group-size", "-5"}, "group size");
  refused_quantize(2, {"--group-size", "abc"}, "group size");
  refused_quantize(2, {"--group-size", ""}, "group size");
  refused_quantize(2, {"--group-size", "128x"}, "group size");
  refused_quantize(3, {"--group-size", "48"}, "group size");
  refused_quantize(2, {"--method", "magic"}, "rtn");
  refused_quantize(3, {"--format", "exl3"}, "gptq_v2");
  refused_quantize(2, {"--recipe", "magic"}, "rtn");
  refused_quantize(2, {"--recipe", ""}, "rtn");
  refused_quantize(2, {"--method", "rtn", "--recipe", "gptq"});
  refused_quantize(2, {"--method", "billm", "--bits", "4"}, "1 to 1");
  refused_quantize(2, {"--method", "smoothquant", "--bits", "3"}, "4 to 8");
  refused_quantize(2, {"--activation-bits", "7"});
  refused_quantize(2, {"--activation-scale", "fixed"});
  refused_quantize(2, {"--range", "widest"});
  refused_quantize(2, {"--asymmetry", "2"});
  refused_quantize(3, {"--activation-bits", "8"}, "weights only");
  refused_quantize(2, {"--symmetric", "--asymmetric"});
  refused_quantize(2, {"--order", "random"});
  refused_quantize(2, {"--damping", "nan"});
  refused_quantize(2, {"--damping", "-1"});
  refused_quantize(2, {"--samples", "0"});
  refused_quantize(2, {"--sequence-length", "1"});
  refused_quantize(2, {"--shard-size", "junk"});
  refused_quantize(2, {"--memory", "junk"});
  refused_quantize(2, {"--memory", "-1GB"});
  refused_quantize(4, {"--memory", "1MB"}, "try: --memory ");
  refused_quantize(2, {"--threads", "0"});
  refused_quantize(2, {"--isa", "foo"}, "scalar, avx2 or avx512");
  refused_quantize(2, {"--seed", "-1"});
  refused_quantize(2, {"--log-format", "xml"});
  refused(2, {"generate", model_, "--prompt", "a", "--temperature", "nan"});
  refused(2, {"generate", model_, "--prompt", ""}, "no tokens");
}

TEST_F(CommandLine, Models) {
  for (const char* verb : {"inspect", "verify"}) {
    refused(3, {verb, at("nope")}, "no such model");
    refused(3, {verb, ""}, "no such model");
    refused(3, {verb, std::string(5000, 'a')}, "no such model");
    refused(3, {verb, at("no.gguf")});
    refused(3, {verb, file("forged.gguf", "GGUF")}, "GGUF");
    refused(3, {verb, scratch_.path()}, "config.json");
    refused(6, {verb, "organisation/no-such-model"}, "cache");
    refused(6, {verb, "organisation/no-such-model@v1"}, "cache");
    refused(3, {verb, "organisation/no-such-model@../../x"});
  }
  refused(3, {"verify", model_, "--against", at("nope")});
  refused(3, {"tokenize", at("nope"), "--text", "a"});
  refused(3, {"tokenize", scratch_.path(), "--text", "a"});
}

TEST_F(CommandLine, Calibration) {
  refused_quantize(3, {"--calibration", at("nope.txt")}, "nope.txt");
  refused_quantize(3, {"--calibration", at("nope.safetensors")}, "nope.safetensors");
  refused_quantize(2, {"--calibration", file("empty.txt", "")}, "too short");
  refused_quantize(2, {"--calibration", file("empty.jsonl", "")}, "too short");
  refused_quantize(2, {"--calibration", file("short.txt", "a few words")}, "too short");
  refused_quantize(3, {"--calibration", file("garbage.jsonl", "\x01\xff{")}, "line 1");
  refused_quantize(3, {"--calibration", file("key.jsonl", "{\"a\": 1}\n")}, "line 1");
  refused_quantize(3, {"--calibration", file("type.jsonl", "{\"text\": 1}\n")}, "line 1");
  refused_quantize(3, {"--calibration", file("empty.txt.gz", "")});
  refused_quantize(3, {"--calibration", file("garbage.txt.gz", "garbage")});
  refused_quantize(3, {"--calibration", file("garbage.txt.zst", "garbage")});
  refused_quantize(2, {"--calibration", file("what.pdf", "%PDF")}, ".jsonl");
  refused_quantize(2, {"--calibration", at("empty.txt") + ":0"}, "weight");
  refused_quantize(2, {"--calibration", at("empty.txt") + ":nan"}, "weight");
  refused_quantize(2, {"--calibration", at("empty.txt") + ":inf"}, "weight");
  refused_quantize(3, {"--calibration", file("empty.safetensors", "")});
  const auto ids = [&](const std::string& name,
                       const std::vector<std::vector<std::int64_t>>& rows) {
    testing::write_input_ids(at(name), rows);
    return at(name);
  };
  refused_quantize(3, {"--calibration", ids("none.safetensors", {})}, "not empty");
  refused_quantize(2, {"--calibration", ids("large.safetensors", {{1, 4096}})}, "4096");
  refused_quantize(3, {"--calibration", ids("negative.safetensors", {{1, -1}})}, "-1");
  refused_quantize(3, {"--calibration", ids("huge.safetensors", {{1, INT64_MAX}})});
  ForgedFile wide;
  wide.add("input_ids", "I64", {std::int64_t{1} << 40, 0}, "");
  refused_quantize(
      3, {"--calibration", file("wide.safetensors", testing::put_together(wide))}, "not empty");
  ForgedFile floats;
  floats.add("input_ids", "F32", {1, 2}, std::string(8, '\0'));
  refused_quantize(3, {"--calibration", file("floats.safetensors", testing::put_together(floats))});
  refused_quantize(
      2, {"--calibration", testing::calibration_ids(), "--calibration", at("empty.txt")}, "mixed");
}

TEST_F(CommandLine, Outputs) {
  const Words ids = {"--calibration", testing::calibration_ids(), "--samples", "1"};
  const auto to = [&](int code, const std::string& out, const std::string& part) {
    Words words = {"quantize", model_, "-o", out};
    words.insert(words.end(), ids.begin(), ids.end());
    refused(code, words, part);
  };
  to(1, "/proc/nowhere/out", "/proc/nowhere");
  to(1, file("plain", "x") + "/out", "Not a directory");
  to(2, at("plain"), "not empty");
  to(2, at(std::string(300, 'x')), "name");
  fs::create_symlink("nowhere", at("dangling"));
  to(2, at("dangling"), "link");
  refused(2, {"plan", model_, "-o", scratch_.path()}, "directory");
  refused(1, {"logits", model_, "--ids", file("i.json", "[[1]]"), "-o", at("no/x")}, "write");
}

TEST_F(CommandLine, Logits) {
  const auto with = [&](int code, const std::string& text) {
    refused(code, {"logits", model_, "--ids", file("ids.json", text), "-o", at("x.safetensors")});
    EXPECT_FALSE(fs::exists(at("x.safetensors")));
  };
  for (const char* text :
       {"",
        "x",
        "[]",
        "{}",
        "[1]",
        "[[]]",
        "[[1], []]",
        "[[1.5]]",
        "[[-1]]",
        "[[\"a\"]]",
        "[[null]]",
        "[[[1]]]",
        "[[4294967296]]",
        "[[18446744073709551615]]",
        "[[1e400]]",
        "[[1]] x"}) {
    with(3, text);
  }
  with(2, "[[4096]]");
  with(2, "[[1, 2], [99999]]");
  refused(3, {"logits", model_, "--ids", at("nope.json"), "-o", at("x.safetensors")});
  EXPECT_EQ(std::distance(fs::directory_iterator(scratch_.path()), fs::directory_iterator()), 1);
}

TEST_F(CommandLine, Texts) {
  const std::string text = file("text.txt", std::string(3000, 'a'));
  refused(2, {"eval", model_, "--perplexity", file("short.txt", "a few words")}, "shorter");
  refused(3, {"eval", model_, "--perplexity", at("nope.txt")}, "nope.txt");
  refused(3, {"eval", model_, "--perplexity", scratch_.path()}, "directory");
  refused(2, {"eval", model_, "--perplexity", text, "--context", "1"});
  // The second half of two tokens predicts nothing.
  Words none = {"eval", model_, "--perplexity", text, "--protocol", "llama.cpp", "--context", "2"};
  refused(2, none, "--context 2");
  none.insert(none.end(), {"--reference", model_});
  refused(2, none, "--context 2");
  none[7] = "3";
  EXPECT_EQ(run_quern(none).code, 0);
  refused(2, {"tokenize", model_}, "nothing to tokenize");
  refused(2, {"tokenize", model_, "--text", "a", "--file", text}, "exactly one");
  refused(3, {"tokenize", model_, "--file", text}, "line 1");
  EXPECT_EQ(run_quern({"tokenize", model_, "--text", ""}).out, "{\"ids\":[]}\n");
  refused(3, {"report", at("nope")});
  refused(3, {"report", file("object.json", "{}")}, "manifest");
  refused(3, {"report", file("list.json", "[]")}, "manifest");
}

// Two texts of one name do not hide each other.
TEST_F(CommandLine, TextsOfTheSameName) {
  fs::create_directories(at("a"));
  fs::create_directories(at("b"));
  const std::string first = file("a/text.txt", "one two three four five six seven");
  const std::string second = file("b/text.txt", "red green blue red green blue red");
  const RunResult result = run_quern(
      {"eval", model_, "--perplexity", first, "--perplexity", second, "--context", "4", "--json"});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(result.json()["perplexity"].size(), 2U);
}

TEST_F(CommandLine, HelpShowsExamplesAndExitCodes) {
  for (const char* verb :
       {"quantize",
        "plan",
        "inspect",
        "eval",
        "verify",
        "report",
        "generate",
        "logits",
        "tokenize",
        "info",
        "doctor"}) {
    const RunResult result = run_quern({verb, "--help"});
    EXPECT_EQ(result.code, 0) << verb;
    EXPECT_NE(result.out.find("Examples:\n  quern " + std::string(verb)), std::string::npos);
    EXPECT_NE(result.out.find("Exit codes: 0 done"), std::string::npos) << verb;
    EXPECT_TRUE(result.err.empty()) << verb;
  }
  EXPECT_EQ(run_quern({"--help"}).code, 0);
  EXPECT_EQ(run_quern({"--version"}).code, 0);
}

TEST_F(CommandLine, EveryVerbPrintsOneDocument) {
  const auto document = [](const Words& words, const Words& keys) {
    Words json = words;
    json.emplace_back("--json");
    const RunResult result = run_quern(json);
    EXPECT_TRUE(result.code == 0 || words[0] == "doctor") << words[0] << result.err;
    const Json parsed = result.json();  // throws unless it is one document and nothing else
    EXPECT_EQ(parsed["schema"], "quern." + words[0] + "/1");
    for (const std::string& key : keys) {
      EXPECT_TRUE(parsed.contains(key)) << words[0] << ": " << key;
    }
  };
  document({"info"}, {"version", "isa", "kernels", "methods", "formats"});
  document({"doctor"}, {"ok", "findings"});
  document(
      {"inspect", model_},
      {"model", "architecture", "family", "parameters", "tensors", "bytes", "layers", "hazards"});
  document({"plan", model_}, {"model", "budget", "predicted", "linears", "constraints"});
  document(
      {"generate", model_, "--prompt", "Once", "--max-tokens", "2"},
      {"prompt_ids",
       "ids",
       "text",
       "finish_reason",
       "prompt_tokens_per_second",
       "tokens_per_second",
       "accepted_draft_tokens",
       "drafted_tokens"});
  document({"tokenize", model_, "--text", "Hello"}, {"ids"});
  document({"verify", model_}, {"problems"});
  document(
      {"logits", model_, "--ids", file("ids.json", "[[1, 2]]"), "-o", at("x.safetensors")},
      {"router_ties"});
}

// A model that computes NaN has no perplexity, no divergence and no second moments.
TEST_F(CommandLine, ModelsThatComputeNaN) {
  const std::string model = at("model");
  fs::copy(model_, model, fs::copy_options::recursive);
  std::string weights = read_file(model + "/model.safetensors");
  const std::size_t header = *reinterpret_cast<const std::uint64_t*>(weights.data());
  const Json entries = Json::parse(weights.substr(8, header));
  const Json& offsets = entries["model.layers.1.input_layernorm.weight"]["data_offsets"];
  for (std::size_t i = offsets[0]; i < offsets[1].get<std::size_t>(); i += 2) {
    weights.replace(8 + header + i, 2, "\xc0\x7f");
  }
  write_file(model + "/model.safetensors", weights);
  const std::string text = file("text.txt", std::string(3000, 'a'));
  const std::string found = "not finite";
  refused(3, {"eval", model, "--perplexity", text, "--context", "8"}, found);
  refused(3, {"eval", model_, "--reference", model, "--perplexity", text, "--context", "8"}, found);
  refused(
      3,
      {"quantize",
       model,
       "-o",
       at("out"),
       "--calibration",
       testing::calibration_ids(),
       "--samples",
       "1"},
      found);
  EXPECT_EQ(run_quern({"verify", model}).code, 1);
}

TEST_F(CommandLine, NowhereToPrint) {
  const auto shell = [](const std::string& redirection) {
    const std::string command = std::string(QUERN_BINARY) + " info --json " + redirection;
    return WEXITSTATUS(std::system(command.c_str()));  // NOLINT(concurrency-mt-unsafe)
  };
  EXPECT_EQ(shell(">/dev/full 2>/dev/null"), 1);
  EXPECT_EQ(shell(">&- 2>&-"), 0);
  EXPECT_EQ(shell(">/dev/null"), 0);
}

}  // namespace
}  // namespace quern
