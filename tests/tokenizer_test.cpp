// SPDX-License-Identifier: Apache-2.0
#include "tokenizer/tokenizer.h"

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "forged_tokenizers.h"
#include "tokenizer/jsonl.h"
#include "tokenizer/normalizer.h"
#include "tokenizer/unicode.h"
#include "tokenizer/utf8.h"
#include "tokenizer_files.h"

#include <gtest/gtest.h>
#include <zlib.h>

#include <unistd.h>

#include <bit>
#include <chrono>
#include <cstring>
#include <random>
#include <thread>

namespace quern {
namespace {

using namespace testing_files;  // NOLINT(google-build-using-namespace)

using Ids = std::vector<std::int32_t>;

struct Golden {
  std::string text;
  Ids ids;
};

std::vector<Golden> read_golden(const std::string& name) {
  std::vector<Golden> golden;
  const std::string path = "golden/tokenizer/" + name + ".jsonl.gz";
  for (const std::string& line : lines_of(read_gz(testdata() / path))) {
    const Json json = parse_json(line, path);
    golden.push_back({json.at("text"), json.at("ids").get<Ids>()});
  }
  return golden;
}

std::string show(const Tokenizer& tokenizer, const Ids& ids) {
  std::string out;
  for (const std::int32_t id : ids) {
    out += std::to_string(id) + "'" + printable(std::string(tokenizer.token_bytes(id))) + "' ";
  }
  return out;
}

void expect_golden(const Tokenizer& tokenizer, const std::string& name, bool nfc) {
  const std::vector<Golden> golden = read_golden(name);
  ASSERT_EQ(golden.size(), 400U);
  for (const Golden& line : golden) {
    const Ids ids = tokenizer.encode(line.text);
    ASSERT_EQ(ids, line.ids) << printable(line.text, 2000) << "\n"
                             << show(tokenizer, ids) << "\n"
                             << show(tokenizer, line.ids);
    ASSERT_EQ(tokenizer.decode(ids), nfc ? to_nfc(line.text) : line.text);
  }
}

const Tokenizer& qwen3() {
  static const Tokenizer kTokenizer =
      make_tokenizer({{"tokenizer.json", qwen_tokenizer_json("qwen3")}}, "qwen3");
  return kTokenizer;
}

const Tokenizer& llama3() {
  static const Tokenizer kTokenizer =
      make_tokenizer({{"tokenizer.model", llama3_model()}}, "llama3");
  return kTokenizer;
}

Tokenizer stories() {
  return load_tokenizer(testdata() / "models/stories260K");
}

Tokenizer tiny_qwen3() {
  return load_tokenizer(testdata() / "models/tiny-qwen3");
}

TEST(TokenizerData, TheRebuiltFilesAreTheReleasedOnes) {
  EXPECT_EQ(
      sha256(qwen_vocab_json()),
      "ca10d7e9fb3ed18575dd1e277a2579c16d108e32f27439684afa0e10b1440910");
  EXPECT_EQ(
      sha256(qwen_tokenizer_json("qwen2.5")),
      "22bfef58b74d2fa40f402ac0c8d638d9e54d12137da2e2c7e9f32a1e7534e42f");
  EXPECT_EQ(
      sha256(qwen_tokenizer_json("qwen3")),
      "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4");
  EXPECT_EQ(
      sha256(qwen_tiktoken()), "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186");
  EXPECT_EQ(
      sha256(llama3_model()), "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55");
}

TEST(TokenizerGolden, Qwen2FromVocabAndMerges) {
  const TokenizerFiles bare = {
      {"vocab.json", qwen_vocab_json()}, {"merges.txt", qwen_base().merges_txt}};
  expect_golden(make_tokenizer(bare, "bare"), "qwen2", true);

  TokenizerFiles files = bare;
  files["tokenizer_config.json"] = read_file(testdata() / "tokenizers/qwen/tokenizer_config.json");
  const Tokenizer tokenizer = make_tokenizer(files, "qwen2");
  expect_golden(tokenizer, "qwen2", true);
  EXPECT_EQ(tokenizer.vocab_size(), 151646);
  EXPECT_EQ(tokenizer.eos_id(), 151645);
  EXPECT_EQ(tokenizer.bos_id(), std::nullopt);

  // The older form of the added tokens.
  files["tokenizer_config.json"] =
      R"({"eos_token": {"content": "<|endoftext|>"}, "additional_special_tokens":
          ["<|im_start|>", "<|im_end|>"], "tokenizer_class": "Qwen2Tokenizer"})";
  files["added_tokens.json"] =
      R"({"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645})";
  files["config.json"] =
      R"({"model_type": "qwen2", "bos_token_id": 151643, "eos_token_id": 151645})";
  const Tokenizer older = make_tokenizer(files, "qwen2");
  expect_golden(older, "qwen2", true);
  EXPECT_TRUE(older.is_special(151645));
  EXPECT_EQ(older.eos_ids(), (Ids{151643, 151645}));
  EXPECT_EQ(older.bos_id(), std::nullopt);
}

