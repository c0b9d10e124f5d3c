// SPDX-License-Identifier: Apache-2.0
#include "tokenizer/vocab_reader.h"

#include "base/error.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <unordered_set>
#include <utility>

namespace quern {
namespace {

constexpr std::size_t kMaxDepth = 64;
// Outside of the vocabulary no object of a tokenizer has anywhere near as many keys.
constexpr std::size_t kMaxKeys = 4096;

[[noreturn]] void refuse(const std::string& what, const std::string& where, std::string reason) {
  throw ParseError(what, where, std::move(reason), "get the tokenizer files again");
}

// Routes model.vocab and model.merges into their own tables and builds a tree of everything else.
// With `bare_vocabulary` the whole document is the vocabulary.
class Reader : public nlohmann::json_sax<Json> {
 public:
  Reader(TokenizerJson& out, std::string where, bool bare_vocabulary)
      : out_(out), where_(std::move(where)), bare_(bare_vocabulary), builder_(out.rest, false) {}

  bool null() override { return scalar("null") && builder_.null(); }
  bool boolean(bool value) override { return scalar("true or false") && builder_.boolean(value); }
  bool number_float(number_float_t value, const string_t& text) override {
    return scalar("a fraction") && builder_.number_float(value, text);
  }
  bool number_integer(number_integer_t value) override {
    if (mode_ == Mode::kVocabulary) {
      out_.vocabulary.add(key_, value, where_);
      return true;
    }
    return scalar("a number") && builder_.number_integer(value);
  }
  bool number_unsigned(number_unsigned_t value) override {
    if (mode_ == Mode::kVocabulary) {
      constexpr number_unsigned_t kTooLarge = kMaxTokenId + 1;
      out_.vocabulary.add(key_, static_cast<std::int64_t>(std::min(value, kTooLarge)), where_);
      return true;
    }
    return scalar("a number") && builder_.number_unsigned(value);
  }
  bool string(string_t& value) override {
    if (mode_ == Mode::kMerges) {
      out_.merges.add_line(value, where_);
      return true;
    }
    if (mode_ == Mode::kPair) {
      if (parts_ < pair_.size()) {
        pair_[parts_] = std::move(value);
      }
      ++parts_;
      return true;
    }
    return scalar("a string") && builder_.string(value);
  }
  bool binary(binary_t& value) override { return builder_.binary(value); }

  bool start_object(std::size_t size) override {
    if (mode_ != Mode::kTree) {
      wrong("an object");
    }
    if (bare_ || awaits("vocab")) {
      mode_ = Mode::kVocabulary;
      out_.has_vocabulary = true;
      return builder_.null();
    }
    enter();
    return builder_.start_object(size);
  }
  bool key(string_t& value) override {
    if (mode_ == Mode::kVocabulary) {
      key_ = std::move(value);
      return true;
    }
    Level& level = levels_.back();
    if (!level.keys.insert(value).second) {
      refuse("a key stands twice in one object", where_, printable(value, 60));
    }
    if (level.keys.size() > kMaxKeys) {
      refuse(
          "an object has too many keys",
          where_,
          fmt::format("expected at most {} beside the vocabulary", kMaxKeys));
    }
    level.key = value;
    return builder_.key(value);
  }
  bool end_object() override {
    if (mode_ == Mode::kVocabulary) {
      mode_ = Mode::kTree;
      return true;
    }
    levels_.pop_back();
    return builder_.end_object();
  }
  bool start_array(std::size_t size) override {
    if (mode_ == Mode::kMerges) {
      mode_ = Mode::kPair;
      parts_ = 0;
      return true;
    }
    if (mode_ != Mode::kTree || bare_) {
      wrong("an array");
    }
    if (awaits("merges")) {
      mode_ = Mode::kMerges;
      out_.has_merges = true;
      return builder_.null();
    }
    enter();
    return builder_.start_array(size);
  }
  bool end_array() override {
    if (mode_ == Mode::kPair) {
      if (parts_ != pair_.size()) {
        refuse(
            "a merge does not have two parts",
            where_,
            fmt::format("merge {} has {}", out_.merges.size(), parts_));
      }
      out_.merges.add_pair(pair_[0], pair_[1], where_);
      mode_ = Mode::kMerges;
      return true;
    }
    if (mode_ == Mode::kMerges) {
      mode_ = Mode::kTree;
      return true;
    }
    levels_.pop_back();
    return builder_.end_array();
  }
  bool parse_error(
      std::size_t position,
      const std::string& token,
      const nlohmann::detail::exception& error) override {
    (void)token;
    refuse("not valid JSON", where_, fmt::format("byte {}: {}", position, error.what()));
  }

