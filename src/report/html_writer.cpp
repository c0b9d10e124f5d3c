// SPDX-License-Identifier: Apache-2.0
#include "report/html_writer.h"

#include <fmt/format.h>
#include <utf8proc.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>

namespace quern {
namespace {

bool is_direction_control(std::int32_t point) {
  return point == 0x061c || point == 0x200e || point == 0x200f ||
         (point >= 0x202a && point <= 0x202e) || (point >= 0x2066 && point <= 0x2069);
}

bool is_control(std::int32_t point) {
  const bool layout = point == '\n' || point == '\t';
  return (point < 0x20 && !layout) || (point >= 0x7f && point < 0xa0) || point == 0xfffe ||
         point == 0xffff;
}

void append_escaped(std::string& out, std::int32_t point, std::string_view bytes) {
  switch (point) {
    case '&': out += "&amp;"; return;
    case '<': out += "&lt;"; return;
    case '>': out += "&gt;"; return;
    case '"': out += "&quot;"; return;
    case '\'': out += "&#39;"; return;
    default: break;
  }
  if (is_control(point) || is_direction_control(point)) {
    out += fmt::format("\\u{{{:x}}}", point);
  } else {
    out += bytes;
  }
}

}  // namespace

std::string escape_html(std::string_view text) {
  std::string out;
  out.reserve(text.size() + text.size() / 8);
  while (!text.empty()) {
    // The view does not end in NUL: utf8proc gets the length, and never more than one character.
    const auto size = static_cast<utf8proc_ssize_t>(std::min<std::size_t>(text.size(), 4));
    utf8proc_int32_t point = -1;
    const auto* bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
    const utf8proc_ssize_t length = utf8proc_iterate(bytes, size, &point);
    if (length <= 0) {
      out += fmt::format("\\x{:02x}", static_cast<unsigned char>(text.front()));
      text.remove_prefix(1);
      continue;
    }
    append_escaped(out, point, text.substr(0, static_cast<std::size_t>(length)));
    text.remove_prefix(static_cast<std::size_t>(length));
  }
  return out;
}

std::string script_json(const Json& value) {
  std::string out;
  for (const char c : value.dump(-1, ' ', false, Json::error_handler_t::replace)) {
    switch (c) {
      case '<': out += "\\u003c"; break;
      case '>': out += "\\u003e"; break;
      case '&': out += "\\u0026"; break;
      case '\x7f': out += "\\u007f"; break;
      default: out += c;
    }
  }
  return out;
}

void HtmlWriter::start(std::string_view tag, Attributes attributes) {
  out_ += '<';
  out_ += tag;
  for (const auto& [name, value] : attributes) {
    out_ += fmt::format(" {}=\"{}\"", name, escape_html(value));
  }
}

void HtmlWriter::open(std::string_view tag, Attributes attributes) {
  start(tag, attributes);
  out_ += '>';
  open_.emplace_back(tag);
}

void HtmlWriter::close() {
  if (open_.empty()) {
    throw std::logic_error("HtmlWriter::close without an open element");
  }
  out_ += fmt::format("</{}>", open_.back());
  open_.pop_back();
}

void HtmlWriter::element(std::string_view tag, std::string_view content, Attributes attributes) {
  open(tag, attributes);
  text(content);
  close();
}

void HtmlWriter::empty(std::string_view tag, Attributes attributes) {
  start(tag, attributes);
  out_ += "/>";
}

void HtmlWriter::text(std::string_view content) {
  out_ += escape_html(content);
}

void HtmlWriter::raw(std::string_view markup) {
  out_ += markup;
}

void HtmlWriter::line() {
  out_ += '\n';
}

std::string HtmlWriter::take() {
  if (!open_.empty()) {
    throw std::logic_error("HtmlWriter::take with an open element: " + open_.back());
  }
  return std::move(out_);
}

}  // namespace quern
