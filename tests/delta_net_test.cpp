// SPDX-License-Identifier: Apache-2.0
#include "nn/delta_net.h"

#include "quant_fixture.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

namespace quern {
namespace {

using testing::TestContext;

DeltaHead random_head(std::int64_t rows, std::uint32_t seed) {
  DeltaHead head;
  head.rows = rows;
  head.key_dim = 16;
  head.value_dim = 24;
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  for (std::int64_t t = 0; t < rows; ++t) {
    for (std::vector<float>* vectors : {&head.queries, &head.keys}) {
      std::vector<float> v(16);
      float squares = 0;
      for (float& value : v) {
        value = normal(random);
        squares += value * value;
      }
      for (const float value : v) {
        vectors->push_back(value / std::sqrt(squares));
      }
    }
    for (std::int64_t i = 0; i < head.value_dim; ++i) {
      head.values.push_back(normal(random));
    }
    head.strengths.push_back(1.0F / (1.0F + std::exp(-normal(random))));
    head.log_decays.push_back(-std::exp(normal(random)));
  }
  return head;
}

// The recurrence in double, as the paper writes it.
std::vector<double> in_double(const DeltaHead& head, std::vector<double>& state) {
  const auto dk = static_cast<std::size_t>(head.key_dim);
  const auto dv = static_cast<std::size_t>(head.value_dim);
  std::vector<double> out;
  for (std::size_t t = 0; t < static_cast<std::size_t>(head.rows); ++t) {
    for (double& s : state) {
      s *= std::exp(static_cast<double>(head.log_decays[t]));
    }
    for (std::size_t c = 0; c < dv; ++c) {
      double seen = 0;
      for (std::size_t i = 0; i < dk; ++i) {
        seen += state[i * dv + c] * head.keys[t * dk + i];
      }
      const double error = head.strengths[t] * (head.values[t * dv + c] - seen);
      double o = 0;
      for (std::size_t i = 0; i < dk; ++i) {
        state[i * dv + c] += head.keys[t * dk + i] * error;
        o += state[i * dv + c] * head.queries[t * dk + i];
      }
      out.push_back(o);
    }
  }
  return out;
}

void expect_near(const std::vector<float>& found, const std::vector<double>& expected) {
  ASSERT_EQ(found.size(), expected.size());
  for (std::size_t i = 0; i < found.size(); ++i) {
    // Values of size 1 through sums of up to 64 and 150 steps that forget: some 100 roundings.
    EXPECT_NEAR(found[i], expected[i], 2e-5) << i;
  }
}

TEST(DeltaRule, TokenByTokenAndInChunksAreTheRecurrence) {
  const TestContext context;
  for (const std::int64_t rows : {1, 5, 63, 64, 65, 150}) {
    SCOPED_TRACE(rows);
    const DeltaHead head = random_head(rows, static_cast<std::uint32_t>(rows));
    // From a state that is not empty, as after a prompt.
    const DeltaHead before = random_head(20, 7);
    std::vector<double> exact(16 * 24);
    (void)in_double(before, exact);
    const std::vector<float> start(exact.begin(), exact.end());
    const std::vector<double> expected = in_double(head, exact);
    std::vector<float> state = start;
    std::vector<float> out(head.values.size());
    delta_rule(head, state.data(), out.data());
    expect_near(out, expected);
    expect_near(state, exact);
    state = start;
    std::fill(out.begin(), out.end(), 7.0F);
    delta_rule_chunked(*context, head, state.data(), out.data());
    expect_near(out, expected);
    expect_near(state, exact);
  }
}

// Decays so strong that exp(c_i - c_j) overflows above the diagonal.
TEST(DeltaRule, StrongDecaysStayFinite) {
  const TestContext context;
  DeltaHead head = random_head(100, 3);
  for (float& decay : head.log_decays) {
    decay = -40.0F;
  }
  std::vector<float> state(16 * 24, 1.0F);
  std::vector<float> out(head.values.size());
  delta_rule_chunked(*context, head, state.data(), out.data());
  std::vector<double> exact(16 * 24, 1.0);
  expect_near(out, in_double(head, exact));
}

}  // namespace
}  // namespace quern
