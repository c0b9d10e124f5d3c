// SPDX-License-Identifier: Apache-2.0
#include "format/gguf_file.h"

#include "base/checked.h"
#include "base/error.h"
#include "format/lfs_pointer.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cctype>
#include <cstring>
#include <limits>
#include <optional>
#include <set>
#include <stdexcept>
#include <string_view>
#include <type_traits>
#include <utility>

namespace quern {
namespace {

static_assert(std::endian::native == std::endian::little, "file bytes are used as they stand");

constexpr std::string_view kMagic = "GGUF";
constexpr std::uint32_t kVersion = 3;
constexpr const char* kAlignmentKey = "general.alignment";
constexpr std::uint64_t kDefaultAlignment = 32;
constexpr std::uint64_t kMaxAlignment = std::uint64_t{1} << 24U;
constexpr std::size_t kMaxDimensions = 4;
constexpr std::uint64_t kMaxNameBytes = 63;
constexpr std::uint64_t kMaxKeyBytes = 65535;
// Far above what released models have; they bound the memory that a forged count can cost.
constexpr std::int64_t kMaxPairs = 65536;
constexpr std::int64_t kMaxTensors = std::int64_t{1} << 20U;
constexpr std::uint64_t kMaxStrings = std::uint64_t{1} << 24U;
constexpr const char* kGetAgain = "download the file again";

constexpr std::uint64_t padded(std::uint64_t bytes, std::uint64_t alignment) {
  return (bytes + alignment - 1) / alignment * alignment;
}

// Reads values one after the other from the bytes of a file.
class Cursor {
 public:
  Cursor(std::span<const std::byte> file, const std::string& where) : file_(file), where_(where) {}

  template <class T>
  [[nodiscard]] T read(const char* what) {
    need(sizeof(T), what);
    T value{};
    std::memcpy(&value, file_.data() + at_, sizeof(T));
    at_ += sizeof(T);
    return value;
  }

  [[nodiscard]] bool read_bool(const char* what) {
    const auto value = read<std::uint8_t>(what);
    if (value > 1) {
      throw ParseError(
          "a truth value is neither 0 nor 1",
          place(),
          fmt::format("expected {} to be 0 or 1, found {}", what, value),
          kGetAgain);
    }
    return value == 1;
  }

  [[nodiscard]] std::string read_string(const char* what, std::uint64_t limit) {
    const auto length = read<std::uint64_t>(what);
    if (length > limit) {
      throw ParseError(
          "a string is too long",
          place(),
          fmt::format("expected {} of at most {} bytes, found {}", what, limit, length),
          kGetAgain);
    }
    need(length, what);
    std::string text(reinterpret_cast<const char*>(file_.data()) + at_, length);
    at_ += length;
    return text;
  }

  // Throws unless `bytes` more are there.
  void need(std::uint64_t bytes, const char* what) const {
    if (bytes > left()) {
      throw ParseError(
          "the GGUF file ends inside its header",
          place(),
          fmt::format("expected {} bytes of {}, found {}", bytes, what, left()),
          "check that the download is complete");
    }
  }

  [[nodiscard]] std::uint64_t at() const noexcept { return at_; }
  [[nodiscard]] std::uint64_t left() const noexcept { return file_.size() - at_; }
  [[nodiscard]] const std::string& where() const noexcept { return where_; }
  [[nodiscard]] std::string place() const { return fmt::format("{}: byte {}", where_, at_); }

