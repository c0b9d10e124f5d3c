// SPDX-License-Identifier: Apache-2.0
#include "format/imatrix.h"

#include "base/error.h"
#include "base/mapped_file.h"
#include "format/gguf_file.h"
#include "format/lfs_pointer.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string_view>
#include <utility>

namespace quern {
namespace {

constexpr std::string_view kSums = ".in_sum2";
constexpr std::string_view kCounts = ".counts";
constexpr const char* kType = "general.type";
constexpr const char* kDatasets = "imatrix.datasets";
constexpr const char* kChunkCount = "imatrix.chunk_count";
constexpr const char* kChunkSize = "imatrix.chunk_size";
constexpr const char* kMakeAgain = "make the importance matrix again";
constexpr std::int64_t kMaxChunks = std::int64_t{1} << 32U;

void check_values(const std::vector<float>& values, const std::string& place) {
  const auto odd = std::find_if(
      values.begin(), values.end(), [](float value) { return !std::isfinite(value) || value < 0; });
  if (odd != values.end()) {
    throw ParseError(
        "an importance is not a positive number",
        place,
        fmt::format("expected a finite sum of squares or a count, found {}", *odd),
        kMakeAgain);
  }
}

std::vector<float> read_floats(const GgufTensor& tensor, const std::string& where) {
  const std::string place = where + ": tensor " + printable(tensor.name);
  if (tensor.type != GgmlType::kF32) {
    throw ParseError(
        "an importance has the wrong type",
        place,
        fmt::format("expected F32, found {}", ggml_type_info(tensor.type).name),
        kMakeAgain);
  }
  std::vector<float> values(tensor.bytes.size() / sizeof(float));
  std::memcpy(values.data(), tensor.bytes.data(), tensor.bytes.size());
  check_values(values, place);
  return values;
}

Imatrix parse_gguf_form(std::span<const std::byte> file, const std::string& where) {
  const GgufContent content = parse_gguf(file, where);
  const GgufMetadata& metadata = content.metadata;
  if (metadata.get_string_or(kType, "model") != "imatrix") {
    throw UnsupportedError(
        "the GGUF file is no importance matrix",
        metadata.place(kType),
        "expected imatrix, found " + printable(metadata.get_string_or(kType, "nothing"), 60),
        "make one with llama.cpp's imatrix tool");
  }
  Imatrix imatrix;
  imatrix.datasets = metadata.get_strings(kDatasets);
  imatrix.chunks = metadata.get_int_in(kChunkCount, 0, kMaxChunks);
  imatrix.chunk_size = metadata.get_int_in(kChunkSize, 0, kMaxChunks);
  for (const GgufTensor& tensor : content.tensors) {
    const std::string& name = tensor.name;
    const bool is_sums = name.size() > kSums.size() && name.ends_with(kSums);
    const bool is_counts = name.size() > kCounts.size() && name.ends_with(kCounts);
    if (!is_sums && !is_counts) {
      throw ParseError(
          "a tensor that is no importance",
          where + ": tensor " + printable(name),
          fmt::format("expected a name that ends in {} or {}", kSums, kCounts),
          kMakeAgain);
    }
    const std::string_view suffix = is_sums ? kSums : kCounts;
    ImatrixEntry& entry = imatrix.entries[name.substr(0, name.size() - suffix.size())];
    (is_sums ? entry.sums : entry.counts) = read_floats(tensor, where);
  }
  for (const auto& [name, entry] : imatrix.entries) {
    if (entry.counts.empty() || entry.sums.empty() ||
        entry.sums.size() % entry.counts.size() != 0) {
      throw ParseError(
          "sums and counts of an importance do not belong together",
          where + ": " + printable(name),
          fmt::format(
              "expected one count for each matrix, found {} sums and {} counts",
              entry.sums.size(),
              entry.counts.size()),
          kMakeAgain);
    }
  }
  return imatrix;
}

// The legacy form, value after value. Every read says what it wants.
class LegacyReader {
 public:
  LegacyReader(std::span<const std::byte> file, std::string where)
      : file_(file), where_(std::move(where)) {}

  [[nodiscard]] bool at_end() const { return at_ == file_.size(); }

  [[nodiscard]] std::int32_t read_int(const char* what, std::int32_t low) {
    std::int32_t value = 0;
    std::memcpy(&value, take(sizeof value, what), sizeof value);
    if (value < low) {
      refuse(fmt::format("expected {} of at least {}, found {}", what, low, value));
    }
    return value;
  }

  [[nodiscard]] std::string read_text(const char* what, std::int32_t low) {
    const auto length = static_cast<std::size_t>(read_int(what, low));
    return {reinterpret_cast<const char*>(take(length, what)), length};
  }

