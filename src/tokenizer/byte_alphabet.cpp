// SPDX-License-Identifier: Apache-2.0
#include "tokenizer/byte_alphabet.h"

#include "tokenizer/utf8.h"

#include <array>
#include <cstdint>

namespace quern {
namespace {

constexpr std::size_t kCodePoints = 0x144;

struct Tables {
  std::array<std::uint16_t, 256> code_point{};
  std::array<std::int16_t, kCodePoints> byte{};
};

constexpr Tables make_tables() {
  Tables tables;
  for (std::int16_t& byte : tables.byte) {
    byte = -1;
  }
  std::uint16_t next = 0x100;
  for (unsigned byte = 0; byte < 256; ++byte) {
    const bool printable =
        (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
    const auto code_point = printable ? static_cast<std::uint16_t>(byte) : next++;
    tables.code_point[byte] = code_point;
    tables.byte[code_point] = static_cast<std::int16_t>(byte);
  }
  return tables;
}

constexpr Tables kTables = make_tables();

}  // namespace

std::string to_byte_alphabet(std::string_view bytes) {
  std::string out;
  out.reserve(bytes.size() * 2);
  for (const char byte : bytes) {
    append_utf8(out, kTables.code_point[static_cast<unsigned char>(byte)]);
  }
  return out;
}

bool from_byte_alphabet(std::string_view text, std::string& out) {
  std::string bytes;
  bytes.reserve(text.size());
  for (std::size_t at = 0; at < text.size();) {
    const CodePoint point = code_point_at(text, at);
    if (!point.valid || point.value >= kCodePoints || kTables.byte[point.value] < 0) {
      return false;
    }
    bytes.push_back(static_cast<char>(kTables.byte[point.value]));
    at += point.length;
  }
  out = std::move(bytes);
  return true;
}

}  // namespace quern