 private:
  std::span<const std::byte> file_;
  const std::string& where_;
  std::uint64_t at_ = 0;
};

template <class T>
[[nodiscard]] T read_value(Cursor& cursor) {
  if constexpr (std::is_same_v<T, bool>) {
    return cursor.read_bool("a value");
  } else if constexpr (std::is_same_v<T, std::string>) {
    return cursor.read_string("a value", cursor.left());
  } else {
    return cursor.read<T>("a value");
  }
}

template <class T>
[[nodiscard]] std::vector<T> read_values(Cursor& cursor, std::uint64_t count) {
  constexpr bool kIsString = std::is_same_v<T, std::string>;
  constexpr std::uint64_t kBytes = kIsString ? 8 : sizeof(T);  // at least, each
  if (count > cursor.left() / kBytes || (kIsString && count > kMaxStrings)) {
    throw ParseError(
        "an array is longer than the file",
        cursor.place(),
        fmt::format("expected at most {} elements, found {}", cursor.left() / kBytes, count),
        kGetAgain);
  }
  std::vector<T> values;
  values.reserve(count);
  for (std::uint64_t i = 0; i < count; ++i) {
    values.push_back(read_value<T>(cursor));
  }
  return values;
}

[[noreturn]] void unknown_type(const Cursor& cursor, const std::string& key, std::uint32_t type) {
  throw UnsupportedError(
      "a key has a type that quern does not know",
      fmt::format("{}: {}", cursor.where(), printable(key)),
      fmt::format("expected 0 to 12 (9 not inside of an array), found {}", type),
      "use a file of GGUF version 2 or 3");
}

// Calls `read` with an object of the C++ type that stands at place `number` of a variant.
template <class Variant, class Read, std::size_t... kIndex>
bool with_type(std::uint32_t number, const Read& read, std::index_sequence<kIndex...>) {
  return ((number == kIndex && (read(std::in_place_index<kIndex>), true)) || ...);
}

GgufArray read_array(Cursor& cursor, const std::string& key) {
  const auto type = cursor.read<std::uint32_t>("the type of an array");
  const auto count = cursor.read<std::uint64_t>("the length of an array");
  GgufArray array;
  const auto read = [&]<std::size_t kIndex>(std::in_place_index_t<kIndex> place) {
    using Values = std::variant_alternative_t<kIndex, GgufArray>;
    if constexpr (std::is_same_v<Values, std::monostate>) {
      unknown_type(cursor, key, type);
    } else {
      array = GgufArray(place, read_values<typename Values::value_type>(cursor, count));
    }
  };
  if (!with_type<GgufArray>(
          type, read, std::make_index_sequence<std::variant_size_v<GgufArray>>())) {
    unknown_type(cursor, key, type);
  }
  return array;
}

GgufValue read_typed_value(Cursor& cursor, const std::string& key) {
  const auto type = cursor.read<std::uint32_t>("the type of a key");
  GgufValue value;
  const auto read = [&]<std::size_t kIndex>(std::in_place_index_t<kIndex> place) {
    using T = std::variant_alternative_t<kIndex, GgufValue>;
    if constexpr (std::is_same_v<T, GgufArray>) {
      value = GgufValue(place, read_array(cursor, key));
    } else {
      value = GgufValue(place, read_value<T>(cursor));
    }
  };
  if (!with_type<GgufValue>(
          type, read, std::make_index_sequence<std::variant_size_v<GgufValue>>())) {
    unknown_type(cursor, key, type);
  }
  return value;
}

void read_pairs(Cursor& cursor, std::int64_t count, GgufMetadata& metadata) {
  for (std::int64_t i = 0; i < count; ++i) {
    const std::string key = cursor.read_string("a key", kMaxKeyBytes);
    if (key.empty() || !metadata.add(key, read_typed_value(cursor, key))) {
      throw ParseError(
          key.empty() ? "a key has no name" : "a key stands twice",
          metadata.place(key),
          fmt::format("pair {} of {}", i + 1, count),
          kGetAgain);
    }
  }
}

std::uint64_t read_alignment(const GgufMetadata& metadata) {
  if (!metadata.has(kAlignmentKey)) {
    return kDefaultAlignment;
  }
  const auto* value = std::get_if<std::uint32_t>(metadata.find(kAlignmentKey));
  if (value == nullptr || !std::has_single_bit(*value) || *value > kMaxAlignment) {
    throw ParseError(
        "the alignment is not a power of two",
        metadata.place(kAlignmentKey),
        value == nullptr ? "expected a u32, found " + gguf_type_name(*metadata.find(kAlignmentKey))
                         : fmt::format("expected 1 to {}, found {}", kMaxAlignment, *value),
        kGetAgain);
  }
  return *value;
}

Shape read_shape(Cursor& cursor, const std::string& place) {
  const auto dimensions = cursor.read<std::uint32_t>("the number of dimensions");
  if (dimensions < 1 || dimensions > kMaxDimensions) {
    throw ParseError(
        "a tensor has an impossible number of dimensions",
        place,
        fmt::format("expected 1 to {}, found {}", kMaxDimensions, dimensions),
        kGetAgain);
  }
  Shape shape(dimensions);
  // The file has the fastest dimension first.
  for (auto extent = shape.rbegin(); extent != shape.rend(); ++extent) {
    *extent = cursor.read<std::int64_t>("an extent");
    if (*extent < 0) {
      throw ParseError(
          "a tensor has a negative extent",
          place,
          fmt::format("expected sizes from 0 to 2^63 - 1, found {}", *extent),
          kGetAgain);
    }
  }
  return shape;
}

GgmlType read_ggml_type(Cursor& cursor, const std::string& place) {
  const auto number = cursor.read<std::uint32_t>("the type of a tensor");
  const GgmlTypeInfo* info = find_ggml_type(number);
  if (info == nullptr) {
    throw UnsupportedError(
        "a tensor has an unknown type",
        place,
        fmt::format("expected a type of ggml such as 12 (Q4_K), found {}", number),
        "use a file with Q4_K or another common type, or a newer quern");
  }
  return info->type;
}

// A tensor as its info describes it; `offset` is the place of its data in the data section.
struct TensorInfo {
  GgufTensor tensor;
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
};

TensorInfo read_tensor_info(Cursor& cursor) {
  TensorInfo info;
  GgufTensor& tensor = info.tensor;
  tensor.name = cursor.read_string("a tensor name", kMaxNameBytes);
  const std::string place = cursor.where() + ": tensor " + printable(tensor.name);
  if (tensor.name.empty()) {
    throw ParseError("a tensor has no name", cursor.place(), "expected 1 to 63 bytes", kGetAgain);
  }
  tensor.shape = read_shape(cursor, place);
  tensor.type = read_ggml_type(cursor, place);
  info.offset = cursor.read<std::uint64_t>("the offset of a tensor");
  const std::optional<std::uint64_t> bytes = ggml_tensor_bytes(tensor.type, tensor.shape);
  if (!bytes) {
    const GgmlTypeInfo& type = ggml_type_info(tensor.type);
    throw ParseError(
        "a tensor's shape does not fit its type",
        place,
        fmt::format(
            "expected rows of whole {} blocks ({} elements) and less than 2^63 bytes, found {}",
            type.name,
            type.block,
            shape_text(tensor.shape)),
        kGetAgain);
  }
  info.bytes = *bytes;
  return info;
}

// Gives the tensors their bytes. As ggml's reader demands, they follow each other without a gap.
void place_tensors(
    std::vector<TensorInfo>& infos,
    std::span<const std::byte> data,
    std::uint64_t alignment,
    const std::string& where) {
  std::uint64_t end = 0;  // of the last tensor, padded
  std::uint64_t last = 0;  // the same without padding
  for (TensorInfo& info : infos) {
    const auto place = [&] { return where + ": tensor " + printable(info.tensor.name); };
    if (info.offset != end) {
      throw ParseError(
          info.offset < end ? "two tensors overlap" : "a hole between two tensors",
          place(),
          fmt::format("expected its data to begin at byte {}, found {}", end, info.offset),
          kGetAgain);
    }
    if (end > data.size() || info.bytes > data.size() - end) {
      throw ParseError(
          "a tensor's data lies outside the file",
          place(),
          fmt::format(
              "expected {} bytes at byte {} of the data, found {} bytes of data: the download is "
              "incomplete",
              info.bytes,
              end,
              data.size()),
          kGetAgain);
    }
    info.tensor.bytes = data.subspan(end, info.bytes);
    last = end + info.bytes;
    end = padded(last, alignment);
  }
  // Some writers leave out the padding of the last tensor.
  if (data.size() != end && data.size() != last) {
    throw ParseError(
        "bytes that belong to no tensor",
        where,
        fmt::format("expected {} bytes of data, found {}", end, data.size()),
        kGetAgain);
  }
}

void check_version(std::uint32_t version, const std::string& where) {
  if (version == 2 || version == kVersion) {
    return;
  }
  // A file of the other byte order has its version in the upper half.
  const bool is_swapped = version != 0 && (version & 0xffffU) == 0;
  throw UnsupportedError(
      is_swapped ? "a big-endian GGUF file" : "a version of GGUF that quern does not read",
      where,
      fmt::format("expected version 2 or 3, found {}", version),
      "convert the model again with a current tool");
}

std::int64_t read_count(Cursor& cursor, const char* what, std::int64_t limit) {
  const auto count = cursor.read<std::int64_t>(what);
  if (count < 0 || count > limit) {
    throw ParseError(
        "an impossible count",
        cursor.place(),
        fmt::format("expected {} from 0 to {}, found {}", what, limit, count),
        kGetAgain);
  }
  return count;
}

void check_magic(std::span<const std::byte> file, const std::string& where) {
  refuse_lfs_pointer(file, where);
  const std::string_view text(reinterpret_cast<const char*>(file.data()), file.size());
  if (text.substr(0, kMagic.size()) != kMagic) {
    throw ParseError(
        "not a GGUF file",
        where,
        fmt::format(
            "expected it to begin with GGUF, found \"{}\"",
            printable(std::string(text.substr(0, kMagic.size())))),
        "check that this is a GGUF file");
  }
}

// "NAME-00002-of-00005.gguf" taken apart.
struct PartName {
  std::string stem;
  std::size_t index = 0;  // 1 for the first
  std::size_t count = 0;
};

std::optional<PartName> read_part_name(const std::filesystem::path& path) {
  constexpr std::string_view kForm = "-00001-of-00005.gguf";
  const std::string name = path.filename().string();
  if (name.size() <= kForm.size()) {
    return std::nullopt;
  }
  const std::string form = name.substr(name.size() - kForm.size());
  for (std::size_t i = 0; i < kForm.size(); ++i) {
    const bool is_digit = std::isdigit(static_cast<unsigned char>(form[i])) != 0;
    if (kForm[i] >= '0' && kForm[i] <= '9' ? !is_digit : form[i] != kForm[i]) {
      return std::nullopt;
    }
  }
  return PartName{
      name.substr(0, name.size() - kForm.size()),
      std::stoul(form.substr(1, 5)),
      std::stoul(form.substr(10, 5))};
}

// The files of the model that `path` belongs to, first part first.
std::vector<std::filesystem::path> part_paths(const std::filesystem::path& path) {
  const std::optional<PartName> name = read_part_name(path);
  if (!name || name->index < 1 || name->index > name->count) {
    return {path};
  }
  std::vector<std::filesystem::path> paths;
  for (std::size_t i = 1; i <= name->count; ++i) {
    paths.push_back(
        path.parent_path() / fmt::format("{}-{:05}-of-{:05}.gguf", name->stem, i, name->count));
  }
  return paths;
}

void check_part(const GgufMetadata& metadata, std::size_t index, std::size_t count) {
  const std::int64_t parts = metadata.get_int_or("split.count", 1);
  const std::int64_t number = metadata.get_int_or("split.no", 0);
  if (parts != static_cast<std::int64_t>(count) || number != static_cast<std::int64_t>(index)) {
    throw ParseError(
        "the file is another part than its name says",
        metadata.where(),
        fmt::format(
            "expected part {} of {}, found {} of {} (NAME-00001-of-00002.gguf is part 0 of 2)",
            index,
            count,
            number,
            parts),
        "give the parts the names under which they were released");
  }
}

[[noreturn]] void misuse(const std::string& name, const std::string& reason) {
  throw std::logic_error("GGUF tensor " + name + ": " + reason);
}

template <class T>
void put(std::string& out, const T& value) {
  if constexpr (std::is_same_v<T, bool>) {
    out += value ? '\1' : '\0';
  } else if constexpr (std::is_same_v<T, std::string>) {
    put(out, static_cast<std::uint64_t>(value.size()));
    out += value;
  } else {
    out.append(reinterpret_cast<const char*>(&value), sizeof(T));
  }
}

void put_array(std::string& out, const GgufArray& array) {
  put(out, static_cast<std::uint32_t>(array.index()));
  std::visit(
      [&](const auto& values) {
        using Values = std::decay_t<decltype(values)>;
        if constexpr (std::is_same_v<Values, std::monostate>) {
          throw std::logic_error("GGUF: an array of arrays is not written");
        } else {
          put(out, static_cast<std::uint64_t>(values.size()));
          for (const typename Values::value_type& value : values) {
            put(out, value);
          }
        }
      },
      array);
}

void put_pair(std::string& out, const GgufMetadata::Entry& entry) {
  put(out, entry.key);
  put(out, static_cast<std::uint32_t>(entry.value.index()));
  std::visit(
      [&](const auto& value) {
        if constexpr (std::is_same_v<std::decay_t<decltype(value)>, GgufArray>) {
          put_array(out, value);
        } else {
          put(out, value);
        }
      },
      entry.value);
}

std::uint64_t alignment_to_write(const GgufMetadata& metadata) {
  const GgufValue* value = metadata.find(kAlignmentKey);
  if (value == nullptr) {
    return kDefaultAlignment;
  }
  const auto* alignment = std::get_if<std::uint32_t>(value);
  if (alignment == nullptr || !std::has_single_bit(*alignment) || *alignment > kMaxAlignment) {
    throw std::logic_error("GGUF: general.alignment is not a power of two in 32 bits");
  }
  return *alignment;
}

}  // namespace

std::optional<std::uint64_t> ggml_tensor_bytes(GgmlType type, const Shape& shape) {
  const GgmlTypeInfo& info = ggml_type_info(type);
  if (shape.empty() || shape.back() % info.block != 0) {
    return std::nullopt;
  }
  // A zero extent makes the tensor empty, whatever the other extents are.
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) {
    return 0;
  }
  std::optional<std::int64_t> bytes = checked_mul(shape.back() / info.block, info.bytes);
  for (std::size_t i = 0; bytes && i + 1 < shape.size(); ++i) {
    bytes = checked_mul(*bytes, shape[i]);
  }
  return bytes ? std::optional(static_cast<std::uint64_t>(*bytes)) : std::nullopt;
}