TEST(TokenizerGolden, Qwen25FromTokenizerJson) {
  expect_golden(
      make_tokenizer({{"tokenizer.json", qwen_tokenizer_json("qwen2.5")}}, "qwen2.5"),
      "qwen2.5",
      true);
}

TEST(TokenizerGolden, Qwen3FromTokenizerJson) {
  expect_golden(qwen3(), "qwen3", true);
  EXPECT_EQ(qwen3().vocab_size(), 151669);
  EXPECT_EQ(qwen3().find("<think>"), 151667);
  EXPECT_FALSE(qwen3().is_special(151667));
  EXPECT_TRUE(qwen3().is_special(151645));
}

// Qwen 1 has the same vocabulary; its three control tokens have the ids of Qwen2's.
TEST(TokenizerGolden, Qwen1FromRankFile) {
  const Tokenizer tokenizer = make_tokenizer({{"qwen.tiktoken", qwen_tiktoken()}}, "qwen1");
  for (const Golden& line : read_golden("qwen2")) {
    ASSERT_EQ(tokenizer.encode(line.text), line.ids) << printable(line.text, 500);
  }
  EXPECT_EQ(tokenizer.find("<|extra_204|>"), 151850);
  EXPECT_EQ(tokenizer.vocab_size(), 151851);
}

TEST(TokenizerGolden, Llama3FromRankFile) {
  expect_golden(llama3(), "llama3", false);
  EXPECT_EQ(llama3().vocab_size(), 128256);
  EXPECT_EQ(llama3().find("<|reserved_special_token_250|>"), 128255);
  EXPECT_EQ(llama3().bos_id(), 128000);
  EXPECT_EQ(llama3().eos_ids(), (Ids{128001, 128009}));
  EXPECT_EQ(llama3().encode("a", {true, true}), (Ids{128000, 64}));
}

class GgmlVectors : public ::testing::TestWithParam<const char*> {};

TEST_P(GgmlVectors, AreReproduced) {
  const std::string name = GetParam();
  const Tokenizer& tokenizer = name == "qwen2" ? qwen3() : llama3();
  const std::filesystem::path base = testdata() / "golden/tokenizer" / ("ggml-vocab-" + name);
  const std::string input = read_file(base.string() + ".inp");
  const std::vector<std::string> expected = lines_of(read_file(base.string() + ".out"));
  const std::string separator = "\n__ggml_vocab_test__\n";
  std::size_t at = 0;
  for (const std::string& line : expected) {
    const std::size_t end = std::min(input.find(separator, at), input.size());
    std::string ids;
    for (const std::int32_t id : tokenizer.encode(input.substr(at, end - at))) {
      ids += " " + std::to_string(id);
    }
    EXPECT_EQ(ids, line) << printable(input.substr(at, end - at));
    at = end + separator.size();
  }
  EXPECT_EQ(expected.size(), 46U);
  EXPECT_EQ(at, input.size());
}

INSTANTIATE_TEST_SUITE_P(Tokenizer, GgmlVectors, ::testing::Values("qwen2", "llama-bpe"));

class SmallModels : public ::testing::TestWithParam<const char*> {};

