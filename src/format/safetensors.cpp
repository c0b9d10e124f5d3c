// SPDX-License-Identifier: Apache-2.0
#include "format/safetensors.h"

#include "base/checked.h"
#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "format/lfs_pointer.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <functional>
#include <optional>
#include <system_error>
#include <utility>

namespace quern {
namespace {

static_assert(std::endian::native == std::endian::little, "file bytes are used as they stand");

constexpr std::uint64_t kLengthBytes = 8;
constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;
constexpr const char* kGetAgain = "download the file again";

std::string tensor_place(const std::string& where, const std::string& name) {
  return where + ": tensor " + printable(name);
}

// The JSON text of the header; its bounds were checked against the file.
std::string_view header_text(std::span<const std::byte> file, const std::string& where) {
  const char* text = reinterpret_cast<const char*>(file.data());
  refuse_lfs_pointer(file, where);
  if (file.size() < kLengthBytes) {
    throw ParseError(
        "not a safetensors file",
        where,
        fmt::format("expected at least {} bytes, found {}", kLengthBytes, file.size()),
        "check that the download is complete");
  }
  std::uint64_t length = 0;
  std::memcpy(&length, file.data(), kLengthBytes);
  if (length > kMaxHeaderBytes) {
    throw ParseError(
        "not a safetensors file",
        where,
        fmt::format("expected a header of at most {} bytes, found {}", kMaxHeaderBytes, length),
        "check that this is a safetensors file");
  }
  if (length > file.size() - kLengthBytes) {
    throw ParseError(
        "the file ends inside its header",
        where,
        fmt::format(
            "expected {} header bytes, found {}: the download is incomplete",
            length,
            file.size() - kLengthBytes),
        kGetAgain);
  }
  if (length == 0 || text[kLengthBytes] != '{') {
    throw ParseError(
        "not a safetensors file",
        where,
        "expected a header that begins with {, found something else",
        "check that this is a safetensors file");
  }
  return {text + kLengthBytes, length};
}

std::map<std::string, std::string> read_metadata(const Json& json, const std::string& where) {
  std::map<std::string, std::string> metadata;
  const std::string place = where + ": __metadata__";
  const JsonReader reader(json, place);
  for (const auto& [key, value] : json.items()) {
    if (!value.is_string()) {
      throw ParseError(
          "metadata of the wrong type",
          place + "." + printable(key),
          fmt::format("expected a string, found {}", value.type_name()),
          kGetAgain);
    }
    metadata.emplace(key, value.get<std::string>());
  }
  return metadata;
}

// A JSON number that is an integer from 0 to 2^63 - 1.
std::optional<std::int64_t> size_value(const Json& value) {
  if (!value.is_number_integer()) {
    return std::nullopt;
  }
  if (value.is_number_unsigned() &&
      value.get<std::uint64_t>() > static_cast<std::uint64_t>(INT64_MAX)) {
    return std::nullopt;
  }
  const auto number = value.get<std::int64_t>();
  return number < 0 ? std::nullopt : std::optional(number);
}

std::vector<std::int64_t> read_sizes(
    const JsonReader& entry, const std::string& key, const std::string& place) {
  std::vector<std::int64_t> sizes;
  for (const Json& value : entry.get_array(key)) {
    const std::optional<std::int64_t> size = size_value(value);
    if (!size) {
      throw ParseError(
          fmt::format("{} holds something that is not a size", key),
          place,
          fmt::format(
              "expected integers from 0 to 2^63 - 1, found {}",
              printable(value.dump(-1, ' ', false, Json::error_handler_t::replace), 60)),
          kGetAgain);
    }
    sizes.push_back(*size);
  }
  return sizes;
}

// Bytes of a tensor, or nothing when the product does not fit in 63 bits.
std::optional<std::int64_t> byte_count(DType dtype, const Shape& shape) {
  std::optional<std::int64_t> bytes = static_cast<std::int64_t>(dtype_size(dtype));
  // A zero extent makes the tensor empty, whatever the other extents are.
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) {
    return 0;
  }
  for (const std::int64_t extent : shape) {
    bytes = checked_mul(*bytes, extent);
    if (!bytes) {
      return std::nullopt;
    }
  }
  return bytes;
}

DType read_dtype(const JsonReader& entry, const std::string& place) {
  const std::string name = entry.get_string("dtype");
  const std::optional<DType> dtype = dtype_from_name(name);
  if (!dtype) {
    throw UnsupportedError(
        "a tensor has an unknown type",
        place,
        fmt::format("expected F16, BF16, F32, I32, U8 or the like, found {}", printable(name, 40)),
        "use a BF16 release of the model, or a newer quern");
  }
  return *dtype;
}

TensorView read_tensor(
    const Json& json, std::span<const std::byte> data, const std::string& place) {
  const JsonReader entry(json, place);
  for (const auto& [key, value] : json.items()) {
    if (key != "dtype" && key != "shape" && key != "data_offsets") {
      throw ParseError(
          "a tensor has an unknown property",
          place,
          fmt::format("expected dtype, shape and data_offsets, found {}", printable(key, 60)),
          kGetAgain);
    }
  }
  TensorView view;
  view.dtype = read_dtype(entry, place);
  view.shape = read_sizes(entry, "shape", place);
  const std::vector<std::int64_t> offsets = read_sizes(entry, "data_offsets", place);
  if (offsets.size() != 2 || offsets[0] > offsets[1]) {
    throw ParseError(
        "data_offsets is not a range",
        place,
        fmt::format("expected [begin, end] with begin <= end, found {}", shape_text(offsets)),
        kGetAgain);
  }
  const std::optional<std::int64_t> bytes = byte_count(view.dtype, view.shape);
  if (!bytes) {
    throw ParseError(
        "a tensor is larger than any file",
        place,
        fmt::format(
            "expected a size below 2^63 bytes, found {} {}",
            dtype_name(view.dtype),
            shape_text(view.shape)),
        kGetAgain);
  }
  if (offsets[1] - offsets[0] != *bytes) {
    throw ParseError(
        "a tensor's size and its shape disagree",
        place,
        fmt::format(
            "expected {} bytes for {} {}, found {}",
            *bytes,
            dtype_name(view.dtype),
            shape_text(view.shape),
            offsets[1] - offsets[0]),
        kGetAgain);
  }
  if (static_cast<std::uint64_t>(offsets[1]) > data.size()) {
    throw ParseError(
        "a tensor's data lies outside the file",
        place,
        fmt::format(
            "expected {} bytes of data, found {}: the download is incomplete",
            offsets[1],
            data.size()),
        kGetAgain);
  }
  view.bytes = data.subspan(
      static_cast<std::size_t>(offsets[0]), static_cast<std::size_t>(offsets[1] - offsets[0]));
  return view;
}

// Sorted by position, the tensors must follow each other from the first byte of data to the last.
void check_coverage(
    const std::map<std::string, TensorView>& tensors,
    std::span<const std::byte> data,
    const std::string& where) {
  using Item = std::map<std::string, TensorView>::const_pointer;
  const auto begin_of = [&](Item item) { return item->second.bytes.data() - data.data(); };
  std::vector<Item> order;
  order.reserve(tensors.size());
  for (const auto& item : tensors) {
    order.push_back(&item);
  }
  std::sort(order.begin(), order.end(), [&](Item a, Item b) {
    return std::pair(begin_of(a), a->second.bytes.size()) <
           std::pair(begin_of(b), b->second.bytes.size());
  });
  std::ptrdiff_t end = 0;
  for (const Item item : order) {
    const std::ptrdiff_t begin = begin_of(item);
    if (begin != end) {
      throw ParseError(
          begin < end ? "two tensors overlap" : "a hole between two tensors",
          tensor_place(where, item->first),
          fmt::format("expected its data to begin at byte {}, found {}", end, begin),
          kGetAgain);
    }
    end += static_cast<std::ptrdiff_t>(item->second.bytes.size());
  }
  if (static_cast<std::size_t>(end) != data.size()) {
    throw ParseError(
        "bytes that belong to no tensor",
        where,
        fmt::format("expected {} bytes of data, found {}", end, data.size()),
        kGetAgain);
  }
}

void check_shard_name(const std::string& file, const std::string& place) {
  constexpr std::string_view kSuffix = ".safetensors";
  const bool plain = file.size() > kSuffix.size() &&
                     file.compare(file.size() - kSuffix.size(), kSuffix.size(), kSuffix) == 0 &&
                     file.front() != '.' && file.find_first_of("/\\") == std::string::npos &&
                     file.find('\0') == std::string::npos;
  if (!plain) {
    throw ParseError(
        "the index names a file that is not a plain .safetensors name",
        place,
        fmt::format(
            "expected a name such as model-00001-of-00002.safetensors, found {}",
            printable(file, 100)),
        "download the index again");
  }
}

bool is_there(const std::filesystem::path& path) {
  std::error_code code;
  return std::filesystem::exists(path, code);
}

// Says what stands in a directory without safetensors.
[[noreturn]] void throw_no_weights(const std::filesystem::path& directory) {
  std::error_code code;
  std::string gguf;
  for (const auto& entry : std::filesystem::directory_iterator(directory, code)) {
    const std::string extension = entry.path().extension().string();
    if (extension == ".bin" || extension == ".pt" || extension == ".pth") {
      throw UnsupportedError(
          "the weights are pickle files, which can run code when they are read",
          directory.string(),
          fmt::format(
              "expected model.safetensors, found {}", printable(entry.path().filename().string())),
          "convert them to safetensors, for example with transformers' save_pretrained on a "
          "machine that trusts them");
    }
    if (extension == ".gguf") {
      gguf = entry.path().filename().string();
    }
  }
  if (!gguf.empty()) {
    throw UnsupportedError(
        "the directory holds a GGUF file instead of safetensors",
        directory.string(),
        fmt::format("expected model.safetensors, found {}", printable(gguf)),
        "name the .gguf file itself");
  }
  throw IoError(
      "no weights found",
      directory.string(),
      "expected model.safetensors or model.safetensors.index.json, found neither",
      "check the path and that the download is complete");
}

}  // namespace

