// SPDX-License-Identifier: Apache-2.0
#include "calib/calibration_set.h"

#include "base/error.h"
#include "base/file.h"

#include <fmt/format.h>
#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <utility>

namespace quern {
namespace {

constexpr std::uint64_t kMaxText = std::uint64_t{4} << 30U;

[[noreturn]] void throw_bad_archive(const std::filesystem::path& path, const std::string& reason) {
  throw ParseError(
      "a compressed calibration file cannot be read", path.string(), reason, "get the file again");
}

[[noreturn]] void throw_too_large(const std::filesystem::path& path) {
  throw ParseError(
      "a calibration file is too large",
      path.string(),
      "more than 4 GiB of text",
      "take a part of it: a few MB are plenty");
}

std::string gunzip(const std::string& bytes, const std::filesystem::path& path) {
  z_stream stream{};
  if (::inflateInit2(&stream, 15 + 32) != Z_OK) {  // 32: gzip or zlib header
    throw_bad_archive(path, "zlib does not start");
  }
  const std::unique_ptr<z_stream, void (*)(z_stream*)> guard(
      &stream, [](z_stream* s) { ::inflateEnd(s); });
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(bytes.data()));
  stream.avail_in = static_cast<uInt>(bytes.size());
  std::string text;
  std::array<char, 1 << 16> buffer{};
  int code = Z_OK;
  while (code != Z_STREAM_END) {
    stream.next_out = reinterpret_cast<Bytef*>(buffer.data());
    stream.avail_out = buffer.size();
    code = ::inflate(&stream, Z_NO_FLUSH);
    if (code != Z_OK && code != Z_STREAM_END) {
      throw_bad_archive(path, stream.msg != nullptr ? stream.msg : "the file ends early");
    }
    text.append(buffer.data(), buffer.size() - stream.avail_out);
    if (text.size() > kMaxText) {
      throw_too_large(path);
    }
    if (code == Z_STREAM_END && stream.avail_in > 0) {  // concatenated members are one text
      ::inflateReset(&stream);
      code = Z_OK;
    }
  }
  return text;
}

std::string unzstd(const std::string& bytes, const std::filesystem::path& path) {
  const std::unique_ptr<ZSTD_DCtx, std::size_t (*)(ZSTD_DCtx*)> context(
      ZSTD_createDCtx(), ZSTD_freeDCtx);
  std::string text;
  std::vector<char> buffer(ZSTD_DStreamOutSize());
  ZSTD_inBuffer in{bytes.data(), bytes.size(), 0};
  std::size_t left = 1;
  while (in.pos < in.size) {
    ZSTD_outBuffer out{buffer.data(), buffer.size(), 0};
    left = ZSTD_decompressStream(context.get(), &out, &in);
    if (ZSTD_isError(left) != 0) {
      throw_bad_archive(path, ZSTD_getErrorName(left));
    }
    text.append(buffer.data(), out.pos);
    if (text.size() > kMaxText) {
      throw_too_large(path);
    }
  }
  if (left != 0) {
    throw_bad_archive(path, "the file ends early");
  }
  return text;
}

// The ChatML form that all Qwen chat templates share.
std::string chat_text(const std::string& role, const std::string& content) {
  return "<|im_start|>" + role + "\n" + content + "<|im_end|>\n";
}

std::string document_of(const JsonReader& row) {
  if (row.has("text")) {
    return row.get_string("text");
  }
  if (row.has("messages")) {
    std::string text;
    for (const Json& message : row.get_array("messages")) {
      const JsonReader reader(message, row.place("messages"));
      text += chat_text(reader.get_string("role"), reader.get_string("content"));
    }
    return text;
  }
  if (row.has("instruction")) {
    std::string question = row.get_string("instruction");
    const std::string input = row.get_string_or("input", "");
    if (!input.empty()) {
      question += "\n" + input;
    }
    return chat_text("user", question) + chat_text("assistant", row.get_string("output"));
  }
  throw ParseError(
      "a calibration line has no text",
      row.where(),
      "expected \"text\", \"messages\" or \"instruction\"",
      "see quern quantize --help");
}

// The token that parts documents in pretraining: by its published name, because the end token of a
// chat configuration ends a turn instead.
std::optional<std::int32_t> document_separator(const Tokenizer& tokenizer) {
  for (const char* name : {"<|endoftext|>", "<|end_of_text|>"}) {
    if (const auto id = tokenizer.find(name)) {
      return id;
    }
  }
  return tokenizer.eos_id();
}

std::vector<std::int32_t> tokens_of(const CalibrationText& text, const Tokenizer& tokenizer) {
  const std::optional<std::int32_t> separator = document_separator(tokenizer);
  std::vector<std::int32_t> ids;
  for (const std::string& document : text.documents) {
    if (!ids.empty() && separator) {
      ids.push_back(*separator);
    }
    const std::vector<std::int32_t> part = tokenizer.encode(document);
    ids.insert(ids.end(), part.begin(), part.end());
  }
  return ids;
}

// `count` of the numbers 0 … n-1, without replacement, in drawn order; the same on every machine.
std::vector<std::int64_t> draw(std::int64_t n, std::int64_t count, std::mt19937_64& random) {
  std::vector<std::int64_t> numbers(static_cast<std::size_t>(n));
  std::iota(numbers.begin(), numbers.end(), 0);
  for (std::int64_t i = 0; i < count; ++i) {
    const auto j = i + static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(n - i));
    std::swap(numbers[static_cast<std::size_t>(i)], numbers[static_cast<std::size_t>(j)]);
  }
  numbers.resize(static_cast<std::size_t>(count));
  return numbers;
}

}  // namespace