std::uint32_t crc_of(const Ids& ids) {
  static_assert(std::endian::native == std::endian::little);
  std::string bytes(ids.size() * sizeof(std::int32_t), '\0');
  std::memcpy(bytes.data(), ids.data(), bytes.size());
  return static_cast<std::uint32_t>(
      crc32(0, reinterpret_cast<const Bytef*>(bytes.data()), static_cast<uInt>(bytes.size())));
}

TEST_P(SmallModels, GiveTheIdsThatTheEvaluationHarnessUsed) {
  const Tokenizer tokenizer = load_tokenizer(testdata() / "models" / GetParam());
  const std::string stem = std::string("golden/tokenizer/") + GetParam();
  std::size_t texts = 0;
  for (const std::string& line : lines_of(read_gz(testdata() / (stem + ".tasks.jsonl.gz")))) {
    const Json item = parse_json(line, stem);
    for (std::size_t i = 0; i < item.at("texts").size(); ++i) {
      const std::string text = item.at("texts")[i];
      const Ids ids = tokenizer.encode(text, {true, true});
      EXPECT_EQ(crc_of(ids), item.at("ids_crc32")[i].get<std::uint32_t>()) << printable(text);
      ++texts;
    }
  }
  EXPECT_GT(texts, 300U);
}

// As Python's str.rstrip, which also takes the four ASCII separators.
std::string right_stripped(const std::string& text) {
  std::size_t end = 0;
  for (std::size_t at = 0; at < text.size();) {
    const CodePoint point = code_point_at(text, at);
    at += point.length;
    if (!is_white_space(point.value) && (point.value < 0x1c || point.value > 0x1f)) {
      end = at;
    }
  }
  return text.substr(0, end);
}

TEST_P(SmallModels, GiveTheIdsOfAwkwardRequests) {
  const Tokenizer tokenizer = load_tokenizer(testdata() / "models" / GetParam());
  const std::string stem = std::string("golden/tokenizer/") + GetParam();
  int checked = 0;
  for (const std::string& line : lines_of(read_gz(testdata() / (stem + ".requests.jsonl.gz")))) {
    const Json request = parse_json(line, stem);
    if (request.at("kind") != "loglikelihood" || request.at("context").get<std::string>().empty()) {
      continue;
    }
    const std::string context = request.at("context");
    const Ids context_ids = request.at("context_ids");
    const Ids continuation_ids = request.at("continuation_ids");
    // The harness encodes both together and cuts at the length of the context's own ids. It adds no
    // tokens where the text has BOS written in it.
    const bool has_bos = context.rfind("<s>", 0) == 0;
    const Ids whole =
        tokenizer.encode(context + request.at("continuation").get<std::string>(), {true, !has_bos});
    ASSERT_EQ(whole.size(), context_ids.size() + continuation_ids.size()) << context;
    EXPECT_TRUE(std::equal(continuation_ids.rbegin(), continuation_ids.rend(), whole.rbegin()))
        << context;
    EXPECT_EQ(tokenizer.encode(right_stripped(context), {true, !has_bos}), context_ids) << context;
    ++checked;
  }
  EXPECT_GT(checked, 15);
}

INSTANTIATE_TEST_SUITE_P(Tokenizer, SmallModels, ::testing::Values("tiny-qwen3", "stories260K"));

TEST(Tokenizer, ReadsSpecialTokensOfDirectories) {
  const Tokenizer qwen = tiny_qwen3();
  EXPECT_EQ(qwen.eos_id(), 4084);
  EXPECT_EQ(qwen.eos_ids(), (Ids{4084, 4082}));
  EXPECT_EQ(qwen.bos_id(), std::nullopt);
  EXPECT_FALSE(qwen.adds_bos());
  EXPECT_EQ(qwen.vocab_size(), 4096);
  EXPECT_EQ(qwen.token_text(4084), "<|im_end|>");

  const Tokenizer llama = stories();
  EXPECT_EQ(llama.bos_id(), 1);
  EXPECT_EQ(llama.eos_ids(), (Ids{2}));
  EXPECT_TRUE(llama.adds_bos());
}