GgufContent parse_gguf(std::span<const std::byte> file, const std::string& where) {
  check_magic(file, where);
  Cursor cursor(file, where);
  (void)cursor.read<std::uint32_t>("magic");
  GgufContent content;
  content.version = cursor.read<std::uint32_t>("version");
  check_version(content.version, where);
  const std::int64_t tensors = read_count(cursor, "the number of tensors", kMaxTensors);
  const std::int64_t pairs = read_count(cursor, "the number of keys", kMaxPairs);
  content.metadata = GgufMetadata(where);
  read_pairs(cursor, pairs, content.metadata);
  const std::uint64_t alignment = read_alignment(content.metadata);

  std::vector<TensorInfo> infos;
  std::set<std::string> names;
  for (std::int64_t i = 0; i < tensors; ++i) {
    infos.push_back(read_tensor_info(cursor));
    if (!names.insert(infos.back().tensor.name).second) {
      throw ParseError(
          "a tensor stands twice",
          where + ": tensor " + printable(infos.back().tensor.name),
          fmt::format("tensor {} of {}", i + 1, tensors),
          kGetAgain);
    }
  }
  // A file of metadata alone may end without padding.
  const std::uint64_t begin = std::min<std::uint64_t>(padded(cursor.at(), alignment), file.size());
  place_tensors(infos, file.subspan(begin), alignment, where);
  for (TensorInfo& info : infos) {
    content.tensors.push_back(std::move(info.tensor));
  }
  return content;
}

