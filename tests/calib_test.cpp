// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "base/file.h"
#include "base/half.h"
#include "calib/calibration_set.h"
#include "calib/statistics.h"
#include "nn/activation_store.h"
#include "quant_fixture.h"
#include "scratch.h"
#include "tokenizer/tokenizer.h"

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <vector>

namespace quern {
namespace {

using testing::ScratchDirectory;
using testing::TestContext;

using Matrix = std::vector<float>;  // [rows, width]

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

Matrix random_rows(std::int64_t rows, std::int64_t width, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Matrix X(static_cast<std::size_t>(rows * width));
  for (float& value : X) {
    value = normal(random);
  }
  return X;
}

// Whole numbers up to 8: every partial sum of 9000 products is below 2^24, so float is exact.
Matrix integer_rows(std::int64_t rows, std::int64_t width, unsigned seed) {
  std::mt19937 random(seed);
  Matrix X(static_cast<std::size_t>(rows * width));
  for (float& value : X) {
    value = static_cast<float>(static_cast<int>(random() % 17) - 8);
  }
  return X;
}

// Sum of x y, or of |x y|, over rows, column i with column j.
double product_sum(const Matrix& X, std::int64_t width, std::int64_t i, std::int64_t j, bool abs) {
  double sum = 0;
  for (std::size_t row = 0; row < X.size(); row += static_cast<std::size_t>(width)) {
    const double value = static_cast<double>(X[row + static_cast<std::size_t>(i)]) *
                         static_cast<double>(X[row + static_cast<std::size_t>(j)]);
    sum += abs ? std::fabs(value) : value;
  }
  return sum;
}

// The first entry (i, j) of H for which `wrong` says so, as text; "" when there is none. All of a
// small matrix, of a large one every 53rd row and column and the edges of the tiles of 384; both
// triangles.
template <class Wrong>
std::string first_wrong(std::int64_t width, std::int64_t rows, const Wrong& wrong) {
  std::set<std::int64_t> at;
  const std::int64_t step = width * width * rows > 5'000'000 ? 53 : 1;
  for (std::int64_t i = 0; i < width; i += step) {
    at.insert(i);
  }
  for (const std::int64_t edge : {std::int64_t{383}, std::int64_t{384}, width - 1}) {
    at.insert(std::min(edge, width - 1));
  }
  for (const std::int64_t i : at) {
    for (const std::int64_t j : at) {
      if (wrong(i, j)) {
        return fmt::format("H[{}, {}] of width {} after {} rows", i, j, width, rows);
      }
    }
  }
  return "";
}

SiteStats stats_of(const Context& ctx, Matrix X, std::int64_t width, std::int64_t block_rows) {
  SiteAccumulator accumulator(width);
  const std::int64_t rows = static_cast<std::int64_t>(X.size()) / width;
  for (std::int64_t begin = 0; begin < rows; begin += block_rows) {
    accumulator.add(
        ctx, X.data() + begin * width, nullptr, std::min(block_rows, rows - begin), false);
  }
  return accumulator.finish(ctx);
}

// Row r holds r in every column: the sample says which rows were taken.
TEST(SiteAccumulator, SamplesEvenlySpacedRows) {
  const TestContext ctx(2);
  for (const std::int64_t rows : {1, 100, 256, 257, 5000}) {
    for (const std::int64_t block : {rows, std::int64_t{7}}) {
      Matrix X(static_cast<std::size_t>(2 * rows));
      for (std::size_t i = 0; i < X.size(); ++i) {
        X[i] = static_cast<float>(i / 2);
      }
      const SiteStats stats = stats_of(*ctx, X, 2, block);
      const std::int64_t count = stats.sample_rows();
      EXPECT_LE(count, SiteStats::kSampledRows);
      EXPECT_GE(count, std::min(rows, SiteStats::kSampledRows / 2));
      const float stride = count > 1 ? stats.sample[2] : 1.0F;
      for (std::int64_t i = 0; i < count; ++i) {
        EXPECT_EQ(stats.sample[static_cast<std::size_t>(2 * i)], stride * static_cast<float>(i));
        EXPECT_EQ(
            stats.sample[static_cast<std::size_t>(2 * i + 1)], stride * static_cast<float>(i));
      }
      EXPECT_GT(stride * static_cast<float>(count), static_cast<float>(rows - 1));  // to the end
    }
  }
}

TEST(SiteAccumulator, HeldOutAndBrokenRowsAreNotSampled) {
  const TestContext ctx(1);
  SiteAccumulator accumulator(1);
  Matrix first = {1, kNaN, 2};
  Matrix held = {3, 4};
  accumulator.add(*ctx, first.data(), nullptr, 3, false);
  accumulator.add(*ctx, held.data(), nullptr, 2, true);
  EXPECT_EQ(accumulator.finish(*ctx).sample, (Matrix{1, 2}));
  // The next site begins with every row again.
  Matrix next = {5, 6, 7};
  accumulator.add(*ctx, next.data(), nullptr, 3, false);
  EXPECT_EQ(accumulator.finish(*ctx).sample, (Matrix{5, 6, 7}));
}

TEST(SiteAccumulator, IsExactWhereFloatIs) {
  const TestContext ctx(2);
  for (const std::int64_t width : {1, 5, 385, 400}) {
    for (const std::int64_t rows : {1, 3, 9000}) {
      const Matrix X = integer_rows(rows, width, 11);
      for (const std::int64_t block : {rows, std::int64_t{1000}}) {
        const SiteStats stats = stats_of(*ctx, X, width, block);
        EXPECT_EQ(stats.width, width);
        EXPECT_EQ(stats.rows, rows);
        EXPECT_EQ(stats.dropped_rows, 0);
        EXPECT_EQ(stats.holdout_rows, 0);
        EXPECT_TRUE(stats.H_holdout.empty());
        ASSERT_EQ(stats.H.size(), static_cast<std::size_t>(width * width));
        const double inverse = 1.0 / static_cast<double>(rows);
        const auto wrong = [&](std::int64_t i, std::int64_t j) {
          return stats.H[static_cast<std::size_t>(i * width + j)] !=
                 product_sum(X, width, i, j, false) * inverse;
        };
        EXPECT_EQ(first_wrong(width, rows, wrong), "");
      }
    }
  }
}

// A float sum of n products is off by at most lambda sqrt(n) u times the sum of their sizes but
// with probability 2 n exp(-lambda^2 / 2) (Higham and Mary 2019); u = 2^-24, lambda = 8: below
// 3e-10 for n = 9000. The bound is a third of what one lost row of 9000 would change.
TEST(SiteAccumulator, RoundsAsAFloatSumDoes) {
  const TestContext ctx(2);
  for (const std::int64_t width : {5, 385, 400}) {
    for (const std::int64_t rows : {1, 3, 9000}) {
      const Matrix X = random_rows(rows, width, 12);
      const SiteStats stats = stats_of(*ctx, X, width, 700);
      const double bound = 8 * std::sqrt(static_cast<double>(rows)) * 0x1p-24;
      const auto wrong = [&](std::int64_t i, std::int64_t j) {
        const double n = static_cast<double>(rows);
        const double error = stats.H[static_cast<std::size_t>(i * width + j)] -
                             product_sum(X, width, i, j, false) / n;
        return !(std::fabs(error) <= bound * product_sum(X, width, i, j, true) / n);
      };
      EXPECT_EQ(first_wrong(width, rows, wrong), "");
    }
  }
}

TEST(SiteAccumulator, IsSymmetricToTheBit) {
  const TestContext ctx(2);
  const SiteStats stats = stats_of(*ctx, random_rows(50, 400, 13), 400, 50);
  for (std::size_t i = 0; i < 400; ++i) {
    for (std::size_t j = 0; j < i; ++j) {
      ASSERT_EQ(stats.H[i * 400 + j], stats.H[j * 400 + i]);
    }
  }
}

TEST(SiteAccumulator, HoldsTheLargestSizeOfEveryChannel) {
  const TestContext ctx(2);
  const std::int64_t width = 600;
  Matrix X = random_rows(70, width, 14);
  X[3 * 600 + 5] = -50;
  X[69 * 600 + 599] = 60;
  SiteAccumulator accumulator(width);
  Matrix first(X.begin(), X.begin() + 35 * width);
  Matrix second(X.begin() + 35 * width, X.end());
  accumulator.add(*ctx, first.data(), nullptr, 35, false);
  accumulator.add(*ctx, second.data(), nullptr, 35, true);
  const SiteStats stats = accumulator.finish(*ctx);
  for (std::size_t i = 0; i < 600; ++i) {
    float highest = 0;
    for (std::size_t r = 0; r < 70; ++r) {
      highest = std::max(highest, std::fabs(X[r * 600 + i]));
    }
    ASSERT_EQ(stats.abs_max[i], highest) << i;
  }
  EXPECT_EQ(stats.abs_max[5], 50);
  EXPECT_EQ(stats.abs_max[599], 60);
}

TEST(SiteAccumulator, RowsThatAreNoNumbersAreLeftOutAndCounted) {
  const TestContext ctx(2);
  for (const std::int64_t width : {1, 5, 385}) {
    const std::int64_t rows = 200;
    Matrix X = integer_rows(rows, width, 15);
    Matrix clean;
    std::int64_t bad_rows = 0;
    for (std::int64_t r = 0; r < rows; ++r) {
      float* row = X.data() + r * width;
      // The first rows, the last ones and some between; in the first and the last column.
      if (r < 3 || r >= rows - 2 || r % 13 == 0) {
        row[r % 2 == 0 ? 0 : width - 1] = r % 3 == 0 ? kNaN : r % 3 == 1 ? kInfinity : -kInfinity;
        ++bad_rows;
      } else {
        clean.insert(clean.end(), row, row + width);
      }
    }
    const SiteStats stats = stats_of(*ctx, X, width, 90);
    const SiteStats expected = stats_of(*ctx, clean, width, rows);
    EXPECT_EQ(stats.dropped_rows, bad_rows);
    EXPECT_EQ(stats.rows, rows - bad_rows);
    EXPECT_EQ(stats.H, expected.H);
    EXPECT_EQ(stats.abs_max, expected.abs_max);
  }
  // The largest floats are numbers.
  const float largest = std::numeric_limits<float>::max();
  EXPECT_EQ(stats_of(*ctx, {1.0F, 0x1p60F, -0x1p60F}, 3, 1).dropped_rows, 0);
  EXPECT_EQ(stats_of(*ctx, {largest, 0.0F, 1e-45F}, 3, 1).dropped_rows, 0);
  // Nothing left.
  const SiteStats none = stats_of(*ctx, {kNaN, 1.0F, 2.0F, kInfinity}, 2, 2);
  EXPECT_EQ(none.rows, 0);
  EXPECT_EQ(none.dropped_rows, 2);
  EXPECT_EQ(none.H, std::vector<double>(4, 0.0));
}

TEST(SiteAccumulator, HeldOutRowsAreApart) {
  const TestContext ctx(2);
  const std::int64_t width = 20;
  const Matrix X = integer_rows(300, width, 16);
  Matrix kept;
  Matrix held;
  SiteAccumulator accumulator(width);
  for (std::int64_t r = 0; r < 300; r += 30) {
    const bool holdout = is_holdout(r / 30, 10) || r == 60;
    Matrix part(X.begin() + r * width, X.begin() + (r + 30) * width);
    Matrix& target = holdout ? held : kept;
    target.insert(target.end(), part.begin(), part.end());
    accumulator.add(*ctx, part.data(), nullptr, 30, holdout);
  }
  const SiteStats stats = accumulator.finish(*ctx);
  EXPECT_EQ(stats.rows, 240);
  EXPECT_EQ(stats.holdout_rows, 60);
  EXPECT_EQ(stats.H, stats_of(*ctx, kept, width, 1000).H);
  EXPECT_EQ(stats.H_holdout, stats_of(*ctx, held, width, 1000).H);
  // Empty again.
  const SiteStats empty = accumulator.finish(*ctx);
  EXPECT_EQ(empty.rows, 0);
  EXPECT_EQ(empty.width, width);
  EXPECT_EQ(empty.H, std::vector<double>(400, 0.0));
  EXPECT_EQ(empty.abs_max, std::vector<float>(20, 0.0F));
}

TEST(SiteAccumulator, ThreadsDoNotChangeABit) {
  const TestContext one(1);
  const TestContext two(2);
  const TestContext five(5);
  const Matrix X = random_rows(9000, 385, 17);
  const SiteStats expected = stats_of(*one, X, 385, 3000);
  for (const TestContext* ctx : {&two, &five}) {
    const SiteStats stats = stats_of(**ctx, X, 385, 3000);
    EXPECT_EQ(stats.H, expected.H);
    EXPECT_EQ(stats.abs_max, expected.abs_max);
  }
}

TEST(Holdout, IsEveryTenthOfEnough) {
  int held = 0;
  for (std::int64_t i = 0; i < 128; ++i) {
    held += is_holdout(i, 128) ? 1 : 0;
  }
  EXPECT_EQ(held, 12);
  EXPECT_TRUE(is_holdout(9, 10));
  for (std::int64_t i = 0; i < 9; ++i) {
    EXPECT_FALSE(is_holdout(i, 9));  // too few to spare one
    EXPECT_FALSE(is_holdout(i, 10));
  }
}

TEST(ActivationStore, FileAndMemoryHoldTheSame) {
  const ScratchDirectory scratch;
  const std::vector<std::int64_t> rows = {3, 0, 1, 7};
  ActivationStore memory(11, rows, {});
  ActivationStore spilled(11, rows, scratch.path());
  EXPECT_TRUE(std::filesystem::is_empty(scratch.path()));  // the file has no name
  EXPECT_EQ(ActivationStore::bytes(11, rows), 11U * 11U * 4U);
  for (const ActivationStore* store : {&memory, &spilled}) {
    EXPECT_EQ(store->count(), 4);
    EXPECT_EQ(store->rows(3), 7);
    EXPECT_EQ(store->width(), 11);
    Matrix values(7 * 11, 1.0F);
    store->read(3, values.data());
    EXPECT_EQ(values, Matrix(7 * 11, 0.0F));  // never written
  }
  std::vector<Matrix> written;
  for (std::int64_t i = 0; i < 4; ++i) {
    written.push_back(
        random_rows(rows[static_cast<std::size_t>(i)], 11, 20 + static_cast<unsigned>(i)));
  }
  written[3][5] = kNaN;
  for (const std::int64_t i : {2, 0, 3, 1, 0}) {  // any order, the last write counts
    memory.write(i, written[static_cast<std::size_t>(i)].data());
    spilled.write(i, written[static_cast<std::size_t>(i)].data());
  }
  ActivationStore moved = std::move(spilled);
  ActivationStore assigned(1, {}, {});
  assigned = std::move(moved);
  for (const ActivationStore* store : {&memory, &assigned}) {
    for (std::int64_t i = 0; i < 4; ++i) {
      const Matrix& expected = written[static_cast<std::size_t>(i)];
      Matrix values(expected.size() + 1, -7.0F);  // one more: nothing is written behind
      store->read(i, values.data());
      EXPECT_EQ(values.back(), -7.0F);
      EXPECT_TRUE(
          expected.empty() ||
          std::memcmp(values.data(), expected.data(), expected.size() * sizeof(float)) == 0);
    }
  }
}

TEST(ActivationStore, Bf16HoldsRoundedValuesInHalfTheRoom) {
  const ScratchDirectory scratch;
  const std::vector<std::int64_t> rows = {2, 5};
  ActivationStore memory(3, rows, {}, DType::kBF16);
  ActivationStore spilled(3, rows, scratch.path(), DType::kBF16);
  EXPECT_EQ(ActivationStore::bytes(3, rows, DType::kBF16), 3U * 7U * 2U);
  const Matrix first = {1, -2.5F, 0x1.01p0F, 3e38F, 0, 1e-30F};  // 2^-8 above 1 is half a step
  const Matrix second = random_rows(5, 3, 21);
  for (ActivationStore* store : {&memory, &spilled}) {
    Matrix values(15, -7.0F);
    store->read(1, values.data());
    EXPECT_EQ(values, Matrix(15, 0.0F));  // never written
    store->write(1, second.data());
    store->write(0, first.data());
    store->read(1, values.data());
    for (std::size_t i = 0; i < values.size(); ++i) {
      EXPECT_EQ(values[i], bf16_to_float(float_to_bf16(second[i])));
    }
    store->read(0, values.data());
    EXPECT_EQ(values[1], -2.5F);
    EXPECT_EQ(values[2], 1.0F);  // a tie goes to the even one
    EXPECT_EQ(values[6], bf16_to_float(float_to_bf16(second[6])));  // nothing is written behind
  }
}

TEST(ActivationStore, NoDiskIsAResourceError) {
  EXPECT_THROW(ActivationStore(4, {1}, "/nonexistent/quern"), ResourceError);
  const ScratchDirectory scratch;
  // 2^60 bytes: more than any disk.
  EXPECT_THROW(ActivationStore(1 << 20, {std::int64_t{1} << 38}, scratch.path()), ResourceError);
}

const Tokenizer& tokenizer() {
  static const Tokenizer kTokenizer =
      load_tokenizer(std::filesystem::path(QUERN_TESTDATA) / "models/tiny-qwen3");
  return kTokenizer;
}

// A text whose windows all differ.
CalibrationText counting(
    const std::string& name, const std::string& word, int count, double weight) {
  std::string text;
  for (int i = 0; i < count; ++i) {
    text += word + " " + std::to_string(i) + "\n";
  }
  return {name, weight, {text}};
}

std::string sha256_of(const std::vector<std::vector<std::int32_t>>& sequences) {
  Sha256 hash;
  for (const auto& sequence : sequences) {
    const std::uint64_t length = sequence.size();
    hash.update(std::as_bytes(std::span(&length, 1)));
    hash.update(std::as_bytes(std::span(sequence)));
  }
  return hash.hex();
}

TEST(CalibrationSet, IsAFunctionOfTheSeed) {
  const std::vector<CalibrationText> texts = {
      counting("a.txt", "apple", 400, 1), counting("b.txt", "stone", 400, 1)};
  const CalibrationSet first = make_calibration_set(texts, tokenizer(), 16, 32, 7);
  const CalibrationSet second = make_calibration_set(texts, tokenizer(), 16, 32, 7);
  const CalibrationSet other = make_calibration_set(texts, tokenizer(), 16, 32, 8);
  EXPECT_EQ(first.sequences, second.sequences);
  EXPECT_EQ(first.sha256, second.sha256);
  EXPECT_NE(first.sequences, other.sequences);
  EXPECT_NE(first.sha256, other.sha256);
  EXPECT_EQ(first.sha256, sha256_of(first.sequences));
  EXPECT_EQ(first.sources, (std::vector<std::string>{"a.txt", "b.txt"}));
  EXPECT_EQ(first.sequences.size(), 16U);
  EXPECT_EQ(first.tokens(), 16 * 32);
  // Not in the order of the sources: every tenth is held out.
  const auto apple = tokenizer().encode("apple 10\napple 11\napple 12");
  std::string order;
  for (const auto& sequence : first.sequences) {
    order += std::find(sequence.begin(), sequence.end(), apple[0]) != sequence.end() ? 'a' : 'b';
  }
  EXPECT_EQ(std::count(order.begin(), order.end(), 'a'), 8);
  EXPECT_NE(order, "aaaaaaaabbbbbbbb");
}

TEST(CalibrationSet, TheSameIdsOnEveryMachine) {
  const CalibrationSet set = make_calibration_set(
      {counting("a.txt", "apple", 400, 1), counting("b.txt", "stone", 400, 2)},
      tokenizer(),
      12,
      32,
      1);
  EXPECT_EQ(set.sha256, "7b21a7d4c9c55df2b350fc0fc20b3ba7be152c01d1f56103056d1eac6d3e2776");
}

TEST(CalibrationSet, WindowsAreDrawnOnce) {
  const CalibrationText text = counting("a.txt", "apple", 400, 1);
  const std::vector<std::int32_t> ids = tokenizer().encode(text.documents[0]);
  std::set<std::vector<std::int32_t>> windows;
  for (std::size_t begin = 0; begin + 32 <= ids.size(); begin += 32) {
    windows.emplace(
        ids.begin() + static_cast<std::ptrdiff_t>(begin),
        ids.begin() + static_cast<std::ptrdiff_t>(begin) + 32);
  }
  ASSERT_EQ(windows.size(), ids.size() / 32);
  // More asked than there are: all of them, each once.
  const CalibrationSet all = make_calibration_set({text}, tokenizer(), 100000, 32, 3);
  EXPECT_EQ(all.sequences.size(), windows.size());
  EXPECT_EQ(
      (std::set<std::vector<std::int32_t>>(all.sequences.begin(), all.sequences.end())), windows);
  const CalibrationSet some = make_calibration_set({text}, tokenizer(), 9, 32, 3);
  const std::set<std::vector<std::int32_t>> drawn(some.sequences.begin(), some.sequences.end());
  EXPECT_EQ(drawn.size(), 9U);
  for (const auto& window : drawn) {
    EXPECT_TRUE(windows.count(window) == 1);
  }
}

TEST(CalibrationSet, WeightsAreShares) {
  const std::int32_t apple = tokenizer().encode("\napple")[1];
  const auto apples = [&](double a, double b, std::int64_t samples) {
    const CalibrationSet set = make_calibration_set(
        {counting("a.txt", "apple", 2000, a), counting("b.txt", "stone", 2000, b)},
        tokenizer(),
        samples,
        32,
        5);
    EXPECT_EQ(static_cast<std::int64_t>(set.sequences.size()), samples);
    return std::count_if(set.sequences.begin(), set.sequences.end(), [&](const auto& sequence) {
      return std::find(sequence.begin(), sequence.end(), apple) != sequence.end();
    });
  };
  EXPECT_EQ(apples(3, 1, 40), 30);
  EXPECT_EQ(apples(0.25, 0.75, 40), 10);
  EXPECT_EQ(apples(1, 0, 40), 40);
  EXPECT_EQ(apples(0, 1, 40), 0);
}

TEST(CalibrationSet, DocumentsArePartedByTheEndOfTextToken) {
  const auto separator = tokenizer().find("<|endoftext|>");
  ASSERT_TRUE(separator);
  std::vector<std::int32_t> expected = tokenizer().encode("one two");
  const std::vector<std::int32_t> second = tokenizer().encode("three");
  expected.push_back(*separator);
  expected.insert(expected.end(), second.begin(), second.end());
  const CalibrationSet set = make_calibration_set(
      {{"x", 1, {"one two", "three"}}},
      tokenizer(),
      1,
      static_cast<std::int64_t>(expected.size()),
      1);
  EXPECT_EQ(set.sequences.at(0), expected);
}

TEST(CalibrationSet, TooShortATextIsRefused) {
  EXPECT_THROW(
      (void)make_calibration_set({{"x", 1, {"one two"}}}, tokenizer(), 4, 512, 1), UsageError);
  EXPECT_THROW((void)make_calibration_set({{"x", 1, {}}}, tokenizer(), 4, 8, 1), UsageError);
  EXPECT_THROW((void)make_calibration_set({{"x", 1, {""}}}, tokenizer(), 4, 8, 1), UsageError);
  EXPECT_THROW((void)make_calibration_set({}, tokenizer(), 4, 8, 1), UsageError);
}

TEST(CalibrationSet, TheBundledTextParsesAndSuffices) {
  CalibrationText mix;
  mix.name = "default mix";
  mix.documents = parse_calibration_jsonl(default_calibration_jsonl(), "default mix");
  EXPECT_GT(mix.documents.size(), 100U);
  for (const std::string& document : mix.documents) {
    EXPECT_GT(document.size(), 20U);
  }
  const CalibrationSet set = make_calibration_set({mix}, tokenizer(), 128, 512, 0);
  EXPECT_EQ(set.sequences.size(), 128U);
}

TEST(CalibrationJsonl, ThreeFormsOfARow) {
  const std::vector<std::string> documents = parse_calibration_jsonl(
      "{\"text\": \"plain\\ntext\"}\r\n"
      "\n  \t\n"
      R"({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]})"
      "\n"
      R"({"instruction": "do", "input": "this", "output": "done"})"
      "\n"
      R"({"instruction": "do", "input": "", "output": "done", "more": 3})"
      "\n"
      R"({"instruction": "do", "output": "done"})",  // no line end
      "f");
  ASSERT_EQ(documents.size(), 5U);
  EXPECT_EQ(documents[0], "plain\ntext");
  EXPECT_EQ(documents[1], "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n");
  EXPECT_EQ(
      documents[2],
      "<|im_start|>user\ndo\nthis<|im_end|>\n<|im_start|>assistant\ndone<|im_end|>\n");
  EXPECT_EQ(
      documents[3], "<|im_start|>user\ndo<|im_end|>\n<|im_start|>assistant\ndone<|im_end|>\n");
  EXPECT_EQ(documents[4], documents[3]);
  EXPECT_TRUE(parse_calibration_jsonl("", "f").empty());
}

TEST(CalibrationJsonl, BadRowsAreNamedByTheirLine) {
  for (const char* bad :
       {"{",
        "not json",
        "[]",
        "\"text\"",
        "{}",
        R"({"text": 3})",
        R"({"text": null})",
        R"({"messages": "x"})",
        R"({"messages": [3]})",
        R"({"messages": [{"role": "user"}]})",
        R"({"messages": [{"role": "user", "content": [{"type": "text"}]}]})",
        R"({"instruction": "x"})",
        R"({"instruction": "x", "output": 4})",
        R"({"text": "a", "text": "b"})",
        "{\"text\": \"\xff\"}"}) {
    try {
      (void)parse_calibration_jsonl(
          std::string("{\"text\": \"ok\"}\n\n") + bad + "\n", "mix.jsonl");
      FAIL() << bad;
    } catch (const ParseError& error) {
      EXPECT_EQ(error.where().rfind("mix.jsonl: line 3", 0), 0U) << bad << ": " << error.where();
    }
  }
}

std::string gzip(const std::string& text) {
  z_stream stream{};
  EXPECT_EQ(deflateInit2(&stream, 9, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY), Z_OK);
  std::string out(deflateBound(&stream, text.size()) + 64, '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(text.data()));
  stream.avail_in = static_cast<uInt>(text.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  EXPECT_EQ(deflate(&stream, Z_FINISH), Z_STREAM_END);
  out.resize(stream.total_out);
  deflateEnd(&stream);
  return out;
}

// One frame; with `first_block` > 0 its blocks are that many bytes and the rest.
std::string zstd(const std::string& text, std::size_t first_block = 0) {
  ZSTD_CCtx* context = ZSTD_createCCtx();
  std::string out(ZSTD_compressBound(text.size()) + 64, '\0');
  ZSTD_outBuffer to{out.data(), out.size(), 0};
  ZSTD_inBuffer head{text.data(), first_block, 0};
  if (first_block > 0) {
    EXPECT_EQ(ZSTD_compressStream2(context, &to, &head, ZSTD_e_flush), 0U);
  }
  ZSTD_inBuffer rest{text.data(), text.size(), first_block};
  EXPECT_EQ(ZSTD_compressStream2(context, &to, &rest, ZSTD_e_end), 0U);
  ZSTD_freeCCtx(context);
  out.resize(to.pos);
  return out;
}

// Text that compresses to about a half.
std::string noise(std::size_t bytes, unsigned seed) {
  std::mt19937 random(seed);
  std::string text(bytes, ' ');
  for (char& c : text) {
    c = static_cast<char>('a' + random() % 16);
  }
  return text;
}

class CalibrationFile : public ::testing::Test {
 protected:
  CalibrationText read(const std::string& name, const std::string& bytes) {
    write_file(scratch_.path() / name, bytes);
    return read_calibration_text(scratch_.path() / name, 2.5);
  }

  ScratchDirectory scratch_;
  std::string jsonl_ = "{\"text\": \"first\"}\n{\"text\": \"second\"}\n";
};

TEST_F(CalibrationFile, NameSaysWhatItIs) {
  const std::vector<std::string> two = {"first", "second"};
  EXPECT_EQ(read("a.txt", "some\ntext\n").documents, (std::vector<std::string>{"some\ntext\n"}));
  EXPECT_EQ(read("a.raw", jsonl_).documents, (std::vector<std::string>{jsonl_}));
  const CalibrationText text = read("a.jsonl", jsonl_);
  EXPECT_EQ(text.documents, two);
  EXPECT_EQ(text.name, "a.jsonl");
  EXPECT_EQ(text.weight, 2.5);
  EXPECT_EQ(read("a.jsonl.gz", gzip(jsonl_)).documents, two);
  EXPECT_EQ(read("a.jsonl.zst", zstd(jsonl_)).documents, two);
  EXPECT_EQ(read("a.txt.gz", gzip("x y")).documents, (std::vector<std::string>{"x y"}));
  EXPECT_EQ(read("a.txt.zst", zstd("x y")).documents, (std::vector<std::string>{"x y"}));
  for (const char* other : {"a.md", "a.json", "a.gz", "a.json.gz", "a.zst", "a", "a.txt.xz"}) {
    EXPECT_THROW(
        (void)read(other, std::string(other).ends_with("gz") ? gzip("x") : zstd("x")), UsageError)
        << other;
  }
  EXPECT_THROW((void)read_calibration_text(scratch_.path() / "absent.txt", 1), IoError);
}

TEST_F(CalibrationFile, LongAndJoinedArchivesAreReadWhole) {
  for (const std::size_t bytes : {0, 1, 65536, 131072, 131073, 300001, 1000000}) {
    const std::string text = noise(bytes, 31);
    EXPECT_TRUE(read("a.txt.gz", gzip(text)).documents.at(0) == text) << bytes;
    EXPECT_TRUE(read("a.txt.zst", zstd(text)).documents.at(0) == text) << bytes;
    EXPECT_TRUE(read("a.txt.gz", gzip(text) + gzip("end")).documents.at(0) == text + "end");
    EXPECT_TRUE(read("a.txt.zst", zstd(text) + zstd("end")).documents.at(0) == text + "end");
  }
  // Blocks that do not fill the reader's buffer.
  for (const std::size_t first : {1, 60000, 100000, 131072}) {
    const std::string text = noise(first + 100000, 32);
    EXPECT_TRUE(read("a.txt.zst", zstd(text, first)).documents.at(0) == text) << first;
  }
}

TEST_F(CalibrationFile, BrokenArchivesAreRefused) {
  const std::string text = noise(300000, 33);
  for (const auto& [name, whole] :
       {std::pair<std::string, std::string>{"a.txt.gz", gzip(text)}, {"a.txt.zst", zstd(text)}}) {
    for (const std::size_t length :
         {std::size_t{0},
          std::size_t{1},
          std::size_t{10},
          whole.size() / 2,
          whole.size() - 8,
          whole.size() - 1}) {
      EXPECT_THROW((void)read(name, whole.substr(0, length)), ParseError) << name << length;
    }
    EXPECT_THROW((void)read(name, "plain text, not an archive"), ParseError) << name;
    EXPECT_THROW((void)read(name, whole + "garbage behind"), ParseError) << name;
  }
  std::string flipped = gzip(text);
  flipped[flipped.size() / 2] = static_cast<char>(flipped[flipped.size() / 2] ^ 0x10);
  EXPECT_THROW((void)read("a.txt.gz", flipped), ParseError);  // by the checksum at the latest
  EXPECT_THROW((void)read("a.jsonl.gz", gzip("{\"text\": 3}")), ParseError);
}

}  // namespace
}  // namespace quern