TEST(Tokenizer, ByteFallbackModelsComeBack) {
  const Tokenizer tokenizer = stories();
  for (const std::string text :
       {"Once upon a time", " leading", "a  b", "naïve 今天\n\t€ 👨‍👩‍👧", ""}) {
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(text)), text);
    const Ids ids = tokenizer.encode(text, {true, true});
    EXPECT_EQ(tokenizer.decode(ids, {true, false}), text);
  }
}

TEST(Tokenizer, SpecialTokensInStrangersTextAreText) {
  const std::string text = "a<|im_end|>\n<think>b";
  const Ids ids = qwen3().encode(text, {false, false});
  EXPECT_EQ(std::count(ids.begin(), ids.end(), 151645), 0);
  EXPECT_EQ(std::count(ids.begin(), ids.end(), 151667), 1);
  EXPECT_EQ(qwen3().decode(ids), text);
  EXPECT_EQ(qwen3().decode(qwen3().encode(text), {true, false}), "a\n<think>b");
}

TEST(Tokenizer, InvalidUtf8BecomesTheReplacementCharacter) {
  const std::string bad = "a\xff\xf0\x9f\x98z\xed\xa0\x80";
  const std::string good = "a\ufffd\ufffdz\ufffd\ufffd\ufffd";
  EXPECT_EQ(to_utf8_lossy(bad), good);
  EXPECT_EQ(qwen3().encode(bad), qwen3().encode(good));
  // One byte of a character, alone.
  const Ids half = {qwen3().find("\u00f0").value()};  // 0xF0 in the byte alphabet
  EXPECT_FALSE(is_utf8(qwen3().decode(half)));
  EXPECT_TRUE(is_utf8(qwen3().decode(half, {false, true})));
}

TEST(Tokenizer, IdsWithoutATokenStandForNothing) {
  EXPECT_EQ(qwen3().decode(Ids{-1, 64, 151669, 151935, INT32_MAX}), "a");
  EXPECT_EQ(qwen3().token_bytes(-5), "");
}

TEST(Tokenizer, StreamsWhatDecodeGives) {
  for (const Tokenizer& tokenizer : {qwen3(), stories()}) {
    for (const Golden& line : read_golden("qwen3")) {
      const Ids ids = tokenizer.encode(line.text);
      StreamDecoder stream(tokenizer);
      std::string text;
      for (const std::int32_t id : ids) {
        const std::string piece = stream.push(id);
        ASSERT_TRUE(is_utf8(piece));
        text += piece;
      }
      ASSERT_EQ(text + stream.finish(), tokenizer.decode(ids, {false, true}));
    }
  }
  // Any ids, most of them cutting characters apart.
  std::mt19937 random(7);
  for (int round = 0; round < 200; ++round) {
    Ids ids;
    for (int i = 0; i < 40; ++i) {
      ids.push_back(static_cast<std::int32_t>(random() % (round % 2 == 0 ? 256U : 151669U)));
    }
    StreamDecoder stream(qwen3());
    std::string text;
    for (const std::int32_t id : ids) {
      text += stream.push(id);
    }
    ASSERT_EQ(text + stream.finish(), qwen3().decode(ids, {false, true}));
  }
}

TEST(Tokenizer, NfcOrdersLongRunsOfMarksQuickly) {
  EXPECT_EQ(to_nfc("e\u0301 \u1100\u1161\u11a8 \u212b"), "\u00e9 \uac01 \u00c5");
  EXPECT_EQ(to_nfc("\uac00\u11a7\u0301"), "\uac00\u11a7\u0301");
  EXPECT_EQ(to_nfc("a\u0315\u0300"), "\u00e0\u0315");
  std::string marks = "a";
  for (int i = 0; i < 200000; ++i) {
    marks += i % 2 == 0 ? "\u0315" : "\u0300";
  }
  const std::string composed = to_nfc(marks);
  EXPECT_EQ(composed.substr(0, 4), "\u00e0\u0300");
  EXPECT_EQ(to_nfc(composed), composed);
}

