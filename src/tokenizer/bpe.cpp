// SPDX-License-Identifier: Apache-2.0
#include "tokenizer/bpe.h"

#include "base/error.h"
#include "tokenizer/byte_alphabet.h"
#include "tokenizer/utf8.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <queue>
#include <span>

namespace quern {
namespace {

constexpr std::size_t kFirstSlots = 1024;
constexpr std::uint32_t kNoRank = std::numeric_limits<std::uint32_t>::max();
// Up to this many symbols a scan over an array beats a heap; nearly every word is shorter.
constexpr std::size_t kShortPiece = 48;

// Joins the symbols of a short piece in place and returns how many are left.
std::size_t merge_short(const MergeTable& merges, std::span<std::int32_t> ids) {
  std::array<std::uint32_t, kShortPiece> ranks{};
  std::array<std::int32_t, kShortPiece> joined{};
  const auto look_up = [&](std::size_t i) {
    const MergeTable::Merge* merge = merges.find(ids[i], ids[i + 1]);
    ranks[i] = merge == nullptr ? kNoRank : merge->rank;
    joined[i] = merge == nullptr ? -1 : merge->id;
  };
  std::size_t count = ids.size();
  for (std::size_t i = 0; i + 1 < count; ++i) {
    look_up(i);
  }
  while (count > 1) {
    const auto* const best = std::min_element(ranks.data(), ranks.data() + count - 1);
    if (*best == kNoRank) {
      break;
    }
    const auto at = static_cast<std::size_t>(best - ranks.data());
    ids[at] = joined[at];
    std::copy(ids.data() + at + 2, ids.data() + count, ids.data() + at + 1);
    std::copy(ranks.data() + at + 1, ranks.data() + count - 1, ranks.data() + at);
    std::copy(joined.data() + at + 1, joined.data() + count - 1, joined.data() + at);
    --count;
    if (at + 1 < count) {
      look_up(at);
    }
    if (at > 0) {
      look_up(at - 1);
    }
  }
  return count;
}

// The same result for any length: symbols in a linked list, candidate pairs in a heap; a candidate
// whose symbols were joined meanwhile is recognised when it comes up.
class LongMerger {
 public:
  LongMerger(const MergeTable& merges, std::span<std::int32_t> ids)
      : merges_(merges), ids_(ids), links_(ids.size()) {}

  std::size_t run() {
    const std::size_t count = ids_.size();
    std::vector<Candidate> candidates;
    candidates.reserve(count);
    for (std::size_t i = 0; i < count; ++i) {
      links_[i] = {
          i == 0 ? kEnd : static_cast<std::uint32_t>(i - 1),
          i + 1 == count ? kEnd : static_cast<std::uint32_t>(i + 1)};
    }
    for (std::size_t i = 0; i + 1 < count; ++i) {
      const MergeTable::Merge* merge = merges_.find(ids_[i], ids_[i + 1]);
      if (merge != nullptr) {
        candidates.push_back({merge->rank, static_cast<std::uint32_t>(i), merge->id});
      }
    }
    heap_ = Heap(Later{}, std::move(candidates));
    while (!heap_.empty()) {
      const Candidate best = heap_.top();
      heap_.pop();
      join(best);
    }
    std::size_t left = 0;
    for (std::uint32_t at = 0; at != kEnd; at = links_[at].next) {
      ids_[left++] = ids_[at];
    }
    return left;
  }

 private:
  static constexpr std::uint32_t kEnd = std::numeric_limits<std::uint32_t>::max();

  struct Link {
    std::uint32_t previous = kEnd;
    std::uint32_t next = kEnd;
  };
  struct Candidate {
    std::uint32_t rank;
    std::uint32_t at;
    std::int32_t id;
  };
  struct Later {
    bool operator()(const Candidate& a, const Candidate& b) const noexcept {
      return a.rank != b.rank ? a.rank > b.rank : a.at > b.at;
    }
  };
  using Heap = std::priority_queue<Candidate, std::vector<Candidate>, Later>;

  void offer(std::uint32_t at) {
    const std::uint32_t next = links_[at].next;
    if (next == kEnd) {
      return;
    }
    const MergeTable::Merge* merge = merges_.find(ids_[at], ids_[next]);
    if (merge != nullptr) {
      heap_.push({merge->rank, at, merge->id});
    }
  }

  void join(const Candidate& candidate) {
    const std::uint32_t next = ids_[candidate.at] < 0 ? kEnd : links_[candidate.at].next;
    if (next == kEnd) {
      return;
    }
    const MergeTable::Merge* merge = merges_.find(ids_[candidate.at], ids_[next]);
    if (merge == nullptr || merge->id != candidate.id) {
      return;
    }
    ids_[candidate.at] = candidate.id;
    ids_[next] = -1;
    links_[candidate.at].next = links_[next].next;
    if (links_[next].next != kEnd) {
      links_[links_[next].next].previous = candidate.at;
    }
    if (links_[candidate.at].previous != kEnd) {
      offer(links_[candidate.at].previous);
    }
    offer(candidate.at);
  }

