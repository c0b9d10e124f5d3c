// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "base/file.h"
#include "format/safetensors.h"
#include "format/safetensors_writer.h"
#include "scratch.h"

#include <gtest/gtest.h>

#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <vector>

namespace quern {
namespace {

using testing::ScratchDirectory;

std::vector<std::byte> pattern(std::uint64_t bytes, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<std::byte> values(bytes);
  std::generate(
      values.begin(), values.end(), [&] { return static_cast<std::byte>(random() & 0xffU); });
  return values;
}

std::vector<TensorDeclaration> some_tensors() {
  return {
      {"model.embed_tokens.weight", DType::kBF16, {100, 8}},
      {"a.qweight", DType::kI32, {8, 32}},
      {"a.scales", DType::kF16, {2, 32}},
      {"empty", DType::kF32, {0, 4}},
      {"scalar", DType::kF32, {}},
      {"name \"with\" \\ quotes and ü", DType::kU8, {3, 5, 1}},
      {"b.weight", DType::kF32, {33}}};
}

void write_all(SafetensorsWriter& writer, const std::vector<TensorDeclaration>& tensors) {
  // Backwards: the order of writing is free.
  for (std::size_t i = tensors.size(); i-- > 0;) {
    const auto& slot = writer.layout().slots.at(tensors[i].name);
    writer.write(tensors[i].name, pattern(slot.bytes, static_cast<std::uint32_t>(i)));
  }
}

void expect_contents(
    const std::filesystem::path& directory, const std::vector<TensorDeclaration>& tensors) {
  const auto store = SafetensorsStore::open(directory);
  ASSERT_EQ(store->tensors().size(), tensors.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const TensorView& view = store->require(tensors[i].name, tensors[i].shape);
    EXPECT_EQ(view.dtype, tensors[i].dtype);
    const auto expected = pattern(view.bytes.size(), static_cast<std::uint32_t>(i));
    EXPECT_TRUE(std::equal(expected.begin(), expected.end(), view.bytes.begin()))
        << tensors[i].name;
    store->release(view);
    EXPECT_TRUE(std::equal(expected.begin(), expected.end(), view.bytes.begin()))
        << tensors[i].name << " after its pages were given back";
  }
}

std::uint64_t bytes_in(const std::filesystem::path& directory) {
  std::uint64_t sum = 0;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    sum += entry.file_size();
  }
  return sum;
}

TEST(SafetensorsWriter, OneFileHoldsWhatWasWrittenAndHasThePredictedSize) {
  const ScratchDirectory scratch;
  SafetensorsWriter writer(scratch.path(), plan_safetensors(some_tensors()));
  write_all(writer, some_tensors());
  writer.finish();
  EXPECT_TRUE(std::filesystem::exists(scratch.path() / "model.safetensors"));
  EXPECT_EQ(bytes_in(scratch.path()), writer.layout().total_bytes());
  expect_contents(scratch.path(), some_tensors());
  const std::string file = read_file(scratch.path() / "model.safetensors");
  std::uint64_t header = 0;
  std::memcpy(&header, file.data(), 8);
  EXPECT_EQ(header % 8, 0U);
  EXPECT_EQ(file.substr(8, 33), R"({"__metadata__":{"format":"pt"},")");
}

TEST(SafetensorsWriter, EveryFileSizeGivesShardsOfThatSizeAndTheSameTensors) {
  for (std::uint64_t limit = 300; limit < 6000; limit += 123) {
    const ScratchDirectory scratch;
    SafetensorsOptions options;
    options.max_file_bytes = limit;
    SafetensorsWriter writer(scratch.path(), plan_safetensors(some_tensors(), options));
    write_all(writer, some_tensors());
    writer.finish();
    ASSERT_EQ(bytes_in(scratch.path()), writer.layout().total_bytes()) << limit;
    for (std::size_t i = 0; i < writer.layout().files.size(); ++i) {
      const SafetensorsLayout::File& file = writer.layout().files[i];
      ASSERT_EQ(std::filesystem::file_size(scratch.path() / file.name), file.bytes);
      const auto members = std::count_if(
          writer.layout().slots.begin(), writer.layout().slots.end(), [&](const auto& slot) {
            return slot.second.file == i;
          });
      ASSERT_TRUE(file.bytes <= limit || members == 1) << limit;
    }
    expect_contents(scratch.path(), some_tensors());
  }
}

TEST(SafetensorsWriter, TensorsAreAlignedToTheirType) {
  const std::vector<TensorDeclaration> odd = {
      {"bytes", DType::kU8, {3}}, {"halves", DType::kF16, {5}}, {"floats", DType::kF32, {2}}};
  const SafetensorsLayout layout = plan_safetensors(odd);
  EXPECT_EQ(layout.slots.at("floats").offset % 4, 0U);
  EXPECT_EQ(layout.slots.at("halves").offset % 2, 0U);
  const SafetensorsLayout kept =
      plan_safetensors({{"halves", DType::kF16, {4}}, {"floats", DType::kF32, {2}}});
  EXPECT_LT(kept.slots.at("halves").offset, kept.slots.at("floats").offset);
}

TEST(SafetensorsWriter, PiecesOfATensorFollowEachOther) {
  const ScratchDirectory scratch;
  SafetensorsWriter writer(scratch.path(), plan_safetensors({{"a", DType::kU8, {10}}}));
  const auto bytes = pattern(10, 0);
  writer.append("a", std::span(bytes).first(4));
  EXPECT_THROW(writer.finish(), std::logic_error);
  EXPECT_THROW(writer.append("a", bytes), std::logic_error);
  writer.append("a", std::span(bytes).subspan(4));
  writer.finish();
  expect_contents(scratch.path(), {{"a", DType::kU8, {10}}});
}

TEST(SafetensorsWriter, MisuseIsALogicError) {
  const ScratchDirectory scratch;
  SafetensorsWriter writer(scratch.path(), plan_safetensors({{"a", DType::kU8, {4}}}));
  EXPECT_THROW(writer.write("b", pattern(4, 0)), std::logic_error);
  EXPECT_THROW(writer.write("a", pattern(3, 0)), std::logic_error);
  EXPECT_THROW(writer.finish(), std::logic_error);
  writer.write("a", pattern(4, 0));
  EXPECT_THROW(writer.write("a", pattern(4, 0)), std::logic_error);
  EXPECT_THROW(
      (void)plan_safetensors({{"a", DType::kU8, {4}}, {"a", DType::kU8, {4}}}), std::logic_error);
  EXPECT_THROW((void)plan_safetensors({{"a", DType::kU8, {-4}}}), std::logic_error);
}

TEST(SafetensorsWriter, NothingLooksFinishedBeforeTheEnd) {
  const ScratchDirectory scratch;
  SafetensorsOptions options;
  options.max_file_bytes = 1000;
  {
    SafetensorsWriter writer(scratch.path(), plan_safetensors(some_tensors(), options));
    write_all(writer, some_tensors());
    // What a killed process leaves: hidden partial files only.
    std::size_t partial = 0;
    for (const auto& entry : std::filesystem::directory_iterator(scratch.path())) {
      EXPECT_EQ(entry.path().filename().string().front(), '.');
      EXPECT_EQ(entry.path().extension(), ".partial");
      ++partial;
    }
    EXPECT_EQ(partial, writer.layout().files.size());
    EXPECT_THROW((void)SafetensorsStore::open(scratch.path()), IoError);
  }
  EXPECT_TRUE(std::filesystem::is_empty(scratch.path()));

  // Killed between the shards and the index: the shards alone are no checkpoint.
  SafetensorsWriter writer(scratch.path(), plan_safetensors(some_tensors(), options));
  write_all(writer, some_tensors());
  writer.finish();
  std::filesystem::remove(scratch.path() / "model.safetensors.index.json");
  EXPECT_THROW((void)SafetensorsStore::open(scratch.path()), IoError);
  // And nothing is written over them.
  EXPECT_THROW(
      SafetensorsWriter(scratch.path(), plan_safetensors(some_tensors(), options)), UsageError);
}

TEST(SafetensorsWriter, WriteErrorsAreReported) {
  const ScratchDirectory scratch;
  try {
    SafetensorsWriter writer(scratch.path() / "none", plan_safetensors(some_tensors()));
    FAIL() << "wrote into a directory that does not exist";
  } catch (const IoError& error) {
    EXPECT_EQ(exit_code(error.kind()), 1);
  }
  // A limit on file sizes stands for a full disk.
  struct rlimit before {};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  struct rlimit small = before;
  small.rlim_cur = 4096;
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  int code = 0;
  try {
    SafetensorsWriter writer(scratch.path(), plan_safetensors({{"a", DType::kF32, {100, 100}}}));
  } catch (const ResourceError& error) {
    code = exit_code(error.kind());
  }
  ::setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(code, 4);
  EXPECT_TRUE(std::filesystem::is_empty(scratch.path()));
}

TEST(Safetensors, AHundredThousandTensorsParseInAboutASecond) {
  std::vector<TensorDeclaration> tensors;
  for (int i = 0; i < 100'000; ++i) {
    tensors.push_back(
        {"model.layers.0.mlp.experts." + std::to_string(i) + ".gate_proj.qweight",
         DType::kI32,
         {1, 1}});
  }
  const auto begin = std::chrono::steady_clock::now();
  const SafetensorsLayout layout = plan_safetensors(tensors);
  const auto planned = std::chrono::steady_clock::now();
  std::string file = layout.files.at(0).header;
  file.resize(layout.files[0].bytes);
  const SafetensorsContent content =
      parse_safetensors(std::as_bytes(std::span(file.data(), file.size())), "test");
  const auto parsed = std::chrono::steady_clock::now();
  EXPECT_EQ(content.tensors.size(), tensors.size());
  EXPECT_EQ(content.metadata.at("format"), "pt");
  const std::chrono::duration<double> plan_seconds = planned - begin;
  const std::chrono::duration<double> parse_seconds = parsed - planned;
  RecordProperty("plan_seconds", std::to_string(plan_seconds.count()));
  RecordProperty("parse_seconds", std::to_string(parse_seconds.count()));
  EXPECT_LT(parse_seconds.count(), 10.0);  // one in practice; sanitizers need room
}

TEST(Safetensors, TensorsMayStartAnywhere) {
  const std::string header = R"({"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                             R"("f":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}})";
  std::string file(8, '\0');
  const std::uint64_t length = header.size();
  std::memcpy(file.data(), &length, 8);
  const float value = 1.5F;
  file += header + "x" + std::string(reinterpret_cast<const char*>(&value), 4);
  const SafetensorsContent content =
      parse_safetensors(std::as_bytes(std::span(file.data(), file.size())), "test");
  EXPECT_EQ(to_float(content.tensors.at("f")).at(0), 1.5F);
}

TEST(Safetensors, OpensASingleFileByItsName) {
  const ScratchDirectory scratch;
  SafetensorsWriter writer(scratch.path(), plan_safetensors(some_tensors()));
  write_all(writer, some_tensors());
  writer.finish();
  std::filesystem::rename(
      scratch.path() / "model.safetensors", scratch.path() / "other.safetensors");
  EXPECT_EQ(
      SafetensorsStore::open(scratch.path() / "other.safetensors")->tensors().size(),
      some_tensors().size());
  EXPECT_THROW((void)SafetensorsStore::open(scratch.path() / "missing.safetensors"), IoError);
}

}  // namespace
}  // namespace quern
