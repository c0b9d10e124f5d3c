// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"

#include <fmt/format.h>

#include <utility>

namespace quern {
namespace {

// Length of the valid UTF-8 sequence at `text[at]`, or 0. Control bytes are not text.
std::size_t utf8_length(const std::string& text, std::size_t at) {
  const auto lead = static_cast<unsigned char>(text[at]);
  if (lead < 0x20 || lead == 0x7f) {
    return 0;
  }
  if (lead < 0x80) {
    return 1;
  }
  const std::size_t length = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : lead >= 0xc2 ? 2 : 0;
  if (length == 0 || lead > 0xf4 || at + length > text.size()) {
    return 0;
  }
  for (std::size_t i = 1; i < length; ++i) {
    if ((static_cast<unsigned char>(text[at + i]) & 0xc0U) != 0x80U) {
      return 0;
    }
  }
  // C1 controls (U+0080..U+009F) move terminals as well.
  if (lead == 0xc2 && static_cast<unsigned char>(text[at + 1]) < 0xa0) {
    return 0;
  }
  return length;
}

std::string join(const std::string& what, const std::string& where, const std::string& reason) {
  std::string text = what;
  if (!where.empty()) {
    text += ", " + where;
  }
  if (!reason.empty()) {
    text += " (" + reason + ")";
  }
  return text;
}

}  // namespace

std::string printable(const std::string& text, std::size_t limit) {
  std::string out;
  for (std::size_t at = 0; at < text.size();) {
    if (out.size() >= limit) {
      return out + "…";
    }
    const std::size_t length = utf8_length(text, at);
    if (length == 0) {
      out += fmt::format("\\x{:02x}", static_cast<unsigned char>(text[at]));
      ++at;
    } else {
      out.append(text, at, length);
      at += length;
    }
  }
  return out;
}

Error::Error(
    ErrorKind kind, std::string what, std::string where, std::string reason, std::string hint)
    : std::runtime_error(join(what, where, reason)),
      kind_(kind),
      failed_(std::move(what)),
      where_(std::move(where)),
      reason_(std::move(reason)),
      hint_(std::move(hint)) {}

std::string Error::three_lines() const {
  constexpr std::size_t kLineLimit = 1000;
  std::string first = "error: " + printable(failed_, kLineLimit);
  if (!where_.empty()) {
    first += ", " + printable(where_, kLineLimit);
  }
  return first + "\nreason: " + printable(reason_, kLineLimit) +
         "\ntry: " + printable(hint_, kLineLimit) + "\n";
}

int exit_code(ErrorKind kind) noexcept {
  switch (kind) {
    case ErrorKind::kFailed: return 1;
    case ErrorKind::kUsage: return 2;
    case ErrorKind::kInput: return 3;
    case ErrorKind::kResource: return 4;
    case ErrorKind::kGate: return 5;
    case ErrorKind::kNetwork: return 6;
    case ErrorKind::kInterrupted: return 130;
  }
  return 1;
}

}  // namespace quern
