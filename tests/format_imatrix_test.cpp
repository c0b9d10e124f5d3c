// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "base/file.h"
#include "forged_gguf.h"
#include "format/imatrix.h"
#include "format/safetensors.h"
#include "scratch.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
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
using testing::raw;
using testing::ScratchDirectory;

std::string golden(const std::string& name) {
  return std::string(QUERN_TESTDATA) + "/golden/gguf/" + name;
}

std::span<const std::byte> bytes_of(const std::string& text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

std::vector<float> expected(const std::string& name) {
  static const auto kStore = SafetensorsStore::open(golden("imatrix.expect.safetensors"));
  return to_float(*kStore->find(name));
}

TEST(Imatrix, TheGgufFormIsRead) {
  const Imatrix imatrix = read_imatrix(golden("imatrix.gguf"));
  EXPECT_EQ(imatrix.datasets, std::vector<std::string>{"calib.txt"});
  EXPECT_EQ(imatrix.chunks, 4);
  EXPECT_EQ(imatrix.chunk_size, 512);
  ASSERT_EQ(imatrix.entries.size(), 2U);
  for (const auto& [name, entry] : imatrix.entries) {
    EXPECT_EQ(entry.sums, expected(name + ".in_sum2")) << name;
    EXPECT_EQ(entry.counts, expected(name + ".counts")) << name;
    EXPECT_EQ(entry.importance(), expected(name + ".importance")) << name;
  }
  EXPECT_EQ(imatrix.entries.at("blk.0.ffn_down_exps.weight").matrices(), 6);
}

TEST(Imatrix, TheLegacyFormIsRead) {
  const Imatrix imatrix = read_imatrix(golden("imatrix_legacy.dat"));
  EXPECT_EQ(imatrix.datasets, std::vector<std::string>{"calib.txt"});
  EXPECT_EQ(imatrix.chunks, 4);
  ASSERT_EQ(imatrix.entries.size(), 2U);
  for (const auto& [name, entry] : imatrix.entries) {
    const std::vector<float> found = entry.importance();
    const std::vector<float> wanted = expected(name + ".importance");
    ASSERT_EQ(found.size(), wanted.size());
    for (std::size_t i = 0; i < found.size(); ++i) {
      // The file holds mean * calls, rounded; dividing rounds again: two halves of 2^-23.
      ASSERT_NEAR(found[i], wanted[i], wanted[i] * 0x1p-23F) << name << ' ' << i;
    }
  }
}

TEST(Imatrix, WhatIsWrittenIsTheSameFile) {
  const ScratchDirectory scratch;
  const std::filesystem::path path = scratch.path() / "i.gguf";
  write_imatrix(path, read_imatrix(golden("imatrix.gguf")));
  EXPECT_TRUE(read_file(path) == read_file(golden("imatrix.gguf")));
  // The legacy form becomes the other one without loss.
  const Imatrix legacy = read_imatrix(golden("imatrix_legacy.dat"));
  write_imatrix(path, legacy);
  const Imatrix again = read_imatrix(path);
  for (const auto& [name, entry] : legacy.entries) {
    EXPECT_EQ(again.entries.at(name).importance(), entry.importance()) << name;
  }
}

TEST(Imatrix, WhatCannotBeWrittenIsALogicError) {
  const ScratchDirectory scratch;
  const std::filesystem::path path = scratch.path() / "i.gguf";
  const auto with = [](const std::string& name, ImatrixEntry entry) {
    Imatrix imatrix;
    imatrix.entries[name] = std::move(entry);
    return imatrix;
  };
  EXPECT_THROW(write_imatrix(path, with("a", {{1, 2, 3}, {1, 1}})), std::logic_error);
  EXPECT_THROW(write_imatrix(path, with("a", {{}, {1}})), std::logic_error);
  EXPECT_THROW(write_imatrix(path, with("a", {{1}, {}})), std::logic_error);
  EXPECT_THROW(write_imatrix(path, with(std::string(60, 'a'), {{1}, {1}})), std::logic_error);
  EXPECT_FALSE(std::filesystem::exists(path));
}

std::string floats(const std::vector<float>& values) {
  std::string text;
  for (const float value : values) {
    text += raw(value);
  }
  text.resize((text.size() + 31) / 32 * 32, '\0');
  return text;
}

std::string datasets() {
  return gguf_pair(
      "imatrix.datasets", 9, raw(8U) + raw(std::uint64_t{1}) + gguf_string("calib.txt"));
}

ForgedGguf good_imatrix() {
  ForgedGguf file;
  file.pairs = {
      gguf_text_pair("general.type", "imatrix"),
      datasets(),
      gguf_u32_pair("imatrix.chunk_count", 3),
      gguf_u32_pair("imatrix.chunk_size", 512)};
  file.tensors = {
      gguf_tensor("a.weight.in_sum2", {2, 2}, 0, 0), gguf_tensor("a.weight.counts", {1, 2}, 0, 32)};
  file.data = floats({1, 2, 3, 4}) + floats({10, 0});
  return file;
}

void expect_refused(const std::string& bytes, const std::string& name) {
  try {
    (void)parse_imatrix(bytes_of(bytes), "forged");
    ADD_FAILURE() << name << ": was accepted";
  } catch (const Error& error) {
    EXPECT_EQ(exit_code(error.kind()), 3) << name;
    const std::string text = error.three_lines();
    EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 3) << name << '\n' << text;
  }
}

