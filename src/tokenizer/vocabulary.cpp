// SPDX-License-Identifier: Apache-2.0
#include "tokenizer/vocabulary.h"

#include "base/error.h"

#include <fmt/format.h>

#include <functional>

namespace quern {
namespace {

constexpr std::size_t kFirstSlots = 1024;

[[noreturn]] void refuse(const std::string& what, const std::string& where, std::string reason) {
  throw ParseError(what, where, std::move(reason), "get the tokenizer files again");
}

}  // namespace

void Vocabulary::add(std::string_view text, std::int64_t id, const std::string& where) {
  if (id < 0 || id > kMaxTokenId) {
    refuse(
        "a token id is out of range",
        where,
        fmt::format(
            "expected 0 to {}, found {} for {}",
            kMaxTokenId,
            id,
            printable(std::string(text), 60)));
  }
  if (text.empty() || text.size() > kMaxTokenBytes) {
    refuse(
        "a token has an impossible length",
        where,
        fmt::format("expected 1 to {} bytes, found {} for id {}", kMaxTokenBytes, text.size(), id));
  }
  if (has(id)) {
    refuse(
        "two tokens have one id",
        where,
        fmt::format(
            "id {} is that of {} and of {}",
            id,
            printable(std::string(this->text(id)), 60),
            printable(std::string(text), 60)));
  }
  if (slots_.size() < 2 * (count_ + 1)) {
    grow();
  }
  const std::size_t slot = slot_of(text);
  if (slots_[slot] >= 0) {
    refuse(
        "a token stands twice in the vocabulary",
        where,
        fmt::format(
            "{} has the ids {} and {}", printable(std::string(text), 60), slots_[slot], id));
  }
  if (static_cast<std::size_t>(id) >= places_.size()) {
    places_.resize(static_cast<std::size_t>(id) + 1);
  }
  places_[static_cast<std::size_t>(id)] = {bytes_.size(), static_cast<std::uint32_t>(text.size())};
  bytes_ += text;
  slots_[slot] = static_cast<std::int32_t>(id);
  ++count_;
}

std::int32_t Vocabulary::find(std::string_view text) const noexcept {
  return slots_.empty() ? -1 : slots_[slot_of(text)];
}

bool Vocabulary::has(std::int64_t id) const noexcept {
  return id >= 0 && static_cast<std::size_t>(id) < places_.size() &&
         places_[static_cast<std::size_t>(id)].length > 0;
}

std::string_view Vocabulary::text(std::int64_t id) const noexcept {
  if (!has(id)) {
    return {};
  }
  const Place& place = places_[static_cast<std::size_t>(id)];
  return std::string_view(bytes_).substr(place.offset, place.length);
}

std::size_t Vocabulary::slot_of(std::string_view text) const noexcept {
  const std::size_t mask = slots_.size() - 1;
  std::size_t slot = std::hash<std::string_view>{}(text)&mask;
  while (slots_[slot] >= 0 && this->text(slots_[slot]) != text) {
    slot = (slot + 1) & mask;
  }
  return slot;
}

void Vocabulary::grow() {
  slots_.assign(slots_.empty() ? kFirstSlots : 2 * slots_.size(), -1);
  for (std::int32_t id = 0; id < size(); ++id) {
    if (has(id)) {
      slots_[slot_of(text(id))] = id;
    }
  }
}

}  // namespace quern
