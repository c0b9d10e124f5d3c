// SPDX-License-Identifier: Apache-2.0
#include "tokenizer/tokenizer.h"

#include "base/error.h"
#include "tokenizer/utf8.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <functional>
#include <unordered_map>
#include <utility>

namespace quern {
namespace {

[[noreturn]] void refuse(const std::string& what, const std::string& where, std::string reason) {
  throw ParseError(what, where, std::move(reason), "get the tokenizer files again");
}

// Words come again and again in a text; their ids are then copied from the first time. Direct
// mapped: a clash costs only time. It serves one text, so no thread shares it.
class PieceCache {
 public:
  explicit PieceCache(std::size_t text_bytes)
      : slots_(std::bit_ceil(std::clamp<std::size_t>(text_bytes / 4, 16, kMaxSlots))) {}

  void encode(const BpeModel& model, std::string_view piece, std::vector<std::int32_t>& ids) {
    if (piece.size() > kMaxPiece) {
      model.encode(piece, ids);
      return;
    }
    Slot& slot = slots_[std::hash<std::string_view>{}(piece) & (slots_.size() - 1)];
    const std::size_t begin = ids.size();
    if (slot.piece == piece) {
      ids.resize(begin + slot.count);
      std::copy_n(ids.data() + slot.begin, slot.count, ids.data() + begin);
      return;
    }
    model.encode(piece, ids);
    slot = {piece, begin, ids.size() - begin};
  }

 private:
  static constexpr std::size_t kMaxSlots = 32768;
  static constexpr std::size_t kMaxPiece = 256;

  struct Slot {
    std::string_view piece;
    std::size_t begin = 0;
    std::size_t count = 0;
  };
  std::vector<Slot> slots_;
};

}  // namespace

struct Tokenizer::State {
  TokenizerParts parts;
  std::unordered_map<std::string, std::int32_t> added_ids;
  std::unordered_map<std::int32_t, std::size_t> added_places;  // id -> index in parts.added
  AddedTokenMatcher raw_tokens;
  AddedTokenMatcher normalized_tokens;
  TokenBytes bytes;
  std::vector<std::int32_t> eos_ids;