TEST(Imatrix, LiesInTheGgufFormAreRefused) {
  const std::string good = good_imatrix().bytes();
  const Imatrix imatrix = parse_imatrix(bytes_of(good), "good");
  EXPECT_EQ(
      imatrix.entries.at("a.weight").importance(), (std::vector<float>{0.1F, 0.2F, 1.0F, 1.0F}));
  const auto lie = [](const std::string& name, const std::function<void(ForgedGguf&)>& tell) {
    ForgedGguf file = good_imatrix();
    tell(file);
    expect_refused(file.bytes(), name);
  };
  const float infinity = std::numeric_limits<float>::infinity();
  lie("a model", [](ForgedGguf& f) { f.pairs[0] = gguf_text_pair("general.type", "model"); });
  lie("type is a number", [](ForgedGguf& f) { f.pairs[0] = gguf_u32_pair("general.type", 1); });
  lie("no type", [](ForgedGguf& f) { f.pairs.erase(f.pairs.begin()); });
  lie("no datasets", [](ForgedGguf& f) { f.pairs.erase(f.pairs.begin() + 1); });
  lie("datasets is text",
      [](ForgedGguf& f) { f.pairs[1] = gguf_text_pair("imatrix.datasets", "x"); });
  lie("no chunk count", [](ForgedGguf& f) { f.pairs.erase(f.pairs.begin() + 2); });
  lie("negative chunk size",
      [](ForgedGguf& f) { f.pairs[3] = gguf_pair("imatrix.chunk_size", 5, raw(-1)); });
  lie("no counts", [](ForgedGguf& f) {
    f.tensors.pop_back();
    f.data.resize(32);
  });
  lie("no sums", [](ForgedGguf& f) { f.tensors[0] = gguf_tensor("b.counts", {4}, 0, 0); });
  lie("another name", [](ForgedGguf& f) { f.tensors[1] = gguf_tensor("a.weight", {1, 2}, 0, 32); });
  lie("only a suffix", [](ForgedGguf& f) { f.tensors[1] = gguf_tensor(".counts", {1, 2}, 0, 32); });
  lie("counts that do not divide", [](ForgedGguf& f) {
    f.tensors[1] = gguf_tensor("a.weight.counts", {1, 3}, 0, 32);
  });
  lie("more counts than sums", [](ForgedGguf& f) {
    f.tensors[1] = gguf_tensor("a.weight.counts", {1, 8}, 0, 32);
  });
  lie("empty", [](ForgedGguf& f) { f.tensors[1] = gguf_tensor("a.weight.counts", {1, 0}, 0, 32); });
  lie("sums in 16 bits", [](ForgedGguf& f) {
    f.tensors[0] = gguf_tensor("a.weight.in_sum2", {4, 2}, 1, 0);
  });
  lie("an infinite sum", [=](ForgedGguf& f) { f.data.replace(4, 4, raw(infinity)); });
  lie("a negative sum", [](ForgedGguf& f) { f.data.replace(4, 4, raw(-1.0F)); });
  lie("a NaN", [](ForgedGguf& f) { f.data.replace(0, 4, raw(std::nanf(""))); });
  lie("a negative count", [](ForgedGguf& f) { f.data.replace(32, 4, raw(-2.0F)); });
  for (std::size_t bytes = 0; bytes < good.size() - 24; ++bytes) {
    expect_refused(good.substr(0, bytes), "first " + std::to_string(bytes) + " bytes");
  }
}