 private:
  enum class Mode { kTree, kVocabulary, kMerges, kPair };
  struct Level {
    std::unordered_set<std::string> keys;
    std::string key;  // the last one seen; empty in an array
  };

  // Is the value that begins now model.`key`?
  [[nodiscard]] bool awaits(const char* key) const {
    return levels_.size() == 2 && levels_[0].key == "model" && levels_[1].key == key;
  }
  void enter() {
    if (levels_.size() == kMaxDepth) {
      refuse("not valid JSON", where_, fmt::format("nested deeper than {}", kMaxDepth));
    }
    levels_.emplace_back();
  }
  // A value that only the tree has a place for.
  [[nodiscard]] bool scalar(const char* found) const {
    if (mode_ != Mode::kTree || bare_) {
      wrong(found);
    }
    return true;
  }
  [[noreturn]] void wrong(const char* found) const {
    if (mode_ == Mode::kVocabulary || bare_) {
      refuse(
          "the vocabulary is not an object of token ids",
          where_,
          fmt::format("expected an integer, found {} for \"{}\"", found, printable(key_, 60)));
    }
    refuse(
        "a merge is neither \"left right\" nor [left, right]",
        where_,
        fmt::format("merge {} is or holds {}", out_.merges.size(), found));
  }

  TokenizerJson& out_;
  std::string where_;
  bool bare_;
  nlohmann::detail::json_sax_dom_parser<Json> builder_;
  Mode mode_ = Mode::kTree;
  std::vector<Level> levels_;
  std::string key_;
  std::array<std::string, 2> pair_;
  std::size_t parts_ = 0;
};

void parse(std::string_view text, Reader& reader) {
  (void)Json::sax_parse(text.begin(), text.end(), &reader);
}

}  // namespace

void MergeList::add_line(std::string_view line, const std::string& where) {
  const std::size_t space = line.find(' ');
  if (space == std::string_view::npos || line.find(' ', space + 1) != std::string_view::npos) {
    refuse(
        "a merge does not have two parts",
        where,
        fmt::format("merge {} is \"{}\"", size(), printable(std::string(line), 60)));
  }
  add_pair(line.substr(0, space), line.substr(space + 1), where);
}

void MergeList::add_pair(std::string_view left, std::string_view right, const std::string& where) {
  if (left.empty() || right.empty() || left.size() + right.size() > kMaxTokenBytes) {
    refuse(
        "a merge has an empty or impossibly long part",
        where,
        fmt::format("merge {} joins {} and {} bytes", size(), left.size(), right.size()));
  }
  if (size() == kMaxMerges) {
    refuse("too many merges", where, fmt::format("expected at most {}", kMaxMerges));
  }
  places_.push_back(
      {bytes_.size(),
       static_cast<std::uint32_t>(left.size()),
       static_cast<std::uint32_t>(right.size())});
  bytes_ += left;
  bytes_ += right;
}

void MergeList::resolve(BpeModel& model, const std::string& where) const {
  const std::string_view bytes(bytes_);
  std::uint32_t rank = 0;
  const auto look_up = [&](std::string_view token) {
    const std::int32_t id = model.vocabulary.find(token);
    if (id < 0) {
      refuse(
          "a merge names a token that is not in the vocabulary",
          where,
          fmt::format("merge {} needs \"{}\"", rank, printable(std::string(token), 60)));
    }
    return id;
  };
  for (const Place& place : places_) {
    const std::int32_t left = look_up(bytes.substr(place.begin, place.left_length));
    const std::int32_t right =
        look_up(bytes.substr(place.begin + place.left_length, place.right_length));
    const std::int32_t joined =
        look_up(bytes.substr(place.begin, place.left_length + place.right_length));
    model.merges.set(left, right, rank++, joined);
  }
}

TokenizerJson read_tokenizer_json(std::string_view text, const std::string& where) {
  TokenizerJson json;
  Reader reader(json, where, false);
  parse(text, reader);
  return json;
}

Vocabulary read_vocab_json(std::string_view text, const std::string& where) {
  TokenizerJson json;
  Reader reader(json, where, true);
  parse(text, reader);
  return std::move(json.vocabulary);
}

}  // namespace quern