SafetensorsContent parse_safetensors(std::span<const std::byte> file, const std::string& where) {
  const std::string_view text = header_text(file, where);
  const std::span<const std::byte> data = file.subspan(kLengthBytes + text.size());
  const Json header = parse_json(text, where + ": header");
  SafetensorsContent content;
  for (const auto& [name, json] : header.items()) {
    if (name == "__metadata__") {
      content.metadata = read_metadata(json, where);
    } else {
      content.tensors.emplace(name, read_tensor(json, data, tensor_place(where, name)));
    }
  }
  check_coverage(content.tensors, data, where);
  return content;
}

std::map<std::string, std::string> parse_safetensors_index(
    std::string_view text, const std::string& where) {
  const Json json = parse_json(text, where);
  const JsonReader map = JsonReader(json, where).get_object("weight_map");
  std::map<std::string, std::string> files;
  for (const auto& [name, file] : map.json().items()) {
    const std::string place = map.place(printable(name));
    if (!file.is_string()) {
      throw ParseError(
          "the index does not name a file",
          place,
          fmt::format("expected a string, found {}", file.type_name()),
          "download the index again");
    }
    check_shard_name(file.get_ref<const std::string&>(), place);
    files.emplace(name, file.get<std::string>());
  }
  if (files.empty()) {
    throw ParseError(
        "the index names no tensor",
        map.where(),
        "expected at least one entry, found none",
        "download the index again");
  }
  return files;
}