TEST(Tokenizer, LongTextsTakeLinearTime) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  for (const std::string unit : {"a", " ", "\n", "ab", "=", "1", "\u4e2d", "a\u0301", "<|im_"}) {
    std::string text;
    while (text.size() < 1'000'000) {
      text += unit;
    }
    const Ids ids = qwen3().encode(text);
    EXPECT_EQ(qwen3().decode(ids), to_nfc(text)) << unit;
    EXPECT_EQ(stories().decode(stories().encode(text)), text);
  }
  const std::chrono::duration<double> seconds = Clock::now() - start;
  EXPECT_LT(seconds.count(), 120);  // quadratic would be hours
}

TEST(Tokenizer, IsTheSameFromEveryThread) {
  const std::vector<Golden> golden = read_golden("qwen3");
  std::vector<std::thread> threads;
  std::array<int, 4> wrong{};
  threads.reserve(wrong.size());
  for (int& count : wrong) {
    threads.emplace_back([&golden, &count] {
      for (const Golden& line : golden) {
        count += qwen3().encode(line.text) == line.ids ? 0 : 1;
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  EXPECT_EQ(wrong, (std::array<int, 4>{}));
}

class Forged : public ::testing::TestWithParam<ForgedTokenizer> {};

TEST_P(Forged, IsRefusedInThreeLines) {
  const ForgedTokenizer& forged = GetParam();
  try {
    const Tokenizer tokenizer = make_tokenizer(forged.files, "forged");
    EXPECT_FALSE(forged.text.empty()) << "was loaded";
    (void)tokenizer.encode(forged.text);
    FAIL() << "was encoded";
  } catch (const Error& error) {
    const std::string text = error.three_lines();
    EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 3) << text;
    EXPECT_EQ(exit_code(error.kind()), 3) << text;
    EXPECT_FALSE(error.hint().empty());
    EXPECT_FALSE(error.reason().empty()) << text;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Tokenizer, Forged, ::testing::ValuesIn(forged_tokenizers()), [](const auto& forged) {
      return forged.param.name;
    });

TEST(Tokenizer, TheUnforgedSmallOneLoads) {
  const Tokenizer tokenizer =
      make_tokenizer({{"tokenizer.json", SmallTokenizer().json()}}, "small");
  EXPECT_EQ(tokenizer.encode("abba"), (Ids{2, 1, 0}));
}

// Expected ids are those of `tokenizers` 0.23.3 on the same file.
TEST(Tokenizer, AddedTokensHonourTheirFlags) {
  SmallTokenizer small;
  small.vocab = R"({"a": 0, "b": 1, "ab": 2, " ": 3})";
  small.added = R"([
    {"id": 4, "content": "<l>", "lstrip": true, "normalized": false},
    {"id": 5, "content": "<r>", "rstrip": true, "normalized": false},
    {"id": 6, "content": "ba", "single_word": true, "normalized": false},
    {"id": 7, "content": "<x", "normalized": false},
    {"id": 8, "content": "<xx>", "normalized": false},
    {"id": 9, "content": "aa", "normalized": true}])";
  small.normalizer = R"({"type": "Replace", "pattern": {"String": "c"}, "content": "a"})";
  const Tokenizer tokenizer = make_tokenizer({{"tokenizer.json", small.json()}}, "small");
  EXPECT_EQ(tokenizer.encode("a  <l> b <r>  a"), (Ids{0, 4, 3, 1, 3, 5, 0}));
  EXPECT_EQ(tokenizer.encode("ba aba ba"), (Ids{6, 3, 2, 0, 3, 6}));
  EXPECT_EQ(tokenizer.encode("<xx><xa"), (Ids{8, 7, 0}));
  EXPECT_EQ(tokenizer.encode("acb"), (Ids{9, 1}));
}

TEST(Tokenizer, SplitsByTheGpt2PatternAndDigits) {
  SmallTokenizer small;
  small.pre_tokenizer = R"({"type": "Sequence", "pretokenizers": [
      {"type": "Digits", "individual_digits": true},
      {"type": "ByteLevel", "add_prefix_space": true, "use_regex": true}]})";
  small.decoder = R"({"type": "ByteLevel"})";
  small.vocab = R"({"a": 0, "b": 1, "ab": 2, "Ġ": 3, "1": 4, "Ġa": 5, "11": 6})";
  small.merges = R"(["a b", "Ġ a", "1 1"])";
  const Tokenizer tokenizer = make_tokenizer({{"tokenizer.json", small.json()}}, "small");
  EXPECT_EQ(tokenizer.encode("ab11a"), (Ids{3, 2, 3, 4, 3, 4, 5}));
  EXPECT_EQ(tokenizer.decode(tokenizer.encode("ab a")), " ab a");
}