std::int64_t CalibrationSet::tokens() const {
  std::int64_t total = 0;
  for (const auto& sequence : sequences) {
    total += static_cast<std::int64_t>(sequence.size());
  }
  return total;
}

bool is_holdout(std::int64_t index, std::int64_t count) {
  return count >= 10 && index % 10 == 9;
}

std::vector<std::string> parse_calibration_jsonl(std::string_view text, const std::string& where) {
  std::vector<std::string> documents;
  std::size_t line_number = 0;
  while (!text.empty()) {
    const std::size_t end = std::min(text.find('\n'), text.size());
    const std::string_view line = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    ++line_number;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) {
      continue;
    }
    const std::string place = fmt::format("{}: line {}", where, line_number);
    const Json json = parse_json(line, place);
    documents.push_back(document_of(JsonReader(json, place)));
  }
  return documents;
}

CalibrationText read_calibration_text(const std::filesystem::path& path, double weight) {
  CalibrationText text;
  text.name = path.filename().string();
  text.weight = weight;
  std::string bytes = read_file(path, kMaxText);
  std::filesystem::path inner = path;
  if (path.extension() == ".gz") {
    bytes = gunzip(bytes, path);
    inner.replace_extension();
  } else if (path.extension() == ".zst") {
    bytes = unzstd(bytes, path);
    inner.replace_extension();
  }
  if (inner.extension() == ".jsonl") {
    text.documents = parse_calibration_jsonl(bytes, text.name);
  } else if (inner.extension() == ".txt" || inner.extension() == ".raw") {
    text.documents.push_back(std::move(bytes));
  } else {
    throw UsageError(
        "unknown kind of calibration file",
        "--calibration " + path.string(),
        "expected .txt, .jsonl (each also .gz or .zst) or .safetensors",
        "rename the file or convert it");
  }
  return text;
}

CalibrationSet make_calibration_set(
    const std::vector<CalibrationText>& texts,
    const Tokenizer& tokenizer,
    std::int64_t samples,
    std::int64_t length,
    std::uint64_t seed) {
  double total_weight = 0;
  for (const CalibrationText& text : texts) {
    total_weight += text.weight;
  }
  std::mt19937_64 random(seed);
  std::vector<std::vector<std::int32_t>> sequences;
  std::vector<std::string> names;
  double weight_so_far = 0;
  std::int64_t wanted_so_far = 0;
  for (const CalibrationText& text : texts) {
    const std::vector<std::int32_t> ids = tokens_of(text, tokenizer);
    weight_so_far += text.weight;
    const auto wanted_now = static_cast<std::int64_t>(
        std::llround(static_cast<double>(samples) * weight_so_far / total_weight));
    const std::int64_t windows = static_cast<std::int64_t>(ids.size()) / length;
    const std::int64_t count = std::min(windows, wanted_now - wanted_so_far);
    wanted_so_far = wanted_now;
    for (const std::int64_t window : draw(windows, count, random)) {
      const auto begin = ids.begin() + window * length;
      sequences.emplace_back(begin, begin + length);
    }
    names.push_back(text.name);
  }
  if (sequences.empty()) {
    throw UsageError(
        "the calibration text is too short",
        "--calibration",
        fmt::format("not one window of {} tokens", length),
        "use a longer text or a smaller --sequence-length");
  }
  // Sources in turn would put one kind of text in the held-out part.
  std::vector<std::vector<std::int32_t>> shuffled;
  const auto n = static_cast<std::int64_t>(sequences.size());
  for (const std::int64_t index : draw(n, n, random)) {
    shuffled.push_back(std::move(sequences[static_cast<std::size_t>(index)]));
  }
  return calibration_set_of(std::move(shuffled), std::move(names));
}

CalibrationSet calibration_set_of(
    std::vector<std::vector<std::int32_t>> sequences, std::vector<std::string> sources) {
  CalibrationSet set;
  Sha256 hash;
  for (const auto& sequence : sequences) {
    const auto length = static_cast<std::uint64_t>(sequence.size());
    hash.update(std::as_bytes(std::span(&length, 1)));
    hash.update(std::as_bytes(std::span(sequence)));
  }
  set.sequences = std::move(sequences);
  set.sources = std::move(sources);
  set.sha256 = hash.hex();
  return set;
}

}  // namespace quern
