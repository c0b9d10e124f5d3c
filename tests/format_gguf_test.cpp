// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "forged_gguf.h"
#include "format/gguf_file.h"
#include "format/safetensors.h"
#include "golden.h"
#include "scratch.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

namespace quern {
namespace {

using testing::ForgedGguf;
using testing::gguf_pair;
using testing::gguf_string;
using testing::gguf_tensor;
using testing::gguf_text_pair;
using testing::gguf_u32_pair;
using testing::good_gguf;
using testing::raw;
using testing::ScratchDirectory;

std::string gguf_path(const std::string& name) {
  return std::string(QUERN_TESTDATA) + "/golden/gguf/" + name;
}

std::span<const std::byte> bytes_of(const std::string& text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

std::string text_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

std::vector<GgufDeclaration> declarations_of(const std::vector<GgufTensor>& tensors) {
  std::vector<GgufDeclaration> declarations;
  for (const GgufTensor& tensor : tensors) {
    declarations.push_back({tensor.name, tensor.type, tensor.shape});
  }
  return declarations;
}

Json golden_entry(const std::string& file) {
  const Json index = read_json(gguf_path("index.json"));
  for (const Json& entry : index.at("entries")) {
    if (entry.at("file") == file) {
      return entry;
    }
  }
  throw std::logic_error("no golden " + file);
}

// What the reference reader found under a key, as text; 64-bit integers beyond 2^63 fit as well.
std::string json_of(const GgufValue& value) {
  return std::visit(
      [](const auto& held) -> std::string {
        using T = std::decay_t<decltype(held)>;
        if constexpr (std::is_same_v<T, GgufArray>) {
          return std::visit(
              [](const auto& values) -> std::string {
                if constexpr (std::is_same_v<std::decay_t<decltype(values)>, std::monostate>) {
                  return "nothing";
                } else {
                  return nlohmann::json(values).dump();
                }
              },
              held);
        } else {
          return nlohmann::json(held).dump();
        }
      },
      value);
}

TEST(Gguf, EveryKeyOfTheReferenceWriterIsRead) {
  const auto file = GgufFile::open(gguf_path("container_kv.gguf"));
  const Json golden = golden_entry("container_kv.gguf");
  const auto& entries = file->metadata().entries();
  ASSERT_EQ(entries.size(), golden.at("kv").size());
  std::size_t i = 0;
  for (const auto& [key, expected] : golden.at("kv").items()) {
    EXPECT_EQ(entries[i].key, key);
    std::string type = gguf_type_name(entries[i].value);
    std::string types = expected.at("types").at(0).get<std::string>();
    if (expected.at("types").size() > 1) {
      types = "ARRAY OF " + expected.at("types").at(1).get<std::string>();
    }
    // UINT8, INT32, FLOAT64 of the reference are u8, i32, f64 here.
    for (const auto& [from, to] : {std::pair("uint", "u"), {"int", "i"}, {"float", "f"}}) {
      std::transform(types.begin(), types.end(), types.begin(), [](unsigned char c) {
        return static_cast<char>(std::tolower(c));
      });
      if (const std::size_t at = types.find(from); at != std::string::npos) {
        types.replace(at, std::strlen(from), to);
      }
    }
    EXPECT_EQ(type, types) << key;
    if (const auto* single = std::get_if<float>(&entries[i].value)) {
      EXPECT_EQ(*single, expected.at("value").get<float>()) << key;
    } else {
      EXPECT_EQ(json_of(entries[i].value), nlohmann::json(expected.at("value")).dump()) << key;
    }
    ++i;
  }
}

TEST(Gguf, TensorsOfTheReferenceWriterHaveTheirShapesAndValues) {
  const auto file = GgufFile::open(gguf_path("container_kv.gguf"));
  const auto expected = SafetensorsStore::open(gguf_path("container_kv.expect.safetensors"));
  const Json golden = golden_entry("container_kv.gguf").at("tensors");
  ASSERT_EQ(file->tensors().size(), golden.size());
  for (const auto& [name, facts] : golden.items()) {
    const GgufTensor* tensor = file->find(name);
    ASSERT_NE(tensor, nullptr) << name;
    EXPECT_EQ(ggml_type_info(tensor->type).name, facts.at("type").get<std::string>());
    Shape extents = tensor->shape;
    std::reverse(extents.begin(), extents.end());
    EXPECT_EQ(extents, facts.at("ne").get<Shape>());
    EXPECT_EQ(tensor->bytes.size(), facts.at("n_bytes").get<std::size_t>());
    EXPECT_EQ(
        tensor->bytes.data() - file->files().front().bytes().data(),
        facts.at("absolute_offset").get<std::ptrdiff_t>());
    // blk.0.a.weight has its values under "a".
    const std::size_t dot = name.find('.', 4);
    const TensorView& values = *expected->find(name.substr(dot + 1, 1));
    std::vector<float> found(static_cast<std::size_t>(values.count()));
    dequantize_row(tensor->type, tensor->bytes, found);
    EXPECT_EQ(found, to_float(values)) << name;
    EXPECT_EQ(tensor->shape, values.shape);
  }
}

TEST(Gguf, AFileWrittenFromWhatWasReadIsTheSameFile) {
  for (const char* name : {"container_kv.gguf", "ggml_types.gguf", "imatrix.gguf"}) {
    const ScratchDirectory scratch;
    const auto file = GgufFile::open(gguf_path(name));
    GgufWriter writer(
        scratch.path() / name, plan_gguf(file->metadata(), declarations_of(file->tensors())));
    for (auto tensor = file->tensors().rbegin(); tensor != file->tensors().rend(); ++tensor) {
      writer.write(tensor->name, tensor->bytes);  // backwards: the order of writing is free
    }
    EXPECT_FALSE(std::filesystem::exists(scratch.path() / name));
    writer.finish();
    EXPECT_TRUE(read_file(scratch.path() / name) == read_file(gguf_path(name))) << name;
  }
}

TEST(Gguf, EveryTypeOfValueSurvives) {
  GgufMetadata metadata;
  metadata.add("empty text", std::string());
  metadata.add("u64", std::uint64_t{0xffffffffffffffffU});
  metadata.add("nothing", GgufArray(std::vector<std::uint16_t>{}));
  metadata.add("u8s", GgufArray(std::vector<std::uint8_t>{0, 255}));
  metadata.add("i8s", GgufArray(std::vector<std::int8_t>{-128, 127}));
  metadata.add("i16s", GgufArray(std::vector<std::int16_t>{-32768}));
  metadata.add("u32s", GgufArray(std::vector<std::uint32_t>{0xffffffffU}));
  metadata.add("u64s", GgufArray(std::vector<std::uint64_t>{1U}));
  metadata.add("i64s", GgufArray(std::vector<std::int64_t>{-1}));
  metadata.add("f64s", GgufArray(std::vector<double>{1e300, -0.0}));
  metadata.add("bools", GgufArray(std::vector<bool>{true, false}));
  metadata.add("strings", GgufArray(std::vector<std::string>{"", std::string("a\0b", 3), "\xff"}));
  metadata.add("general.alignment", std::uint32_t{64});
  EXPECT_FALSE(metadata.add("u64", true));
  const ScratchDirectory scratch;
  const std::filesystem::path path = scratch.path() / "x.gguf";
  GgufWriter writer(
      path, plan_gguf(metadata, {{"t", GgmlType::kI8, {3}}, {"e", GgmlType::kF32, {0}}}));
  writer.append("t", bytes_of("ab"));
  EXPECT_THROW(writer.finish(), std::logic_error);
  writer.append("t", bytes_of("c"));
  writer.write("e", {});
  writer.finish();
  EXPECT_EQ(std::filesystem::file_size(path), writer.layout().bytes);
  EXPECT_EQ(std::filesystem::file_size(path) % 64, 0U);
  const auto file = GgufFile::open(path);
  EXPECT_EQ(text_of(file->find("t")->bytes), "abc");
  ASSERT_EQ(file->metadata().entries().size(), metadata.entries().size());
  for (std::size_t i = 0; i < metadata.entries().size(); ++i) {
    EXPECT_EQ(file->metadata().entries()[i].key, metadata.entries()[i].key);
    EXPECT_EQ(file->metadata().entries()[i].value, metadata.entries()[i].value);
  }
}

TEST(Gguf, TypedReadsConvertWhatFitsAndNameWhatDoesNot) {
  GgufMetadata metadata("m.gguf");
  metadata.add("small", std::int8_t{-3});
  metadata.add("huge", std::uint64_t{0xffffffffffffffffU});
  metadata.add("half", 0.5F);
  metadata.add("text", std::string("x"));
  metadata.add("list", GgufArray(std::vector<std::uint16_t>{1, 2}));
  metadata.add("words", GgufArray(std::vector<std::string>{"a"}));
  metadata.add("yes", true);
  EXPECT_EQ(metadata.get_int("small"), -3);
  EXPECT_EQ(metadata.get_int_or("absent", 4), 4);
  EXPECT_EQ(metadata.get_number("small"), -3.0);
  EXPECT_EQ(metadata.get_number("half"), 0.5);
  EXPECT_EQ(metadata.get_number_or("absent", 2.0), 2.0);
  EXPECT_TRUE(metadata.get_bool_or("yes", false));
  EXPECT_EQ(metadata.get_string_or("absent", "d"), "d");
  EXPECT_EQ(metadata.get_ints("list"), (std::vector<std::int64_t>{1, 2}));
  EXPECT_EQ(metadata.get_strings("words"), std::vector<std::string>{"a"});
  for (const std::function<void()>& misread : std::vector<std::function<void()>>{
           [&] { (void)metadata.get_int("huge"); },
           [&] { (void)metadata.get_int("half"); },
           [&] { (void)metadata.get_int("yes"); },
           [&] { (void)metadata.get_int("absent"); },
           [&] { (void)metadata.get_int_in("small", 0, 5); },
           [&] { (void)metadata.get_number("text"); },
           [&] { (void)metadata.get_number("yes"); },
           [&] { (void)metadata.get_bool_or("small", true); },
           [&] { (void)metadata.get_string("list"); },
           [&] { (void)metadata.get_strings("list"); },
           [&] { (void)metadata.get_ints("words"); },
           [&] { (void)metadata.get_ints("small"); }}) {
    try {
      misread();
      ADD_FAILURE() << "was read";
    } catch (const ParseError& error) {
      EXPECT_EQ(error.where().substr(0, 8), "m.gguf: ") << error.what();
    }
  }
}

TEST(Gguf, VersionTwoIsReadAsWell) {
  ForgedGguf file = good_gguf();
  file.version = 2;
  const std::string bytes = file.bytes();
  const GgufContent content = parse_gguf(bytes_of(bytes), "two");
  EXPECT_EQ(content.version, 2U);
  ASSERT_EQ(content.tensors.size(), 3U);
  EXPECT_EQ(content.tensors[1].shape, (Shape{2, 4}));
}

TEST(Gguf, TheLastPaddingMayBeMissing) {
  ForgedGguf file = good_gguf();
  for (const std::size_t bytes : {82U, 96U}) {
    file.data.resize(bytes);
    const std::string text = file.bytes();
    EXPECT_EQ(parse_gguf(bytes_of(text), "x").tensors.back().bytes.size(), 18U);
  }
  ForgedGguf bare;
  bare.pairs = {gguf_u32_pair("a", 1)};
  bare.alignment = 1;
  const std::string text = bare.bytes();
  EXPECT_EQ(parse_gguf(bytes_of(text), "x").metadata.get_int("a"), 1);
}

struct Lie {
  const char* name;
  std::function<void(ForgedGguf&)> tell;
};

std::vector<Lie> lies() {
  const std::uint64_t huge = 0x7fffffffffffffffU;
  return {
      {"magic", [](ForgedGguf& f) { f.magic = "GGML"; }},
      {"magic_swapped", [](ForgedGguf& f) { f.magic = "FUGG"; }},
      {"version_0", [](ForgedGguf& f) { f.version = 0; }},
      {"version_1", [](ForgedGguf& f) { f.version = 1; }},
      {"version_4", [](ForgedGguf& f) { f.version = 4; }},
      {"big_endian", [](ForgedGguf& f) { f.version = 0x03000000U; }},
      {"pairs_one_more", [](ForgedGguf& f) { f.more_pairs = 1; }},
      {"pairs_negative", [](ForgedGguf& f) { f.more_pairs = -5; }},
      {"pairs_huge", [](ForgedGguf& f) { f.more_pairs = INT64_MAX - 2; }},
      {"tensors_one_more", [](ForgedGguf& f) { f.more_tensors = 1; }},
      {"tensors_one_less", [](ForgedGguf& f) { f.more_tensors = -1; }},
      {"tensors_negative", [](ForgedGguf& f) { f.more_tensors = -4; }},
      {"tensors_huge", [](ForgedGguf& f) { f.more_tensors = INT64_MAX - 3; }},
      {"key_empty", [](ForgedGguf& f) { f.pairs.push_back(gguf_u32_pair("", 1)); }},
      {"key_twice", [](ForgedGguf& f) { f.pairs.push_back(f.pairs.front()); }},
      {"key_length_huge", [=](ForgedGguf& f) { f.pairs.push_back(raw(huge) + "key"); }},
      {"key_too_long",
       [](ForgedGguf& f) { f.pairs.push_back(gguf_u32_pair(std::string(65536, 'k'), 1)); }},
      {"type_13", [](ForgedGguf& f) { f.pairs.push_back(gguf_pair("t", 13, raw(0U))); }},
      {"type_huge", [](ForgedGguf& f) { f.pairs.push_back(gguf_pair("t", 0xffffffffU, raw(0U))); }},
      {"bool_2", [](ForgedGguf& f) { f.pairs.push_back(gguf_pair("t", 7, "\2")); }},
      {"string_length_huge",
       [=](ForgedGguf& f) { f.pairs.push_back(gguf_pair("t", 8, raw(huge) + "x")); }},
      {"array_of_arrays",
       [](ForgedGguf& f) {
         f.pairs.push_back(
             gguf_pair("t", 9, raw(9U) + raw(std::uint64_t{1}) + raw(4U) + raw(std::uint64_t{0})));
       }},
      {"array_type_13",
       [](ForgedGguf& f) {
         f.pairs.push_back(gguf_pair("t", 9, raw(13U) + raw(std::uint64_t{0})));
       }},
      {"array_count_huge",
       [=](ForgedGguf& f) { f.pairs.push_back(gguf_pair("t", 9, raw(4U) + raw(huge))); }},
      {"array_count_wraps",
       [](ForgedGguf& f) {
         f.pairs.push_back(gguf_pair("t", 9, raw(12U) + raw(std::uint64_t{1} << 61U)));
       }},
      {"strings_count_huge",
       [=](ForgedGguf& f) { f.pairs.push_back(gguf_pair("t", 9, raw(8U) + raw(huge))); }},
      {"strings_one_too_long",
       [=](ForgedGguf& f) {
         f.pairs.push_back(gguf_pair("t", 9, raw(8U) + raw(std::uint64_t{1}) + raw(huge)));
       }},
      {"alignment_0",
       [](ForgedGguf& f) { f.pairs.push_back(gguf_u32_pair("general.alignment", 0)); }},
      {"alignment_48",
       [](ForgedGguf& f) { f.pairs.push_back(gguf_u32_pair("general.alignment", 48)); }},
      {"alignment_huge",
       [](ForgedGguf& f) { f.pairs.push_back(gguf_u32_pair("general.alignment", 0x80000000U)); }},
      {"alignment_u64",
       [](ForgedGguf& f) {
         f.pairs.push_back(gguf_pair("general.alignment", 10, raw(std::uint64_t{32})));
       }},
      {"alignment_text",
       [](ForgedGguf& f) { f.pairs.push_back(gguf_text_pair("general.alignment", "32")); }},
      {"alignment_other",
       [](ForgedGguf& f) { f.pairs.push_back(gguf_u32_pair("general.alignment", 64)); }},
      {"name_empty", [](ForgedGguf& f) { f.tensors[0] = gguf_tensor("", {8}, 0, 0); }},
      {"name_64",
       [](ForgedGguf& f) { f.tensors[0] = gguf_tensor(std::string(64, 'n'), {8}, 0, 0); }},
      {"name_twice", [](ForgedGguf& f) { f.tensors[1] = gguf_tensor("a.weight", {8}, 0, 32); }},
      {"no_dimensions", [](ForgedGguf& f) { f.tensors[0] = gguf_tensor("a.weight", {}, 0, 0); }},
      {"five_dimensions",
       [](ForgedGguf& f) {
         f.tensors[0] = gguf_tensor("a.weight", {8, 1, 1, 1, 1}, 0, 0);
       }},
      {"dimensions_huge",
       [](ForgedGguf& f) {
         f.tensors[0] = gguf_string("a.weight") + raw(0xffffffffU) + std::string(64, '\1');
       }},
      {"extent_negative",
       [](ForgedGguf& f) {
         f.tensors[0] = gguf_tensor("a.weight", {-8, -1}, 0, 0);
       }},
      {"extents_overflow",
       [](ForgedGguf& f) {
         f.tensors[0] =
             gguf_tensor("a.weight", {std::int64_t{1} << 62U, std::int64_t{1} << 62U}, 0, 0);
       }},
      {"bytes_overflow",
       [](ForgedGguf& f) { f.tensors[0] = gguf_tensor("a.weight", {INT64_MAX}, 0, 0); }},
      {"larger_than_the_file",
       [](ForgedGguf& f) { f.tensors[2] = gguf_tensor("c.weight", {1 << 20}, 2, 64); }},
      {"row_without_whole_blocks",
       [](ForgedGguf& f) { f.tensors[2] = gguf_tensor("c.weight", {31}, 2, 64); }},
      {"blocks_only_over_rows",
       [](ForgedGguf& f) {
         f.tensors[2] = gguf_tensor("c.weight", {16, 2}, 2, 64);
       }},
      {"type_4", [](ForgedGguf& f) { f.tensors[2] = gguf_tensor("c.weight", {32}, 4, 64); }},
      {"type_99", [](ForgedGguf& f) { f.tensors[2] = gguf_tensor("c.weight", {32}, 99, 64); }},
      {"overlap", [](ForgedGguf& f) { f.tensors[1] = gguf_tensor("b.weight", {8}, 0, 0); }},
      {"hole", [](ForgedGguf& f) { f.tensors[1] = gguf_tensor("b.weight", {8}, 0, 64); }},
      {"offset_unaligned",
       [](ForgedGguf& f) { f.tensors[1] = gguf_tensor("b.weight", {8}, 0, 33); }},
      {"offset_huge",
       [](ForgedGguf& f) { f.tensors[1] = gguf_tensor("b.weight", {8}, 0, 0xffffffffffffffe0U); }},
      {"swapped", [](ForgedGguf& f) { std::swap(f.tensors[0], f.tensors[1]); }},
      {"data_short", [](ForgedGguf& f) { f.data.resize(81); }},
      {"data_missing", [](ForgedGguf& f) { f.data.clear(); }},
      {"data_longer", [](ForgedGguf& f) { f.data += '\0'; }},
      {"data_between", [](ForgedGguf& f) { f.data.resize(90); }},
      {"data_without_tensors", [](ForgedGguf& f) { f.tensors.clear(); }},
  };
}

void expect_refused(const std::string& bytes, const std::string& name) {
  try {
    (void)parse_gguf(bytes_of(bytes), "forged.gguf");
    ADD_FAILURE() << name << ": was accepted";
  } catch (const Error& error) {
    EXPECT_EQ(exit_code(error.kind()), 3) << name;
    const std::string text = error.three_lines();
    EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 3) << name << '\n' << text;
    EXPECT_FALSE(error.failed().empty() || error.reason().empty() || error.hint().empty()) << name;
    if (std::getenv("QUERN_SHOW_ERRORS") != nullptr) {  // NOLINT(concurrency-mt-unsafe)
      std::cout << "[" << name << "]\n" << text;
    }
  }
}

TEST(Gguf, EveryLieIsRefused) {
  const std::string good = good_gguf().bytes();
  EXPECT_NO_THROW((void)parse_gguf(bytes_of(good), "good"));
  EXPECT_GE(lies().size(), 50U);
  for (const Lie& lie : lies()) {
    ForgedGguf file = good_gguf();
    lie.tell(file);
    expect_refused(file.bytes(), lie.name);
  }
  expect_refused("version https://git-lfs.github.com/spec/v1\n", "lfs");
  expect_refused("", "empty");
}

TEST(Gguf, AFileThatEndsAnywhereIsRefused) {
  const std::string good = good_gguf().bytes();
  // The last 14 bytes are padding.
  for (std::size_t bytes = 0; bytes < good.size() - 14; ++bytes) {
    expect_refused(good.substr(0, bytes), "first " + std::to_string(bytes) + " bytes");
  }
}

TEST(Gguf, NoFlippedByteLeadsOutsideOfTheFile) {
  const std::string good = read_file(gguf_path("container_kv.gguf"));
  std::mt19937 random(5);
  std::size_t refused = 0;
  for (std::size_t at = 0; at < 1856; ++at) {
    std::string bytes = good;
    bytes[at] = static_cast<char>(random());
    try {
      const GgufContent content = parse_gguf(bytes_of(bytes), "flipped");
      for (const GgufTensor& tensor : content.tensors) {
        ASSERT_EQ(ggml_tensor_bytes(tensor.type, tensor.shape), tensor.bytes.size());
        ASSERT_TRUE(
            tensor.bytes.empty() ||
            (tensor.bytes.data() >= bytes_of(bytes).data() &&
             tensor.bytes.data() + tensor.bytes.size() <= bytes_of(bytes).data() + bytes.size()));
      }
    } catch (const Error&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, 500U);
}

// A model in `count` parts, as gguf-split names and numbers them.
struct Part {
  std::string name;
  std::string bytes;
};

std::vector<Part> parts(std::size_t count) {
  std::vector<Part> all;
  for (std::size_t i = 0; i < count; ++i) {
    ForgedGguf file;
    file.pairs = {
        gguf_pair("split.no", 2, raw(static_cast<std::uint16_t>(i))),
        gguf_pair("split.count", 2, raw(static_cast<std::uint16_t>(count))),
        gguf_pair("split.tensors.count", 5, raw(static_cast<std::int32_t>(count)))};
    if (i == 0) {
      file.pairs.push_back(gguf_text_pair("general.architecture", "qwen3"));
    }
    file.tensors = {gguf_tensor("t" + std::to_string(i), {8}, 0, 0)};
    file.data = std::string(32, static_cast<char>(i));
    all.push_back(
        {"m-0000" + std::to_string(i + 1) + "-of-0000" + std::to_string(count) + ".gguf",
         file.bytes()});
  }
  return all;
}

void write_parts(const std::filesystem::path& directory, const std::vector<Part>& all) {
  for (const Part& part : all) {
    write_file(directory / part.name, part.bytes);
  }
}

TEST(Gguf, PartsAreOpenedTogetherWhicheverIsNamed) {
  const ScratchDirectory scratch;
  const std::vector<Part> all = parts(3);
  write_parts(scratch.path(), all);
  for (const Part& part : all) {
    const auto file = GgufFile::open(scratch.path() / part.name);
    ASSERT_EQ(file->tensors().size(), 3U);
    EXPECT_EQ(file->files().size(), 3U);
    EXPECT_EQ(file->metadata().get_string("general.architecture"), "qwen3");
    for (int i = 0; i < 3; ++i) {
      const GgufTensor* tensor = file->find("t" + std::to_string(i));
      ASSERT_NE(tensor, nullptr);
      EXPECT_EQ(text_of(tensor->bytes), std::string(32, static_cast<char>(i)));
      file->release(tensor->bytes);
      EXPECT_EQ(text_of(tensor->bytes), std::string(32, static_cast<char>(i)));
    }
  }
}

TEST(Gguf, PartsThatDoNotBelongTogetherAreRefused) {
  const auto refused = [](const std::function<void(std::vector<Part>&)>& change, const char* what) {
    const ScratchDirectory scratch;
    std::vector<Part> all = parts(3);
    change(all);
    write_parts(scratch.path(), all);
    try {
      (void)GgufFile::open(scratch.path() / all.front().name);
      ADD_FAILURE() << what << ": was accepted";
    } catch (const Error& error) {
      EXPECT_EQ(exit_code(error.kind()), 3) << what;
    }
  };
  refused([](auto& all) { all.pop_back(); }, "a part is missing");
  refused([](auto& all) { std::swap(all[1].bytes, all[2].bytes); }, "names are swapped");
  refused([](auto& all) { all[1].bytes = all[2].bytes; }, "a part stands twice");
  refused([](auto& all) { all[2].bytes = parts(4)[2].bytes; }, "a part of another model");
  refused([](auto& all) { all[2].bytes = good_gguf().bytes(); }, "a whole model as part");
  refused(
      [](auto& all) {
        for (Part& part : all) {
          part.name = "x" + part.name.substr(1, 6) + ".gguf";
        }
      },
      "the name has no number");
  refused(
      [](auto& all) {
        std::size_t at = all[0].bytes.find("split.tensors.count");
        all[0].bytes[at + std::strlen("split.tensors.count") + 4] = 4;
      },
      "a tensor is missing");
  refused(
      [](auto& all) { all[2].bytes[all[2].bytes.find("t2") + 1] = '1'; },
      "a tensor stands in two parts");
}

TEST(Gguf, MisuseOfTheWriterIsALogicError) {
  const GgufMetadata none;
  EXPECT_THROW((void)plan_gguf(none, {{"", GgmlType::kF32, {1}}}), std::logic_error);
  EXPECT_THROW(
      (void)plan_gguf(none, {{std::string(64, 'n'), GgmlType::kF32, {1}}}), std::logic_error);
  EXPECT_THROW((void)plan_gguf(none, {{"a", GgmlType::kQ4K, {2, 128}}}), std::logic_error);
  EXPECT_THROW((void)plan_gguf(none, {{"a", GgmlType::kF32, {}}}), std::logic_error);
  EXPECT_THROW((void)plan_gguf(none, {{"a", GgmlType::kF32, {1, 1, 1, 1, 1}}}), std::logic_error);
  EXPECT_THROW(
      (void)plan_gguf(none, {{"a", GgmlType::kF32, {1}}, {"a", GgmlType::kF32, {1}}}),
      std::logic_error);
  GgufMetadata odd;
  odd.add("general.alignment", std::uint32_t{24});
  EXPECT_THROW((void)plan_gguf(odd, {}), std::logic_error);
  const ScratchDirectory scratch;
  {
    GgufWriter writer(scratch.path() / "x.gguf", plan_gguf(none, {{"a", GgmlType::kI8, {4}}}));
    EXPECT_THROW(writer.write("b", bytes_of("abcd")), std::logic_error);
    EXPECT_THROW(writer.write("a", bytes_of("abc")), std::logic_error);
    EXPECT_THROW(writer.append("a", bytes_of("abcde")), std::logic_error);
    EXPECT_THROW(writer.finish(), std::logic_error);
    writer.write("a", bytes_of("abcd"));
    EXPECT_THROW(writer.write("a", bytes_of("abcd")), std::logic_error);
  }
  EXPECT_TRUE(std::filesystem::is_empty(scratch.path()));
  EXPECT_THROW(
      GgufWriter(scratch.path() / "no" / "x.gguf", plan_gguf(none, {{"a", GgmlType::kI8, {4}}})),
      IoError);
}

}  // namespace
}  // namespace quern
