// SPDX-License-Identifier: Apache-2.0
#pragma once

// Tokenizer directories that must be refused: each with exit code 3 and three lines, at load or,
// where `text` is not empty, at the latest when that text is encoded.

#include <functional>
#include <map>
#include <ostream>
#include <string>
#include <vector>

namespace quern::testing_files {

struct ForgedTokenizer {
  std::string name;
  std::map<std::string, std::string> files;  // file name -> bytes
  std::string text;
};

// GoogleTest would print the bytes of the struct, addresses among them, into the test's name.
// NOLINTNEXTLINE(readability-identifier-naming)
inline void PrintTo(const ForgedTokenizer& forged, std::ostream* out) {
  *out << forged.name;
}

// The parts of a small tokenizer.json that is in order: characters a, b and ab, ids 0 to 2.
struct SmallTokenizer {
  std::string added = "[]";
  std::string normalizer = "null";
  std::string pre_tokenizer = "null";
  std::string post_processor = "null";
  std::string decoder = R"({"type": "Fuse"})";
  std::string model_extra;  // ", \"key\": value"
  std::string vocab = R"({"a": 0, "b": 1, "ab": 2})";
  std::string merges = R"([["a", "b"]])";

  [[nodiscard]] std::string json() const {
    return R"({"version": "1.0", "added_tokens": )" + added + R"(, "normalizer": )" + normalizer +
           R"(, "pre_tokenizer": )" + pre_tokenizer + R"(, "post_processor": )" + post_processor +
           R"(, "decoder": )" + decoder + R"(, "model": {"type": "BPE")" + model_extra +
           R"(, "vocab": )" + vocab + R"(, "merges": )" + merges + "}}";
  }
};

inline std::vector<ForgedTokenizer> forged_tokenizers() {
  std::vector<ForgedTokenizer> all;
  const auto raw = [&](const std::string& name, const std::string& json) {
    all.push_back({name, {{"tokenizer.json", json}}, ""});
  };
  const auto small = [&](const std::string& name,
                         const std::function<void(SmallTokenizer&)>& change,
                         const std::string& text = "") {
    SmallTokenizer tokenizer;
    change(tokenizer);
    all.push_back({name, {{"tokenizer.json", tokenizer.json()}}, text});
  };
  const auto split = [](const std::string& pattern) {
    return R"({"type": "Split", "pattern": {"Regex": ")" + pattern +
           R"("}, "behavior": "Isolated", "invert": false})";
  };
  const auto added = [](const std::string& id, const std::string& content) {
    return R"({"id": )" + id + R"(, "content": ")" + content + R"(", "special": true})";
  };
  const std::string good = SmallTokenizer().json();

  // The document.
  raw("empty_file", "");
  raw("not_json", "\x08\x96\x01 not json");
  raw("truncated", good.substr(0, good.size() - 3));
  raw("trailing_bytes", good + "x");
  raw("top_level_array", "[" + good + "]");
  raw("invalid_utf8",
      R"({"model": {"type": "BPE", "vocab": {")"
      "\xff"
      R"(": 0}, "merges": []}})");
  raw("deep_json", R"({"model": )" + std::string(100000, '[') + std::string(100000, ']') + "}");
  raw("deep_sequence", [] {
    std::string inner;
    for (int i = 0; i < 40; ++i) {
      inner += R"({"type": "Sequence", "normalizers": [)";
    }
    inner += R"({"type": "NFC"})";
    for (int i = 0; i < 40; ++i) {
      inner += "]}";
    }
    SmallTokenizer tokenizer;
    tokenizer.normalizer = inner;
    return tokenizer.json();
  }());
  raw("duplicate_key", R"({"model": null, "model": null})");
  raw("many_keys", [] {
    std::string json = "{";
    for (int i = 0; i < 100000; ++i) {
      json += '"';
      json += std::to_string(i);
      json += "\": 0, ";
    }
    return json + R"("model": null})";
  }());

  // The model.
  raw("missing_model", R"({"version": "1.0"})");
  raw("model_is_a_string", R"({"model": "BPE"})");
  raw("unigram_model", R"({"model": {"type": "Unigram", "vocab": [["a", -1.5]]}})");
  raw("wordpiece_model", R"({"model": {"type": "WordPiece", "vocab": {"a": 0}}})");
  raw("missing_vocab", R"({"model": {"type": "BPE", "merges": []}})");
  raw("missing_merges", R"({"model": {"type": "BPE", "vocab": {"a": 0}}})");
  small("empty_vocab", [](auto& t) { t.vocab = "{}", t.merges = "[]"; });
  small("vocab_is_an_array", [](auto& t) { t.vocab = R"(["a", "b"])"; });
  small("vocab_id_is_a_string", [](auto& t) { t.vocab = R"({"a": "0"})"; });
  small("vocab_id_is_a_fraction", [](auto& t) { t.vocab = R"({"a": 0.5})"; });
  small("vocab_id_is_an_object", [](auto& t) { t.vocab = R"({"a": {"id": 0}})"; });
  small("vocab_id_negative", [](auto& t) { t.vocab = R"({"a": -1, "b": 1, "ab": 2})"; });
  small("vocab_id_huge", [](auto& t) { t.vocab = R"({"a": 4294967296, "b": 1, "ab": 2})"; });
  small("vocab_id_beyond_64_bits", [](auto& t) {
    t.vocab = R"({"a": 18446744073709551615, "b": 1, "ab": 2})";
  });
  small("vocab_id_costs_memory", [](auto& t) { t.vocab = R"({"a": 2147483647, "b": 1})"; });
  small("vocab_id_twice", [](auto& t) { t.vocab = R"({"a": 0, "b": 0, "ab": 2})"; });
  small("vocab_token_twice", [](auto& t) { t.vocab = R"({"a": 0, "b": 1, "ab": 2, "a": 3})"; });
  small("vocab_token_empty", [](auto& t) { t.vocab = R"({"a": 0, "b": 1, "ab": 2, "": 3})"; });
  small("vocab_token_too_long", [](auto& t) {
    t.vocab = R"({"a": 0, "b": 1, "ab": 2, ")" + std::string(100000, 'x') + R"(": 3})";
  });
  small("merge_unknown_left", [](auto& t) { t.merges = R"([["x", "b"]])"; });
  small("merge_unknown_result", [](auto& t) { t.merges = R"(["b a"])"; });
  small("merge_one_part", [](auto& t) { t.merges = R"(["ab"])"; });
  small("merge_three_parts", [](auto& t) { t.merges = R"([["a", "b", "c"]])"; });
  small("merge_two_spaces", [](auto& t) { t.merges = R"(["a b c"])"; });
  small("merge_empty_part", [](auto& t) { t.merges = R"([["", "a"]])"; });
  small("merge_is_a_number", [](auto& t) { t.merges = "[7]"; });
  small("merge_part_is_a_number", [](auto& t) { t.merges = R"([["a", 1]])"; });
  small("merge_part_is_an_array", [](auto& t) { t.merges = R"([["a", ["b"]]])"; });
  small("merges_is_an_object", [](auto& t) { t.merges = R"({"a": "b"})"; });
  small("unknown_token_missing", [](auto& t) { t.model_extra = R"(, "unk_token": "<unk>")"; });
  small("unknown_token_is_a_number", [](auto& t) { t.model_extra = R"(, "unk_token": 0)"; });
  small("word_suffix", [](auto& t) { t.model_extra = R"(, "end_of_word_suffix": "</w>")"; });
  small("dropout", [](auto& t) { t.model_extra = R"(, "dropout": 0.1)"; });
  small(
      "no_token_for_the_text", [](auto&) {}, "abc");

  // Added tokens.
  small("added_not_an_array", [](auto& t) { t.added = R"({"a": 1})"; });
  small("added_without_id", [](auto& t) { t.added = R"([{"content": "<s>"}])"; });
  small("added_id_negative", [&](auto& t) { t.added = "[" + added("-3", "<s>") + "]"; });
  small("added_id_huge", [&](auto& t) { t.added = "[" + added("2000000000", "<s>") + "]"; });
  small("added_id_taken", [&](auto& t) { t.added = "[" + added("1", "<s>") + "]"; });
  small("added_two_ids", [&](auto& t) { t.added = "[" + added("9", "ab") + "]"; });
  small("added_twice", [&](auto& t) {
    t.added = "[" + added("9", "<s>") + ", " + added("10", "<s>") + "]";
  });
  small("added_same_id", [&](auto& t) {
    t.added = "[" + added("9", "<s>") + ", " + added("9", "</s>") + "]";
  });
  small("added_empty", [&](auto& t) { t.added = "[" + added("9", "") + "]"; });
  small(
      "added_too_long", [&](auto& t) { t.added = "[" + added("9", std::string(5000, '<')) + "]"; });
  small("added_flag_is_a_number", [](auto& t) {
    t.added = R"([{"id": 9, "content": "<s>", "special": 1}])";
  });

  // Components.
  small("normalizer_unknown", [](auto& t) { t.normalizer = R"({"type": "BertNormalizer"})"; });
  small("normalizer_without_type", [](auto& t) { t.normalizer = "{}"; });
  small("normalizer_regex", [](auto& t) {
    t.normalizer = R"({"type": "Replace", "pattern": {"Regex": " +"}, "content": " "})";
  });
  small("normalizer_empty_pattern", [](auto& t) {
    t.normalizer = R"({"type": "Replace", "pattern": {"String": ""}, "content": "x"})";
  });
  small(
      "normalizer_blows_up",
      [](auto& t) {
        std::string steps;
        for (int i = 0; i < 30; ++i) {
          steps += std::string(i == 0 ? "" : ", ") +
                   R"({"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaa"})";
        }
        t.normalizer = R"({"type": "Sequence", "normalizers": [)" + steps + "]}";
      },
      "a");
  small("pre_tokenizer_unknown", [](auto& t) { t.pre_tokenizer = R"({"type": "Metaspace"})"; });
  small("split_behavior", [](auto& t) {
    t.pre_tokenizer = R"({"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Removed"})";
  });
  small("split_literal", [](auto& t) {
    t.pre_tokenizer = R"({"type": "Split", "pattern": {"String": "a"}, "behavior": "Isolated"})";
  });
  small("regex_unbalanced", [&](auto& t) { t.pre_tokenizer = split("(a"); });
  small("regex_bad_range", [&](auto& t) { t.pre_tokenizer = split("[z-a]"); });
  small("regex_lone_backslash", [&](auto& t) { t.pre_tokenizer = split(R"(a\\)"); });
  small("regex_unknown_property", [&](auto& t) { t.pre_tokenizer = split(R"(\\p{Nonsense})"); });
  small("regex_untranslated", [&](auto& t) { t.pre_tokenizer = split(R"(\\w+)"); });
  small("regex_nested_class", [&](auto& t) { t.pre_tokenizer = split("[a[bc]]"); });
  small("regex_verb", [&](auto& t) { t.pre_tokenizer = split("(*LIMIT_MATCH=1)a"); });
  small("regex_too_deep", [&](auto& t) {
    t.pre_tokenizer = split(std::string(5000, '(') + std::string(5000, ')'));
  });
  small("regex_too_long", [&](auto& t) { t.pre_tokenizer = split(std::string(100000, 'a')); });
  small(
      "regex_catastrophic",
      [&](auto& t) { t.pre_tokenizer = split("(a+)+(a+)+[^a]x"); },
      std::string(5000, 'a') + "byx");
  small(
      "regex_recursion",
      [&](auto& t) { t.pre_tokenizer = split("(a|(?1)(?1))*+b|((?2)a)"); },
      std::string(5000, 'a'));
  small("byte_level_not_last", [](auto& t) {
    t.pre_tokenizer = R"({"type": "Sequence", "pretokenizers":
        [{"type": "ByteLevel", "add_prefix_space": false}, {"type": "Digits"}]})";
  });
  small("decoder_missing", [](auto& t) { t.decoder = "null"; });
  small("decoder_unknown", [](auto& t) { t.decoder = R"({"type": "WordPiece", "prefix": "##"})"; });
  small("decoder_strip_first", [](auto& t) {
    t.decoder = R"({"type": "Strip", "content": " ", "start": 1, "stop": 0})";
  });
  small("decoder_grows", [](auto& t) {
    t.decoder = R"({"type": "Replace", "pattern": {"String": "a"}, "content": "aaaa"})";
  });
  small("post_processor_unknown", [](auto& t) {
    t.post_processor = R"({"type": "BertProcessing", "sep": ["a", 0], "cls": ["b", 1]})";
  });
  small("template_without_text", [](auto& t) {
    t.post_processor = R"({"type": "TemplateProcessing", "single": [], "special_tokens": {}})";
  });
  small("template_unknown_token", [](auto& t) {
    t.post_processor = R"({"type": "TemplateProcessing", "single":
        [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {}})";
  });
  small("template_id_without_token", [](auto& t) {
    t.post_processor = R"({"type": "TemplateProcessing", "single":
        [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [77], "tokens": ["<s>"]}}})";
  });

  // The other forms and the files beside them.
  const auto files = [&](const std::string& name, std::map<std::string, std::string> content) {
    all.push_back({name, std::move(content), ""});
  };
  const std::string vocab = R"({"a": 0, "b": 1, "ab": 2})";
  files("vocab_json_is_an_array", {{"vocab.json", "[1, 2]"}, {"merges.txt", ""}});
  files("vocab_json_is_a_number", {{"vocab.json", "3"}, {"merges.txt", ""}});
  files("vocab_json_nested", {{"vocab.json", R"({"a": {"b": 0}})"}, {"merges.txt", ""}});
  files("merges_txt_one_part", {{"vocab.json", vocab}, {"merges.txt", "#version: 0.2\na\n"}});
  files("merges_txt_unknown", {{"vocab.json", vocab}, {"merges.txt", "b a\n"}});
  files(
      "vocab_of_unknown_family",
      {{"vocab.json", vocab},
       {"merges.txt", "a b\n"},
       {"tokenizer_config.json", R"({"tokenizer_class": "RobertaTokenizer"})"}});
  files("ranks_bad_base64", {{"qwen.tiktoken", "IQ== 0\nI*== 1\n"}});
  files("ranks_bad_padding", {{"qwen.tiktoken", "IQ== 0\nI=g= 1\n"}});
  files("ranks_no_rank", {{"qwen.tiktoken", "IQ== 0\nIg==\n"}});
  files("ranks_negative", {{"qwen.tiktoken", "IQ== -4\n"}});
  files("ranks_twice", {{"qwen.tiktoken", "IQ== 0\nIg== 0\n"}});
  files("ranks_token_twice", {{"tokenizer.model", "IQ== 0\nIQ== 1\n"}});
  files("ranks_huge", {{"tokenizer.model", "IQ== 99999999999999999999\n"}});
  files("ranks_empty", {{"tokenizer.model", ""}});
  files(
      "sentencepiece",
      {{"tokenizer.model", std::string("\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02", 16)}});
  files("config_not_json", {{"tokenizer.json", good}, {"tokenizer_config.json", "{"}});
  files(
      "config_unknown_eos",
      {{"tokenizer.json", good}, {"tokenizer_config.json", R"({"eos_token": "<|im_end|>"})"}});
  files(
      "config_bos_is_a_number",
      {{"tokenizer.json", good}, {"tokenizer_config.json", R"({"bos_token": 3})"}});
  files(
      "config_bos_wanted_but_null",
      {{"tokenizer.json", good},
       {"tokenizer_config.json", R"({"bos_token": null, "add_bos_token": true})"}});
  files(
      "config_eos_id_negative",
      {{"tokenizer.json", good}, {"generation_config.json", R"({"eos_token_id": [-1]})"}});
  files(
      "config_eos_id_is_a_string",
      {{"tokenizer.json", good}, {"config.json", R"({"eos_token_id": "2"})"}});
  files(
      "added_decoder_bad_id",
      {{"vocab.json", vocab},
       {"merges.txt", "a b\n"},
       {"tokenizer_config.json", R"({"added_tokens_decoder": {"7x": {"content": "<s>"}}})"}});
  files(
      "added_names_bad_id",
      {{"vocab.json", vocab}, {"merges.txt", "a b\n"}, {"added_tokens.json", R"({"<s>": -1})"}});
  files("no_tokenizer_file", {{"config.json", "{}"}});
  return all;
}

}  // namespace quern::testing_files