TEST(Tokenizer, MarksBelongToWordsInQwen35) {
  TokenizerFiles files = {
      {"vocab.json", qwen_vocab_json()},
      {"merges.txt", qwen_base().merges_txt},
      {"tokenizer_config.json", R"({"tokenizer_class": "TokenizersBackend"})"},
      {"config.json", R"({"model_type": "qwen3_5"})"}};
  const Tokenizer newer = make_tokenizer(files, "qwen3.5");
  files["config.json"] = R"({"model_type": "qwen3"})";
  const Tokenizer older = make_tokenizer(files, "qwen3");
  for (const Golden& line : read_golden("qwen3")) {
    EXPECT_EQ(newer.decode(newer.encode(line.text)), to_nfc(line.text));
  }
  EXPECT_EQ(newer.encode("Don't 12\n x"), older.encode("Don't 12\n x"));

  const std::string word = "\u0939\u093f\u0928\u094d\u0926\u0940";
  const auto pieces = [&word](const char* pattern) {
    PreTokenizer pre_tokenizer;
    pre_tokenizer.add_split(Regex(pattern, "test"));
    PreTokenizer::Run run(pre_tokenizer);
    int count = 0;
    run.split(word, [&count](std::string_view) { ++count; });
    return count;
  };
  EXPECT_EQ(pieces(kQwen35Split), 1);
  EXPECT_EQ(pieces(kQwen2Split), 4);
}

// U+13460 became a letter with Unicode 16: `<s` after it is a piece of its own.
TEST(Tokenizer, KnowsLettersThatThePcreOfTheMachineMayNot) {
  const Ids ids = qwen3().encode("\U00013460<s>");
  ASSERT_GE(ids.size(), 2U);
  EXPECT_EQ(ids[ids.size() - 2], 44047);
}

TEST(Tokenizer, EncodesJsonLines) {
  std::string out;
  const auto write = [&](std::string_view line) { out += line; };
  encode_jsonl(qwen3(), "{\"text\": \"a b\"}\n\n{\"text\": \"\", \"x\": 1}", "t", {}, write);
  EXPECT_EQ(out, "{\"ids\": [64, 293]}\n{\"ids\": []}\n");
  EXPECT_THROW(encode_jsonl(qwen3(), "{\"tex\": \"a\"}", "t", {}, write), ParseError);
  EXPECT_THROW(encode_jsonl(qwen3(), "nonsense", "t", {}, write), ParseError);
}

TEST(Tokenizer, LoadsFromDirectoriesAndFiles) {
  const std::filesystem::path tiny = testdata() / "models/tiny-qwen3";
  EXPECT_EQ(load_tokenizer(tiny / "tokenizer.json").eos_id(), 4084);
  const std::filesystem::path directory = std::filesystem::path(::testing::TempDir()) /
                                          ("quern_tokenizer_" + std::to_string(::getpid()));
  std::filesystem::create_directories(directory);
  EXPECT_THROW((void)load_tokenizer(directory), IoError);
  EXPECT_THROW((void)load_tokenizer(directory / "tokenizer.json"), IoError);
  EXPECT_THROW((void)load_tokenizer(directory / "model.gguf"), IoError);
  write_file(directory / "tokenizer.model", llama3_model());
  EXPECT_EQ(load_tokenizer(directory).bos_id(), 128000);
  write_file(directory / "vocab.json", qwen_vocab_json());
  write_file(directory / "merges.txt", qwen_base().merges_txt);
  EXPECT_EQ(load_tokenizer(directory).eos_id(), 151643);
  EXPECT_EQ(load_tokenizer(directory / "merges.txt").eos_id(), 151643);
  EXPECT_EQ(load_tokenizer(directory / "tokenizer.model").bos_id(), 128000);
  std::filesystem::remove_all(directory);
}

}  // namespace
}  // namespace quern