  [[nodiscard]] std::vector<float> read_values(const char* what) {
    const auto count = static_cast<std::size_t>(read_int(what, 1));
    const std::byte* bytes = take(count * sizeof(float), what);
    std::vector<float> values(count);
    std::memcpy(values.data(), bytes, count * sizeof(float));
    return values;
  }

  [[noreturn]] void refuse(const std::string& reason) const {
    throw ParseError(
        "not an importance matrix",
        fmt::format("{}: byte {}", where_, at_),
        reason,
        "use a file of llama.cpp's imatrix tool");
  }

 private:
  const std::byte* take(std::size_t bytes, const char* what) {
    if (bytes > file_.size() - at_) {
      refuse(fmt::format("expected {} bytes of {}, found {}", bytes, what, file_.size() - at_));
    }
    at_ += bytes;
    return file_.data() + at_ - bytes;
  }

  std::span<const std::byte> file_;
  std::string where_;
  std::size_t at_ = 0;
};

Imatrix parse_legacy_form(std::span<const std::byte> file, const std::string& where) {
  LegacyReader reader(file, where);
  Imatrix imatrix;
  const std::int32_t entries = reader.read_int("the number of entries", 1);
  for (std::int32_t i = 0; i < entries; ++i) {
    const std::string name = reader.read_text("a name", 1);
    const std::int32_t calls =
        reader.read_int("a number of calls", std::numeric_limits<std::int32_t>::min());
    ImatrixEntry entry;
    entry.sums = reader.read_values("values");
    // Without calls the values stand as they are, as in llama.cpp.
    entry.counts = {calls > 0 ? static_cast<float>(calls) : 1.0F};
    check_values(entry.sums, where + ": " + printable(name));
    if (!imatrix.entries.emplace(name, std::move(entry)).second) {
      reader.refuse("the entry " + printable(name) + " stands twice");
    }
  }
  if (!reader.at_end()) {
    imatrix.chunks = reader.read_int("the number of chunks", 0);
    const std::string dataset = reader.read_text("the name of the data set", 0);
    if (!dataset.empty()) {
      imatrix.datasets.push_back(dataset);
    }
  }
  if (!reader.at_end()) {
    reader.refuse("expected the end of the file");
  }
  return imatrix;
}

}  // namespace

std::vector<float> ImatrixEntry::importance() const {
  std::vector<float> values(sums.size());
  const std::size_t in = sums.size() / counts.size();
  for (std::size_t i = 0; i < sums.size(); ++i) {
    const float count = counts[i / in];
    values[i] = count > 0 ? sums[i] / count : 1.0F;
  }
  return values;
}

Imatrix parse_imatrix(std::span<const std::byte> file, const std::string& where) {
  refuse_lfs_pointer(file, where);
  constexpr std::string_view kMagic = "GGUF";
  const bool is_gguf =
      file.size() >= kMagic.size() && std::memcmp(file.data(), kMagic.data(), kMagic.size()) == 0;
  return is_gguf ? parse_gguf_form(file, where) : parse_legacy_form(file, where);
}

Imatrix read_imatrix(const std::filesystem::path& path) {
  const MappedFile file(path);
  return parse_imatrix(file.bytes(), path.string());
}

void write_imatrix(const std::filesystem::path& path, const Imatrix& imatrix) {
  GgufMetadata metadata;
  metadata.add(kType, std::string("imatrix"));
  metadata.add(kDatasets, GgufArray(imatrix.datasets));
  metadata.add(kChunkCount, static_cast<std::uint32_t>(imatrix.chunks));
  metadata.add(kChunkSize, static_cast<std::uint32_t>(imatrix.chunk_size));
  std::vector<GgufDeclaration> tensors;
  for (const auto& [name, entry] : imatrix.entries) {
    const std::int64_t matrices = entry.matrices();
    const auto sums = static_cast<std::int64_t>(entry.sums.size());
    if (matrices == 0 || sums == 0 || sums % matrices != 0) {
      throw std::logic_error("importance matrix " + name + ": no equal matrices");
    }
    tensors.push_back({name + std::string(kSums), GgmlType::kF32, {matrices, sums / matrices}});
    tensors.push_back({name + std::string(kCounts), GgmlType::kF32, {matrices, 1}});
  }
  GgufWriter writer(path, plan_gguf(metadata, tensors));
  for (const auto& [name, entry] : imatrix.entries) {
    writer.write(name + std::string(kSums), std::as_bytes(std::span(entry.sums)));
    writer.write(name + std::string(kCounts), std::as_bytes(std::span(entry.counts)));
  }
  writer.finish();
}

}  // namespace quern