std::unique_ptr<SafetensorsStore> SafetensorsStore::open(const std::filesystem::path& path) {
  std::unique_ptr<SafetensorsStore> store(new SafetensorsStore);
  std::error_code code;
  if (!std::filesystem::is_directory(path, code)) {
    store->add_file(path);
    return store;
  }
  const std::filesystem::path index = path / "model.safetensors.index.json";
  const std::filesystem::path single = path / "model.safetensors";
  if (is_there(index)) {
    store->add_indexed_files(index);
  } else if (is_there(single)) {
    store->add_file(single);
  } else {
    throw_no_weights(path);
  }
  return store;
}

void SafetensorsStore::add_file(const std::filesystem::path& path) {
  MappedFile file(path);
  SafetensorsContent content = parse_safetensors(file.bytes(), path.string());
  for (auto& [name, view] : content.tensors) {
    if (!tensors_.emplace(name, std::move(view)).second) {
      throw ParseError(
          "a tensor stands in two files",
          tensor_place(path.string(), name),
          "expected it once, found it in an earlier file as well",
          "check that all files belong to the same release");
    }
  }
  files_.push_back(std::move(file));
}

void SafetensorsStore::add_indexed_files(const std::filesystem::path& index) {
  const std::filesystem::path directory = index.parent_path();
  const auto map = parse_safetensors_index(read_file(index, kMaxHeaderBytes), index.string());
  std::map<std::string, std::vector<std::string>> shards;
  for (const auto& [tensor, file] : map) {
    shards[file].push_back(tensor);
  }
  const std::string single = "model.safetensors";
  if (shards.count(single) == 0 && is_there(directory / single)) {
    throw ParseError(
        "two sets of weights in one directory",
        directory.string(),
        "expected either model.safetensors or the files of the index, found both",
        "remove the set that does not belong to the model");
  }
  for (const auto& [name, members] : shards) {
    if (!is_there(directory / name)) {
      throw IoError(
          "a file of the model is missing",
          (directory / name).string(),
          fmt::format("expected {} files named by the index, did not find this one", shards.size()),
          "download the missing file");
    }
    const auto disagree = [&, &file = name](const std::string& tensor, const char* found) {
      throw ParseError(
          "the index and the files disagree",
          tensor_place(index.string(), tensor),
          fmt::format("expected in {}, found {}", printable(file), found),
          "download the index and the files again");
    };
    for (const std::string& tensor : members) {
      if (find(tensor) != nullptr) {
        disagree(tensor, "in another file");
      }
    }
    add_file(directory / name);
    for (const std::string& tensor : members) {
      if (find(tensor) == nullptr) {
        disagree(tensor, "not there");
      }
    }
  }
}

const TensorView* SafetensorsStore::find(const std::string& name) const {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : &found->second;
}

void SafetensorsStore::release(const TensorView& view) const {
  for (const MappedFile& file : files_) {
    const std::span<const std::byte> bytes = file.bytes();
    if (!std::less<>()(view.bytes.data(), bytes.data()) &&
        std::less<>()(view.bytes.data(), bytes.data() + bytes.size())) {
      file.release(view.bytes);
      return;
    }
  }
}

}  // namespace quern