std::unique_ptr<GgufFile> GgufFile::open(const std::filesystem::path& path) {
  std::unique_ptr<GgufFile> file(new GgufFile());
  const std::vector<std::filesystem::path> paths = part_paths(path);
  for (std::size_t i = 0; i < paths.size(); ++i) {
    file->add_part(paths[i], i, paths.size());
  }
  const std::int64_t expected = file->metadata_.get_int_or(
      "split.tensors.count", static_cast<std::int64_t>(file->tensors_.size()));
  if (expected != static_cast<std::int64_t>(file->tensors_.size())) {
    throw ParseError(
        "the parts do not hold all tensors",
        file->metadata_.place("split.tensors.count"),
        fmt::format("expected {}, found {}", expected, file->tensors_.size()),
        kGetAgain);
  }
  return file;
}

void GgufFile::add_part(const std::filesystem::path& path, std::size_t index, std::size_t count) {
  files_.emplace_back(path);
  GgufContent content = parse_gguf(files_.back().bytes(), path.string());
  check_part(content.metadata, index, count);
  for (GgufTensor& tensor : content.tensors) {
    if (!places_.emplace(tensor.name, tensors_.size()).second) {
      throw ParseError(
          "a tensor stands in two parts",
          path.string() + ": tensor " + printable(tensor.name),
          "expected every tensor once",
          kGetAgain);
    }
    tensors_.push_back(std::move(tensor));
  }
  if (index == 0) {
    version_ = content.version;
    metadata_ = std::move(content.metadata);
  }
}

