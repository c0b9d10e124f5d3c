// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "base/half.h"
#include "base/json.h"
#include "base/thread_pool.h"
#include "base/units.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <vector>

namespace quern {
namespace {

TEST(Half, EveryHalfSurvivesTheRoundTrip) {
  for (std::uint32_t bits = 0; bits < 0x10000U; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const float value = f16_to_float(half);
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(f16_to_float(float_to_f16(value))));
    } else {
      EXPECT_EQ(float_to_f16(value), half);
    }
  }
}

TEST(Half, RoundsToNearestEven) {
  EXPECT_EQ(float_to_f16(1.0F + 0x1p-11F), float_to_f16(1.0F));  // tie to even
  EXPECT_EQ(float_to_f16(1.0F + 0x1.8p-10F), float_to_f16(1.0F + 0x1p-9F));  // tie to even, upwards
  EXPECT_EQ(float_to_f16(65519.0F), 0x7bff);
  EXPECT_EQ(float_to_f16(65520.0F), 0x7c00);
  EXPECT_EQ(float_to_bf16(1.0F + 0x1p-8F), float_to_bf16(1.0F));
  EXPECT_EQ(float_to_bf16(1.0F + 0x1.8p-7F), float_to_bf16(1.0F + 0x1p-6F));
}

TEST(Error, IsThreeLinesWhateverTheFileSays) {
  const ParseError error("bad\nname", "a\x1b[31mfile", "found \xff\xfe", "try\tthis");
  const std::string text = error.three_lines();
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 3);
  EXPECT_EQ(text.find('\x1b'), std::string::npos);
  EXPECT_EQ(text.rfind("error: ", 0), 0U);
  EXPECT_NE(text.find("\nreason: "), std::string::npos);
  EXPECT_NE(text.find("\ntry: "), std::string::npos);
}

TEST(Json, RefusesDuplicateKeysDepthAndSyntax) {
  EXPECT_THROW((void)parse_json(R"({"a":1,"a":2})", "t"), ParseError);
  EXPECT_THROW((void)parse_json(std::string(100, '['), "t"), ParseError);
  EXPECT_THROW((void)parse_json("{", "t"), ParseError);
  EXPECT_THROW((void)parse_json("{\"a\":\"\xff\"}", "t"), ParseError);
  EXPECT_THROW((void)parse_json("1e999", "t"), ParseError);
  EXPECT_EQ(parse_json(R"({"a":{"b":1}, "c":{"b":2}})", "t")["c"]["b"], 2);
}

TEST(Json, ReaderNamesTheKey) {
  const Json json =
      parse_json(R"({"n": "x", "big": 18446744073709551615, "f": 1.5, "null": null})", "t");
  const JsonReader reader(json, "config.json");
  try {
    (void)reader.get_int("n");
    FAIL();
  } catch (const ParseError& error) {
    EXPECT_EQ(error.where(), "config.json: n");
  }
  EXPECT_THROW((void)reader.get_int("big"), ParseError);
  EXPECT_THROW((void)reader.get_int("f"), ParseError);
  EXPECT_THROW((void)reader.get_int("absent"), ParseError);
  EXPECT_EQ(reader.get_int_or("null", 7), 7);
}

TEST(ThreadPool, CoversEveryIndexOnceForAnySize) {
  for (const int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    for (const std::int64_t count : {0, 1, 7, 1000}) {
      for (const std::int64_t chunk : {1, 3, 1000}) {
        std::vector<std::atomic<int>> hits(static_cast<std::size_t>(count));
        pool.for_chunks(count, chunk, [&](std::int64_t begin, std::int64_t end, int worker) {
          ASSERT_GE(worker, 0);
          ASSERT_LT(worker, threads);
          for (std::int64_t i = begin; i < end; ++i) {
            ++hits[static_cast<std::size_t>(i)];
          }
        });
        for (const auto& hit : hits) {
          EXPECT_EQ(hit.load(), 1);
        }
      }
    }
  }
}

TEST(ThreadPool, RethrowsAndStaysUsable) {
  ThreadPool pool(3);
  EXPECT_THROW(
      pool.for_chunks(
          100,
          1,
          [](std::int64_t begin, std::int64_t, int) {
            if (begin == 42) {
              throw ParseError("x", "", "", "");
            }
          }),
      ParseError);
  std::atomic<int> sum = 0;
  pool.for_chunks(10, 1, [&](std::int64_t begin, std::int64_t, int) {
    pool.for_chunks(3, 1, [&](std::int64_t, std::int64_t, int) { sum += static_cast<int>(begin); });
  });
  EXPECT_EQ(sum.load(), 3 * 45);
}

TEST(Units, ParsesAndRefusesSizes) {
  EXPECT_EQ(parse_size("18GiB", "--memory"), std::uint64_t{18} << 30U);
  EXPECT_EQ(parse_size("1.5GB", "--memory"), 1500000000U);
  EXPECT_EQ(parse_size("512m", "--memory"), std::uint64_t{512} << 20U);
  for (const char* bad : {"", "x", "-1G", "1Q", "nan", "1e30T"}) {
    EXPECT_THROW((void)parse_size(bad, "--memory"), UsageError) << bad;
  }
}

}  // namespace
}  // namespace quern