  const MergeTable& merges_;
  std::span<std::int32_t> ids_;
  std::vector<Link> links_;
  Heap heap_;
};

[[noreturn]] void no_token(const std::string& what) {
  throw UnsupportedError(
      "text cannot be encoded",
      "tokenizer",
      fmt::format("the vocabulary has no token for {} and no unknown token", what),
      "use the model's own complete tokenizer, or leave this character out");
}

}  // namespace

void MergeTable::set(std::int32_t left, std::int32_t right, std::uint32_t rank, std::int32_t id) {
  if (slots_.size() < 2 * (count_ + 1)) {
    std::vector<Merge> old(slots_.empty() ? kFirstSlots : 2 * slots_.size());
    std::swap(old, slots_);
    for (const Merge& merge : old) {
      if (merge.pair != kNoPair) {
        slots_[slot_of(merge.pair)] = merge;
      }
    }
  }
  const std::uint64_t pair = (static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32U) |
                             static_cast<std::uint32_t>(right);
  Merge& slot = slots_[slot_of(pair)];
  count_ += slot.pair == kNoPair ? 1 : 0;
  slot = {pair, rank, id};
}

const MergeTable::Merge* MergeTable::find(std::int32_t left, std::int32_t right) const noexcept {
  if (slots_.empty()) {
    return nullptr;
  }
  const std::uint64_t pair = (static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32U) |
                             static_cast<std::uint32_t>(right);
  const Merge& slot = slots_[slot_of(pair)];
  return slot.pair == pair ? &slot : nullptr;
}

std::size_t MergeTable::slot_of(std::uint64_t pair) const noexcept {
  const std::size_t mask = slots_.size() - 1;
  // Fibonacci hashing; the high half of the product is the well-mixed one.
  std::size_t slot = ((pair ^ (pair >> 29U)) * 0x9e3779b97f4a7c15U >> 32U) & mask;
  while (slots_[slot].pair != pair && slots_[slot].pair != kNoPair) {
    slot = (slot + 1) & mask;
  }
  return slot;
}

std::vector<MergeTable::Pair> MergeTable::pairs() const {
  std::vector<Pair> all;
  all.reserve(count_);
  for (const Merge& merge : slots_) {
    if (merge.pair != kNoPair) {
      all.push_back(
          {static_cast<std::int32_t>(merge.pair >> 32U),
           static_cast<std::int32_t>(merge.pair & 0xffffffffU),
           merge.rank});
    }
  }
  std::sort(all.begin(), all.end(), [](const Pair& a, const Pair& b) { return a.rank < b.rank; });
  return all;
}

void BpeModel::find_bytes() {
  byte_ids.fill(-1);
  for (unsigned byte = 0; byte < 256; ++byte) {
    if (byte_level) {
      const char c = static_cast<char>(byte);
      byte_ids[byte] = vocabulary.find(to_byte_alphabet({&c, 1}));
    } else if (byte_fallback) {
      byte_ids[byte] = vocabulary.find(fmt::format("<0x{:02X}>", byte));
    }
  }
}

void BpeModel::encode(std::string_view piece, std::vector<std::int32_t>& ids) const {
  if (piece.empty()) {
    return;
  }
  if (ignore_merges) {
    const std::int32_t whole =
        byte_level ? vocabulary.find(to_byte_alphabet(piece)) : vocabulary.find(piece);
    if (whole >= 0) {
      ids.push_back(whole);
      return;
    }
  }
  const std::size_t start = ids.size();
  first_symbols(piece, ids);
  const std::span<std::int32_t> symbols(ids.data() + start, ids.size() - start);
  const std::size_t left = symbols.size() <= kShortPiece ? merge_short(merges, symbols)
                                                         : LongMerger(merges, symbols).run();
  ids.resize(start + left);
}

void BpeModel::first_symbols(std::string_view piece, std::vector<std::int32_t>& ids) const {
  if (!byte_level) {
    first_characters(piece, ids);
    return;
  }
  bool after_unknown = false;
  for (const char c : piece) {
    const auto byte = static_cast<unsigned char>(c);
    const bool is_unknown = byte_ids[byte] < 0;
    if (is_unknown && unknown < 0) {
      no_token(fmt::format("the byte 0x{:02x}", byte));
    }
    if (!is_unknown || !after_unknown || !fuse_unknown) {
      ids.push_back(is_unknown ? unknown : byte_ids[byte]);
    }
    after_unknown = is_unknown;
  }
}

void BpeModel::first_characters(std::string_view piece, std::vector<std::int32_t>& ids) const {
  bool after_unknown = false;
  for (std::size_t at = 0; at < piece.size();) {
    const std::string_view character = piece.substr(at, code_point_at(piece, at).length);
    at += character.size();
    const std::int32_t id = vocabulary.find(character);
    const auto byte_id = [this](char c) { return byte_ids[static_cast<unsigned char>(c)]; };
    if (id >= 0) {
      ids.push_back(id);
    } else if (byte_fallback && std::all_of(character.begin(), character.end(), [&](char c) {
                 return byte_id(c) >= 0;
               })) {
      std::transform(character.begin(), character.end(), std::back_inserter(ids), byte_id);
    } else if (unknown < 0) {
      no_token("\"" + printable(std::string(character)) + "\"");
    } else {
      if (!after_unknown || !fuse_unknown) {
        ids.push_back(unknown);
      }
      after_unknown = true;
      continue;
    }
    after_unknown = false;
  }
}

}  // namespace quern