const GgufTensor* GgufFile::find(const std::string& name) const noexcept {
  const auto place = places_.find(name);
  return place == places_.end() ? nullptr : &tensors_[place->second];
}

void GgufFile::release(std::span<const std::byte> bytes) const noexcept {
  for (const MappedFile& file : files_) {
    const std::span<const std::byte> all = file.bytes();
    if (bytes.data() >= all.data() && bytes.data() < all.data() + all.size()) {
      file.release(bytes);
    }
  }
}

GgufLayout plan_gguf(const GgufMetadata& metadata, const std::vector<GgufDeclaration>& tensors) {
  const std::uint64_t alignment = alignment_to_write(metadata);
  GgufLayout layout;
  std::string& header = layout.header;
  header = kMagic;
  put(header, kVersion);
  put(header, static_cast<std::int64_t>(tensors.size()));
  put(header, static_cast<std::int64_t>(metadata.entries().size()));
  for (const GgufMetadata::Entry& entry : metadata.entries()) {
    put_pair(header, entry);
  }
  std::uint64_t offset = 0;
  for (const GgufDeclaration& tensor : tensors) {
    const std::optional<std::uint64_t> bytes = ggml_tensor_bytes(tensor.type, tensor.shape);
    if (tensor.name.empty() || tensor.name.size() > kMaxNameBytes) {
      misuse(tensor.name, "a name has 1 to 63 bytes");
    }
    if (!bytes || tensor.shape.size() > kMaxDimensions) {
      misuse(tensor.name, "shape " + shape_text(tensor.shape) + " does not fit its type");
    }
    put(header, tensor.name);
    put(header, static_cast<std::uint32_t>(tensor.shape.size()));
    for (auto extent = tensor.shape.rbegin(); extent != tensor.shape.rend(); ++extent) {
      put(header, *extent);
    }
    put(header, static_cast<std::uint32_t>(tensor.type));
    put(header, offset);
    if (!layout.slots.emplace(tensor.name, GgufLayout::Slot{offset, *bytes}).second) {
      misuse(tensor.name, "declared twice");
    }
    offset += padded(*bytes, alignment);
  }
  header.resize(padded(header.size(), alignment), '\0');
  for (auto& [name, slot] : layout.slots) {
    slot.offset += header.size();
  }
  layout.bytes = header.size() + offset;
  return layout;
}