  State(TokenizerParts all, const std::string& where);
  void check_added(const AddedToken& token, const std::string& where);
  void check_id(std::int32_t id, const char* what, const std::string& where) const;
  void encode_segment(
      std::string_view raw,
      bool parse_special,
      PreTokenizer::Run& run,
      std::vector<std::int32_t>& ids) const;
  [[nodiscard]] const AddedToken* added(std::int32_t id) const noexcept {
    const auto found = added_places.find(id);
    return found == added_places.end() ? nullptr : &parts.added[found->second];
  }
};

Tokenizer::State::State(TokenizerParts all, const std::string& where) : parts(std::move(all)) {
  if (parts.model.vocabulary.count() == 0) {
    refuse("the vocabulary is empty", where, "no token found");
  }
  if (parts.added.size() > kMaxAddedTokens) {
    refuse(
        "too many added tokens",
        where,
        fmt::format("expected at most {}, found {}", kMaxAddedTokens, parts.added.size()));
  }
  parts.model.find_bytes();
  for (std::size_t i = 0; i < parts.added.size(); ++i) {
    const AddedToken& token = parts.added[i];
    check_added(token, where);
    added_ids.emplace(token.content, token.id);
    added_places.emplace(token.id, i);
    if (token.normalized) {
      std::string storage;
      normalized_tokens.add(parts.normalizer.apply(token.content, storage), token);
    } else {
      raw_tokens.add(token.content, token);
    }
  }
  bytes = TokenBytes(parts.decoder, parts.model.vocabulary, parts.added);

  for (const std::int32_t id : parts.prefix) {
    check_id(id, "post-processor", where);
  }
  for (const std::int32_t id : parts.suffix) {
    check_id(id, "post-processor", where);
  }
  if (parts.bos) {
    check_id(*parts.bos, "begin-of-text token", where);
  }
  if (parts.eos) {
    check_id(*parts.eos, "end-of-text token", where);
    eos_ids.push_back(*parts.eos);
  }
  for (const std::int32_t id : parts.stop) {
    if (std::find(eos_ids.begin(), eos_ids.end(), id) == eos_ids.end()) {
      eos_ids.push_back(id);
    }
  }
}

void Tokenizer::State::check_added(const AddedToken& token, const std::string& where) {
  const auto name = [&] { return printable(token.content, 60); };
  const Vocabulary& vocabulary = parts.model.vocabulary;
  if (token.content.empty() || token.content.size() > kMaxAddedTokenBytes) {
    refuse(
        "an added token has an impossible length",
        where,
        fmt::format(
            "expected 1 to {} bytes, found {} for id {}",
            kMaxAddedTokenBytes,
            token.content.size(),
            token.id));
  }
  if (token.id < 0 || token.id > kMaxTokenId) {
    refuse(
        "the id of an added token is out of range",
        where,
        fmt::format("expected 0 to {}, found {} for {}", kMaxTokenId, token.id, name()));
  }
  if (added_ids.contains(token.content) || added_places.contains(token.id)) {
    refuse(
        "an added token stands twice",
        where,
        fmt::format("{} with the id {} was added before", name(), token.id));
  }
  const std::int32_t in_vocabulary = vocabulary.find(token.content);
  if (in_vocabulary >= 0 && in_vocabulary != token.id) {
    refuse(
        "an added token has two ids",
        where,
        fmt::format("{} is {} here and {} in the vocabulary", name(), token.id, in_vocabulary));
  }
  if (in_vocabulary < 0 && vocabulary.has(token.id)) {
    refuse(
        "an added token has the id of another token",
        where,
        fmt::format(
            "id {} is that of {} and of {}",
            token.id,
            printable(std::string(vocabulary.text(token.id)), 60),
            name()));
  }
}

void Tokenizer::State::check_id(std::int32_t id, const char* what, const std::string& where) const {
  if (!parts.model.vocabulary.has(id) && added(id) == nullptr) {
    refuse(
        "a special token is not in the vocabulary",
        where,
        fmt::format("the {} names id {}, which no token has", what, id));
  }
}

void Tokenizer::State::encode_segment(
    std::string_view raw,
    bool parse_special,
    PreTokenizer::Run& run,
    std::vector<std::int32_t>& ids) const {
  std::string storage;
  const std::string_view text = parts.normalizer.apply(raw, storage);
  PieceCache cache(text.size());
  const auto encode_piece = [&](std::string_view piece) { cache.encode(parts.model, piece, ids); };
  normalized_tokens.split(text, parse_special, [&](std::string_view between, std::int32_t id) {
    if (id >= 0) {
      ids.push_back(id);
    } else {
      run.split(between, encode_piece);
    }
  });
}

Tokenizer::Tokenizer(TokenizerParts parts, const std::string& where)
    : state_(std::make_shared<const State>(std::move(parts), where)) {}

std::vector<std::int32_t> Tokenizer::encode(
    std::string_view text, const EncodeOptions& options) const {
  std::vector<std::int32_t> ids;
  if (options.add_special_tokens) {
    ids = state_->parts.prefix;
  }
  std::string repaired;
  if (!is_utf8(text)) {
    repaired = to_utf8_lossy(text);
    text = repaired;
  }
  ids.reserve(ids.size() + text.size() / 3 + 8);
  PreTokenizer::Run run(state_->parts.pre_tokenizer);
  state_->raw_tokens.split(
      text, options.parse_special, [&](std::string_view between, std::int32_t id) {
        if (id >= 0) {
          ids.push_back(id);
        } else {
          state_->encode_segment(between, options.parse_special, run, ids);
        }
      });
  if (options.add_special_tokens) {
    ids.insert(ids.end(), state_->parts.suffix.begin(), state_->parts.suffix.end());
  }
  return ids;
}

std::string Tokenizer::decode(
    std::span<const std::int32_t> ids, const DecodeOptions& options) const {
  std::string text;
  for (const std::int32_t id : ids) {
    if (!options.skip_special || !is_special(id)) {
      text += token_bytes(id);
    }
  }
  std::size_t strip_left = state_->bytes.strip_count();
  state_->bytes.strip_front(text, strip_left);
  return options.replace_invalid && !is_utf8(text) ? to_utf8_lossy(text) : text;
}

std::string_view Tokenizer::token_bytes(std::int32_t id) const noexcept {
  return state_->bytes.of(id);
}

std::string_view Tokenizer::token_text(std::int32_t id) const noexcept {
  const AddedToken* token = state_->added(id);
  return token != nullptr ? std::string_view(token->content)
                          : state_->parts.model.vocabulary.text(id);
}

std::optional<std::int32_t> Tokenizer::find(std::string_view text) const {
  if (const auto added = state_->added_ids.find(std::string(text));
      added != state_->added_ids.end()) {
    return added->second;
  }
  const std::int32_t id = state_->parts.model.vocabulary.find(text);
  return id < 0 ? std::nullopt : std::optional(id);
}

std::int32_t Tokenizer::vocab_size() const noexcept {
  return state_->bytes.size();
}

bool Tokenizer::is_special(std::int32_t id) const noexcept {
  const AddedToken* token = state_->added(id);
  return token != nullptr && token->special;
}

bool Tokenizer::is_added(std::int32_t id) const noexcept {
  return state_->added(id) != nullptr;
}

std::optional<std::int32_t> Tokenizer::bos_id() const noexcept {
  return state_->parts.bos;
}

std::optional<std::int32_t> Tokenizer::eos_id() const noexcept {
  return state_->parts.eos;
}

const std::vector<std::int32_t>& Tokenizer::eos_ids() const noexcept {
  return state_->eos_ids;
}

bool Tokenizer::adds_bos() const noexcept {
  const TokenizerParts& parts = state_->parts;
  return parts.bos && !parts.prefix.empty() && parts.prefix.front() == *parts.bos;
}

const TokenizerParts& Tokenizer::parts() const noexcept {
  return state_->parts;
}

StreamDecoder::StreamDecoder(Tokenizer tokenizer, bool skip_special)
    : tokenizer_(std::move(tokenizer)),
      skip_special_(skip_special),
      strip_left_(tokenizer_.state_->bytes.strip_count()) {}

std::string StreamDecoder::push(std::int32_t id) {
  if (skip_special_ && tokenizer_.is_special(id)) {
    return {};
  }
  held_ += tokenizer_.token_bytes(id);
  tokenizer_.state_->bytes.strip_front(held_, strip_left_);
  std::string out;
  std::size_t at = 0;
  while (at < held_.size()) {
    const CodePoint point = code_point_at(held_, at);
    if (point.cut) {
      break;
    }
    out += point.valid ? std::string_view(held_).substr(at, point.length) : kReplacementCharacter;
    at += point.length;
  }
  held_.erase(0, at);
  return out;
}

std::string StreamDecoder::finish() {
  return to_utf8_lossy(std::exchange(held_, {}));
}

}  // namespace quern