struct Legacy {
  std::int32_t entries = 2;
  std::string first = entry("a", 4, {4, 8});
  std::string second = entry("bc", 2, {1, 2, 3});
  std::string end = raw(7) + raw(4) + "text";

  static std::string entry(
      const std::string& name, std::int32_t calls, const std::vector<float>& values) {
    std::string text = raw(static_cast<std::int32_t>(name.size())) + name + raw(calls) +
                       raw(static_cast<std::int32_t>(values.size()));
    for (const float value : values) {
      text += raw(value);
    }
    return text;
  }
  [[nodiscard]] std::string bytes() const { return raw(entries) + first + second + end; }
};

TEST(Imatrix, LiesInTheLegacyFormAreRefused) {
  Legacy good;
  const Imatrix imatrix = parse_imatrix(bytes_of(good.bytes()), "good");
  EXPECT_EQ(imatrix.chunks, 7);
  EXPECT_EQ(imatrix.entries.at("a").importance(), (std::vector<float>{1, 2}));
  good.end.clear();  // files of older tools
  EXPECT_EQ(parse_imatrix(bytes_of(good.bytes()), "good").chunks, 0);
  good.first = Legacy::entry("a", 0, {4, 8});
  EXPECT_EQ(
      parse_imatrix(bytes_of(good.bytes()), "good").entries.at("a").importance(),
      (std::vector<float>{4, 8}));

  const auto lie = [](const std::string& name, const std::function<void(Legacy&)>& tell) {
    Legacy file;
    tell(file);
    expect_refused(file.bytes(), name);
  };
  lie("no entries", [](Legacy& f) { f.entries = 0; });
  lie("negative entries", [](Legacy& f) { f.entries = -1; });
  lie("too many entries", [](Legacy& f) { f.entries = 3; });
  lie("too few entries", [](Legacy& f) { f.entries = 1; });
  lie("entries without end", [](Legacy& f) { f.entries = INT32_MAX; });
  lie("an empty name", [](Legacy& f) { f.first = Legacy::entry("", 4, {1}); });
  lie("a negative length", [](Legacy& f) { f.first.replace(0, 4, raw(-1)); });
  lie("a huge length", [](Legacy& f) { f.first.replace(0, 4, raw(INT32_MAX)); });
  lie("no values", [](Legacy& f) { f.first = Legacy::entry("a", 4, {}); });
  lie("negative values", [](Legacy& f) { f.first.replace(9, 4, raw(-3)); });
  lie("values without end", [](Legacy& f) { f.first.replace(9, 4, raw(INT32_MAX)); });
  lie("the same name twice", [](Legacy& f) { f.second = f.first; });
  lie("a NaN", [](Legacy& f) { f.first = Legacy::entry("a", 4, {std::nanf("")}); });
  lie("a negative importance", [](Legacy& f) { f.first = Legacy::entry("a", 4, {-1.0F}); });
  lie("negative chunks", [](Legacy& f) { f.end.replace(0, 4, raw(-1)); });
  lie("a data set that is cut", [](Legacy& f) { f.end.pop_back(); });
  lie("bytes behind the end", [](Legacy& f) { f.end += 'x'; });
  const std::size_t data = Legacy().bytes().size() - Legacy().end.size();
  for (std::size_t bytes = 0; bytes < Legacy().bytes().size(); ++bytes) {
    if (bytes != data) {  // that is a file of an older tool
      expect_refused(
          Legacy().bytes().substr(0, bytes), "first " + std::to_string(bytes) + " bytes");
    }
  }
  expect_refused("{\"a\": 1}", "JSON");
}

TEST(Imatrix, AFileThatIsNotThereIsAnIoError) {
  EXPECT_THROW((void)read_imatrix("/no/such/file.dat"), IoError);
}

}  // namespace
}  // namespace quern