GgufWriter::GgufWriter(const std::filesystem::path& target, GgufLayout layout)
    : layout_(std::move(layout)), file_(target) {
  for (const auto& [name, slot] : layout_.slots) {
    planned_.plan(name, slot.bytes);
  }
  file_.reserve(layout_.bytes);
  file_.write_at(0, std::as_bytes(std::span(layout_.header.data(), layout_.header.size())));
  // Where the disk space could not be reserved, this gives the file its size; gaps read as zeros.
  const std::array<std::byte, 1> zero{};
  if (layout_.bytes > layout_.header.size()) {
    file_.write_at(layout_.bytes - 1, zero);
  }
}

void GgufWriter::write(const std::string& name, std::span<const std::byte> bytes) {
  planned_.write(name, bytes.size());
  file_.write_at(layout_.slots.at(name).offset, bytes);
}

void GgufWriter::write_piece(
    const std::string& name, std::uint64_t offset, std::span<const std::byte> bytes) {
  (void)planned_.append(name, bytes.size());
  const GgufLayout::Slot& slot = layout_.slots.at(name);
  if (offset > slot.bytes || bytes.size() > slot.bytes - offset) {
    misuse(name, "a piece reaches beyond its end");
  }
  file_.write_at(slot.offset + offset, bytes);
}

void GgufWriter::append(const std::string& name, std::span<const std::byte> bytes) {
  const std::uint64_t begin = planned_.append(name, bytes.size());
  file_.write_at(layout_.slots.at(name).offset + begin, bytes);
}

void GgufWriter::finish() {
  planned_.check_complete();
  file_.commit();
}

}  // namespace quern
