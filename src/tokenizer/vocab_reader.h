// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/json.h"
#include "tokenizer/bpe.h"

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace quern {

// The merges of a file in order, before their parts are looked up.
class MergeList {
 public:
  // "left right"; throws ParseError unless there is exactly one space with text on both sides.
  void add_line(std::string_view line, const std::string& where);
  void add_pair(std::string_view left, std::string_view right, const std::string& where);
  [[nodiscard]] std::size_t size() const noexcept { return places_.size(); }
  // Enters all merges into `model`, rank by position. Throws ParseError for one whose parts or
  // whose result are not in the vocabulary.
  void resolve(BpeModel& model, const std::string& where) const;

 private:
  struct Place {
    std::uint64_t begin;
    std::uint32_t left_length;
    std::uint32_t right_length;
  };
  std::string bytes_;
  std::vector<Place> places_;
};

// tokenizer.json, with the two large parts kept out of the JSON tree: a tree of 300,000 nodes costs
// ten times the file, and ordered objects take quadratic time.
struct TokenizerJson {
  Json rest;  // the document; model.vocab and model.merges are null in it
  Vocabulary vocabulary;
  MergeList merges;
  bool has_vocabulary = false;
  bool has_merges = false;
};

// Throws ParseError for bad syntax, duplicate keys, nesting deeper than 64, ids that are not
// integers, and what Vocabulary::add and MergeList refuse.
[[nodiscard]] TokenizerJson read_tokenizer_json(std::string_view text, const std::string& where);

// vocab.json: one object, token -> id.
[[nodiscard]] Vocabulary read_vocab_json(std::string_view text, const std::string& where);

}  // namespace quern
