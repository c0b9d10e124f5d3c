// SPDX-License-Identifier: Apache-2.0
#include "tokenizer/unicode.h"

#include "base/error.h"
#include "tokenizer/utf8.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <vector>

namespace quern {
namespace {

// Below this code point everything is its own composed form and no two of them compose, so text
// without a larger code point is already NFC.
constexpr char32_t kFirstMark = 0x300;
// utf8proc wants the whole text as UTF-32; this many code points at a time bound that buffer.
constexpr std::size_t kSegment = 65536;
// One below the first trailing consonant of Hangul. utf8proc 2.8 takes it for an empty one and
// drops it after a syllable, although it is a letter of its own that composes with nothing.
constexpr char32_t kBelowTrailing = 0x11a7;

bool may_change(std::string_view text) noexcept {
  // The lead byte of U+0300 is 0xCC.
  return std::any_of(
      text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) >= 0xcc; });
}

void order_marks(std::vector<utf8proc_int32_t>& points) {
  const auto combining_class = [](utf8proc_int32_t point) {
    return utf8proc_get_property(point)->combining_class;
  };
  for (auto start = points.begin(); start != points.end();) {
    if (*start < static_cast<utf8proc_int32_t>(kFirstMark) || combining_class(*start) == 0) {
      ++start;
      continue;
    }
    const auto end = std::find_if(
        start, points.end(), [&](utf8proc_int32_t point) { return combining_class(point) == 0; });
    std::stable_sort(start, end, [&](utf8proc_int32_t a, utf8proc_int32_t b) {
      return combining_class(a) < combining_class(b);
    });
    start = end;
  }
}

void compose(std::vector<utf8proc_int32_t>& points, std::string& out) {
  order_marks(points);
  const utf8proc_ssize_t length = utf8proc_normalize_utf32(
      points.data(),
      static_cast<utf8proc_ssize_t>(points.size()),
      static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  if (length < 0) {
    throw Error(
        ErrorKind::kFailed,
        "text could not be normalised",
        "NFC",
        utf8proc_errmsg(length),
        "report this text");
  }
  for (utf8proc_ssize_t i = 0; i < length; ++i) {
    append_utf8(out, static_cast<char32_t>(points[static_cast<std::size_t>(i)]));
  }
  points.clear();
}

}  // namespace

// utf8proc_map() would do the whole job, but it orders marks by exchanging neighbours: half a
// megabyte of them, two classes in turn, would take it minutes.
std::string to_nfc(std::string_view text) {
  if (!may_change(text)) {
    return std::string(text);
  }
  std::string out;
  out.reserve(text.size());
  std::vector<utf8proc_int32_t> points;
  points.reserve(std::min(text.size(), 2 * kSegment));
  std::array<utf8proc_int32_t, 32> parts{};
  for (std::size_t at = 0; at < text.size();) {
    const CodePoint point = code_point_at(text, at);
    at += point.length;
    if (point.value < 0x80) {
      // Nothing before an ASCII character composes with it: a safe place to cut.
      if (points.size() >= kSegment) {
        compose(points, out);
      }
      points.push_back(static_cast<utf8proc_int32_t>(point.value));
      continue;
    }
    if (point.value == kBelowTrailing) {
      compose(points, out);
      append_utf8(out, point.value);
      continue;
    }
    int boundary = 0;
    const utf8proc_ssize_t count = utf8proc_decompose_char(
        static_cast<utf8proc_int32_t>(point.value),
        parts.data(),
        static_cast<utf8proc_ssize_t>(parts.size()),
        static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE),
        &boundary);
    if (count < 0 || count > static_cast<utf8proc_ssize_t>(parts.size())) {
      points.push_back(static_cast<utf8proc_int32_t>(point.value));
      continue;
    }
    points.insert(points.end(), parts.begin(), parts.begin() + count);
  }
  compose(points, out);
  return out;
}

bool is_white_space(char32_t code_point) noexcept {
  return (code_point >= 0x9 && code_point <= 0xd) || code_point == 0x20 || code_point == 0x85 ||
         code_point == 0xa0 || code_point == 0x1680 ||
         (code_point >= 0x2000 && code_point <= 0x200a) || code_point == 0x2028 ||
         code_point == 0x2029 || code_point == 0x202f || code_point == 0x205f ||
         code_point == 0x3000;
}

bool is_word_character(char32_t code_point) noexcept {
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(code_point))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC: return true;
    default: return false;
  }
}

const char* unicode_version() noexcept {
  return utf8proc_unicode_version();
}

}  // namespace quern
