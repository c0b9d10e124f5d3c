// SPDX-License-Identifier: Apache-2.0
// Every backward function against central differences of plain double loops, and the float
// versions, which run, against the double ones.
#include "nn/backward.h"

#include "nn/backward_ops.h"
#include "nn/linear.h"
#include "quant_fixture.h"
#include "reference_block.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

namespace quern {
namespace {

using testing::Doubles;
using testing::ReferenceBlock;
using testing::TestContext;

// A central difference of a function of scale 1 is off by h^2 / 6 times its third derivative and by
// the rounding of f over h, 1e-16 / h. At h = 1e-5 both are some 1e-11: the losses here are sums of
// up to a few hundred terms, so 1e-8 is what may be asked, and 1e-6 what the specification asks.
constexpr double kStep = 1e-5;
constexpr double kTolerance = 1e-7;

Doubles random_values(std::int64_t n, unsigned seed, double scale = 1) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal(0, scale);
  Doubles values(static_cast<std::size_t>(n));
  std::generate(values.begin(), values.end(), [&] { return normal(random); });
  return values;
}

std::vector<float> to_floats(const Doubles& values) {
  return {values.begin(), values.end()};
}

double dot(const Doubles& a, const Doubles& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

using Loss = std::function<double(const Doubles&)>;

Doubles central_differences(const Loss& loss, Doubles x) {
  Doubles gradient(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double value = x[i];
    x[i] = value + kStep;
    const double above = loss(x);
    x[i] = value - kStep;
    gradient[i] = (above - loss(x)) / (2 * kStep);
    x[i] = value;
  }
  return gradient;
}

// The slope along `direction`.
double slope(const Loss& loss, const Doubles& x, const Doubles& direction) {
  Doubles above = x;
  Doubles below = x;
  for (std::size_t i = 0; i < x.size(); ++i) {
    above[i] += kStep * direction[i];
    below[i] -= kStep * direction[i];
  }
  return (loss(above) - loss(below)) / (2 * kStep);
}

// The largest difference over the largest expected value; infinity for what is no number.
template <class T>
double relative_error(const std::vector<T>& values, const Doubles& expected) {
  if (values.size() != expected.size()) {
    return HUGE_VAL;
  }
  double difference = 0;
  double largest = 0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const double d = std::fabs(static_cast<double>(values[i]) - expected[i]);
    difference = d <= difference ? difference : std::isnan(d) ? HUGE_VAL : d;
    largest = std::max(largest, std::fabs(expected[i]));
  }
  return difference == 0 ? 0 : difference / largest;
}

TEST(RmsNormBackward, IsTheCentralDifference) {
  for (const std::int64_t n : {1, 2, 5, 33}) {
    for (const float eps : {1e-6F, 0.3F}) {
      const Doubles x = random_values(n, 1);
      const Doubles gain = random_values(n, 2);
      const Doubles dy = random_values(n, 3);
      const Loss loss = [&](const Doubles& at) {
        return dot(dy, testing::rms_norm(at, gain, static_cast<double>(eps)));
      };
      const Doubles expected = central_differences(loss, x);
      Doubles dx(x.size());
      rms_norm_backward(x.data(), gain.data(), eps, dy.data(), n, dx.data());
      // One value of tiny eps: y is its sign, the gradient 1e-6 of what the difference is made of.
      const double scale = n == 1 && eps < 1e-3F ? 1e-2 : kTolerance;
      EXPECT_LE(relative_error(dx, expected), scale) << n << " eps " << eps;
      Doubles in_place = dy;
      rms_norm_backward(x.data(), gain.data(), eps, in_place.data(), n, in_place.data());
      EXPECT_EQ(in_place, dx);
    }
  }
}

TEST(RmsNormBackward, FloatIsDouble) {
  const std::int64_t n = 257;
  const Doubles x = random_values(n, 4);
  const Doubles gain = random_values(n, 5);
  const Doubles dy = random_values(n, 6);
  Doubles expected(x.size());
  rms_norm_backward(x.data(), gain.data(), 1e-6F, dy.data(), n, expected.data());
  std::vector<float> dx(x.size());
  rms_norm_backward(
      to_floats(x).data(), to_floats(gain).data(), 1e-6F, to_floats(dy).data(), n, dx.data());
  // Inputs rounded once, four roundings after that: 8 * 2^-24.
  EXPECT_LE(relative_error(dx, expected), 5e-7);
}

TEST(RopeBackward, IsTheCentralDifference) {
  for (const std::int64_t half : {1, 3, 16}) {
    const double factor = 1.37;  // YaRN's attention factor, inside both tables
    const Doubles angles = random_values(half, 7, 10);
    Doubles cosines;
    Doubles sines;
    for (const double angle : angles) {
      cosines.push_back(factor * std::cos(angle));
      sines.push_back(factor * std::sin(angle));
    }
    const Doubles x = random_values(2 * half, 8);
    const Doubles dy = random_values(2 * half, 9);
    const Loss loss = [&](const Doubles& at) {
      return dot(dy, testing::rotate(at, cosines, sines));
    };
    Doubles dx = dy;
    rope_backward(cosines.data(), sines.data(), half, dx.data());
    EXPECT_LE(relative_error(dx, central_differences(loss, x)), kTolerance) << half;
    std::vector<float> narrow = to_floats(dy);
    rope_backward(to_floats(cosines).data(), to_floats(sines).data(), half, narrow.data());
    EXPECT_LE(relative_error(narrow, dx), 5e-7) << half;
  }
}

TEST(SwigluBackward, IsTheCentralDifference) {
  const TestContext context(1);
  for (const std::int64_t n : {1, 7, 1025}) {  // 1024 at a time
    const Doubles gate = random_values(n, 10, 3);
    const Doubles up = random_values(n, 11);
    const Doubles dh = random_values(n, 12);
    Doubles dgate = gate;
    Doubles dup = up;
    swiglu_backward(*context, dh.data(), n, dgate.data(), dup.data());
    const Loss of_gate = [&](const Doubles& at) { return dot(dh, testing::swiglu(at, up)); };
    const Loss of_up = [&](const Doubles& at) { return dot(dh, testing::swiglu(gate, at)); };
    EXPECT_LE(relative_error(dgate, central_differences(of_gate, gate)), kTolerance) << n;
    EXPECT_LE(relative_error(dup, central_differences(of_up, up)), kTolerance) << n;
    std::vector<float> narrow_gate = to_floats(gate);
    std::vector<float> narrow_up = to_floats(up);
    swiglu_backward(*context, to_floats(dh).data(), n, narrow_gate.data(), narrow_up.data());
    EXPECT_LE(relative_error(narrow_gate, dgate), 1e-6) << n;
    EXPECT_LE(relative_error(narrow_up, dup), 1e-6) << n;
  }
}

TEST(SwigluBackward, LargeGatesStayFinite) {
  const TestContext context(1);
  std::vector<float> gate = {-3e4F, -100, 0, 100, 3e4F};
  std::vector<float> up(5, 2.0F);
  const std::vector<float> dh(5, 3.0F);
  swiglu_backward(*context, dh.data(), 5, gate.data(), up.data());
  EXPECT_EQ(gate, (std::vector<float>{0, 0, 3, 6, 6}));
  EXPECT_EQ(up, (std::vector<float>{0, 0, 0, 300, 9e4F}));
}

TEST(SoftmaxBackward, IsTheCentralDifference) {
  const TestContext context(1);
  for (const std::int64_t n : {1, 2, 19}) {
    const Doubles scores = random_values(n, 13, 2);
    const Doubles dp = random_values(n, 14);
    const Loss loss = [&](const Doubles& at) { return dot(dp, testing::softmax(at)); };
    const Doubles p = testing::softmax(scores);
    Doubles ds = dp;
    softmax_backward(*context, p.data(), n, ds.data());
    const Doubles expected = central_differences(loss, scores);
    if (n == 1) {
      EXPECT_EQ(ds, Doubles{0});
      continue;
    }
    EXPECT_LE(relative_error(ds, expected), kTolerance) << n;
    std::vector<float> narrow = to_floats(dp);
    softmax_backward(*context, to_floats(p).data(), n, narrow.data());
    // The difference cancels; each of its terms is within a few 2^-24.
    const double mean = std::inner_product(
        p.begin(), p.end(), dp.begin(), 0.0, std::plus<>(), [](double a, double b) {
          return a * std::fabs(b);
        });
    for (std::size_t i = 0; i < ds.size(); ++i) {
      EXPECT_NEAR(narrow[i], ds[i], 8 * 0x1p-24 * p[i] * (std::fabs(dp[i]) + mean)) << n;
    }
  }
}

TEST(CrossEntropyBackward, IsTheCentralDifference) {
  for (const std::int64_t n : {2, 23}) {
    const Doubles logits = random_values(n, 15, 2);
    const Loss loss = [&](const Doubles& at) { return -0.25 * std::log(testing::softmax(at)[1]); };
    Doubles d = testing::softmax(logits);
    cross_entropy_backward(n, 1, 0.25, d.data());
    EXPECT_LE(relative_error(d, central_differences(loss, logits)), kTolerance) << n;
    cross_entropy_backward(n, -1, 0.25, d.data());
    EXPECT_EQ(d, Doubles(static_cast<std::size_t>(n), 0.0));
  }
}

// Queries, keys, values and the gradient at the output of one attention.
struct AttentionCase {
  AttentionShape shape;
  std::int64_t rows;
  Doubles q;
  Doubles k;
  Doubles v;
  Doubles dout;
  Doubles dq;
  Doubles dk;
  Doubles dv;

  AttentionCase(const AttentionShape& s, std::int64_t n) : shape(s), rows(n) {
    q = random_values(n * s.q_width(), 16);
    k = random_values(n * s.kv_width(), 17);
    v = random_values(n * s.kv_width(), 18);
    dout = random_values(n * s.q_width(), 19);
  }
  [[nodiscard]] double loss(const Doubles& Q, const Doubles& K, const Doubles& V) const {
    return dot(dout, testing::attention(shape, rows, Q, K, V));
  }
  void backward(const Context& ctx) {
    dq.assign(q.size(), 0);
    dk.assign(k.size(), 0);
    dv.assign(v.size(), 0);
    attend_backward(
        ctx,
        shape,
        rows,
        q.data(),
        k.data(),
        v.data(),
        dout.data(),
        dq.data(),
        dk.data(),
        dv.data());
  }
};

struct FloatAttention {
  std::vector<float> dq;
  std::vector<float> dk;
  std::vector<float> dv;

  FloatAttention(const Context& ctx, const AttentionCase& a)
      : dq(a.q.size()), dk(a.k.size()), dv(a.v.size()) {
    attend_backward(
        ctx,
        a.shape,
        a.rows,
        to_floats(a.q).data(),
        to_floats(a.k).data(),
        to_floats(a.v).data(),
        to_floats(a.dout).data(),
        dq.data(),
        dk.data(),
        dv.data());
  }
};

TEST(AttendBackward, IsTheCentralDifference) {
  const TestContext context(2);
  const std::vector<std::pair<AttentionShape, std::int64_t>> cases = {
      {{1, 1, 2, 0}, 1},
      {{1, 1, 2, 0}, 2},
      {{4, 2, 6, 0}, 7},
      {{6, 2, 4, 3}, 11},  // a window shorter than the text
      {{3, 1, 5, 1}, 6},  // each token sees itself alone
      {{3, 3, 3, 100}, 9},  // a window longer than the text
  };
  for (const auto& [shape, rows] : cases) {
    AttentionCase a(shape, rows);
    a.backward(*context);
    const Loss of_q = [&](const Doubles& at) { return a.loss(at, a.k, a.v); };
    const Loss of_k = [&](const Doubles& at) { return a.loss(a.q, at, a.v); };
    const Loss of_v = [&](const Doubles& at) { return a.loss(a.q, a.k, at); };
    const std::string name = std::to_string(shape.heads) + " heads, " + std::to_string(rows);
    EXPECT_LE(relative_error(a.dv, central_differences(of_v, a.v)), kTolerance) << name;
    if (rows == 1 || shape.window == 1) {  // one key: its probability is 1 whatever the scores are
      EXPECT_LE(std::fabs(*std::max_element(a.dq.begin(), a.dq.end())), 1e-14) << name;
      EXPECT_LE(std::fabs(*std::max_element(a.dk.begin(), a.dk.end())), 1e-14) << name;
      continue;
    }
    EXPECT_LE(relative_error(a.dq, central_differences(of_q, a.q)), kTolerance) << name;
    EXPECT_LE(relative_error(a.dk, central_differences(of_k, a.k)), kTolerance) << name;
  }
}

// Beyond one tile of 256 queries, along random directions: a difference for each value would take
// minutes. The slopes are sums of 10^4 terms of either sign, so the scale is the length of the
// gradient times that of the direction.
TEST(AttendBackward, TilesOfQueriesAddUp) {
  const TestContext context(2);
  for (const std::int64_t window : {0, 100, 300}) {
    AttentionCase a({2, 1, 4, window}, 530);
    a.backward(*context);
    const auto check = [&](const Doubles& at, const Doubles& gradient, const Loss& loss) {
      for (const unsigned seed : {30U, 31U, 32U}) {
        const Doubles direction = random_values(static_cast<std::int64_t>(at.size()), seed);
        const double scale = std::sqrt(dot(gradient, gradient));
        EXPECT_NEAR(slope(loss, at, direction), dot(gradient, direction), kTolerance * scale)
            << "window " << window;
      }
    };
    check(a.q, a.dq, [&](const Doubles& at) { return a.loss(at, a.k, a.v); });
    check(a.k, a.dk, [&](const Doubles& at) { return a.loss(a.q, at, a.v); });
    check(a.v, a.dv, [&](const Doubles& at) { return a.loss(a.q, a.k, at); });
  }
}

// Sums of up to 530 products in float, each within 2^-24 of its terms; 1e-5 of the largest value is
// ten times what random rounding makes of them.
TEST(AttendBackward, FloatIsDoubleAtAnyNumberOfThreads) {
  const TestContext one(1);
  const TestContext two(2);
  const TestContext five(5);
  for (const auto& [shape, rows] : std::vector<std::pair<AttentionShape, std::int64_t>>{
           {{4, 2, 8, 0}, 37}, {{6, 2, 16, 100}, 530}, {{2, 2, 64, 0}, 300}}) {
    AttentionCase a(shape, rows);
    a.backward(*one);
    const FloatAttention narrow(*one, a);
    EXPECT_LE(relative_error(narrow.dq, a.dq), 1e-5) << rows;
    EXPECT_LE(relative_error(narrow.dk, a.dk), 1e-5) << rows;
    EXPECT_LE(relative_error(narrow.dv, a.dv), 1e-5) << rows;
    for (const TestContext* context : {&two, &five}) {
      const FloatAttention again(**context, a);
      EXPECT_EQ(again.dq, narrow.dq);
      EXPECT_EQ(again.dk, narrow.dk);
      EXPECT_EQ(again.dv, narrow.dv);
    }
  }
}

class LinearBackward : public ::testing::TestWithParam<testing::Stored> {};

INSTANTIATE_TEST_SUITE_P(
    Stored,
    LinearBackward,
    ::testing::Values(
        testing::Stored::kF32,
        testing::Stored::kBF16,
        testing::Stored::kF16,
        testing::Stored::kPacked,
        testing::Stored::kPackedActOrder));

TEST_P(LinearBackward, IsTheTransposedProduct) {
  const TestContext one(1);
  const TestContext three(3);
  // Tiles: 512 rows and 256 columns of weights, 1024 tokens.
  const std::vector<std::tuple<std::int64_t, std::int64_t, std::int64_t>> sizes = {
      {1, 3, 5}, {2, 1, 1}, {7, 513, 257}, {1030, 40, 300}, {5, 1100, 64}};
  for (const auto& [rows, out, in] : sizes) {
    const testing::OwnedLinear linear(out, in, GetParam(), 40);
    const Doubles dy = random_values(rows * out, 41);
    const std::vector<float> narrow = to_floats(dy);
    std::vector<float> dx(static_cast<std::size_t>(rows * in), 7.0F);
    Workspace workspace(*one);
    linear_backward_input(*one, workspace, linear.weights, narrow.data(), rows, false, dx.data());
    // |error| of a sum of n products in any order is at most n 2^-24 times the sum of magnitudes
    // (Higham, 3.1), and one more rounding each of dy and of the result.
    double worst = 0;
    for (std::int64_t t = 0; t < rows; t += std::max<std::int64_t>(1, rows / 50)) {
      for (std::int64_t i = 0; i < in; ++i) {
        double sum = 0;
        double magnitude = 0;
        for (std::int64_t o = 0; o < out; ++o) {
          const double term = dy[static_cast<std::size_t>(t * out + o)] * linear.at(o, i);
          sum += term;
          magnitude += std::fabs(term);
        }
        const double bound = static_cast<double>(out + 2) * 0x1p-24 * magnitude;
        worst = std::max(
            worst,
            std::fabs(static_cast<double>(dx[static_cast<std::size_t>(t * in + i)]) - sum) /
                std::max(bound, 1e-30));
      }
    }
    EXPECT_LE(worst, 1) << rows << " x " << out << " x " << in;

    std::vector<float> again(dx.size());
    Workspace wide(*three);
    linear_backward_input(*three, wide, linear.weights, narrow.data(), rows, false, again.data());
    EXPECT_EQ(again, dx);
    linear_backward_input(*three, wide, linear.weights, narrow.data(), rows, true, again.data());
    std::vector<float> twice(dx.size());
    std::transform(dx.begin(), dx.end(), twice.begin(), [](float x) { return 2 * x; });
    EXPECT_LE(relative_error(again, Doubles(twice.begin(), twice.end())), 1e-6);
  }
}

struct BlockCase {
  const char* name;
  testing::BlockOptions options;
  std::int64_t rows;
};

class BlockBackward : public ::testing::TestWithParam<BlockCase> {};

testing::BlockOptions block_options(
    bool qkv_bias,
    bool all_biases,
    bool qk_norm,
    std::int64_t window,
    float attention_factor,
    testing::Stored stored = testing::Stored::kF32) {
  testing::BlockOptions options;
  options.qkv_bias = qkv_bias || all_biases;
  options.output_bias = all_biases;
  options.mlp_bias = all_biases;
  options.qk_norm = qk_norm;
  options.window = window;
  options.attention_factor = attention_factor;
  options.stored = stored;
  return options;
}

INSTANTIATE_TEST_SUITE_P(
    Families,
    BlockBackward,
    ::testing::Values(
        BlockCase{"llama", block_options(false, false, false, 0, 1), 9},
        BlockCase{"qwen2", block_options(true, false, false, 0, 1.2F), 9},
        BlockCase{"qwen3", block_options(false, false, true, 0, 1), 9},
        BlockCase{"mistral", block_options(false, false, false, 3, 1), 9},
        BlockCase{"everything", block_options(true, true, true, 4, 1.1F), 11},
        BlockCase{"one_token", block_options(true, false, true, 0, 1), 1},
        BlockCase{"bf16", block_options(false, false, true, 0, 1, testing::Stored::kBF16), 6},
        BlockCase{"packed", block_options(true, false, false, 0, 1, testing::Stored::kPacked), 6}),
    [](const auto& block) { return std::string(block.param.name); });

// A block in float has some 20 operations forward and 40 back in a row, each within 1e-7 of the
// size of its inputs; 5e-6 of the largest value is what a sum of them may reach, and any wrong term
// is orders above.
constexpr double kFloatTolerance = 5e-6;

TEST_P(BlockBackward, IsTheCentralDifference) {
  const TestContext context(2);
  const std::int64_t rows = GetParam().rows;
  ReferenceBlock block(GetParam().options);
  const std::int64_t hidden = block.config.hidden_size;
  const Doubles x = random_values(rows * hidden, 50);
  const Doubles dy = random_values(rows * hidden, 51);
  std::vector<std::vector<float>> inputs(block.graph.linears.size());
  std::vector<std::vector<float>> deltas(block.graph.linears.size());
  std::vector<float> dx(x.size());
  Workspace workspace(*context);
  const std::vector<float> narrow_x = to_floats(x);
  block_backward(
      *context,
      workspace,
      block.config,
      block.graph,
      block.weights,
      rows,
      narrow_x.data(),
      to_floats(dy).data(),
      dx.data(),
      [&](int linear, std::int64_t n, const float* X, const float* delta) {
        const Linear& of = block.graph.linears[static_cast<std::size_t>(linear)];
        EXPECT_EQ(n, rows);
        EXPECT_TRUE(inputs[static_cast<std::size_t>(linear)].empty()) << "called twice";
        inputs[static_cast<std::size_t>(linear)].assign(X, X + n * of.in_features);
        deltas[static_cast<std::size_t>(linear)].assign(delta, delta + n * of.out_features);
      });
  const Loss of_x = [&](const Doubles& at) { return dot(dy, block.forward(at, rows)); };
  EXPECT_LE(relative_error(dx, central_differences(of_x, x)), kFloatTolerance);

  // Weights and biases: what callers make of X and delta.
  for (std::size_t l = 0; l < block.graph.linears.size(); ++l) {
    const Linear& linear = block.graph.linears[l];
    ASSERT_EQ(deltas[l].size(), static_cast<std::size_t>(rows * linear.out_features));
    Doubles dW(static_cast<std::size_t>(linear.parameters()));
    Doubles db(static_cast<std::size_t>(linear.out_features));
    for (std::int64_t t = 0; t < rows; ++t) {
      for (std::int64_t o = 0; o < linear.out_features; ++o) {
        const double delta = deltas[l][static_cast<std::size_t>(t * linear.out_features + o)];
        db[static_cast<std::size_t>(o)] += delta;
        for (std::int64_t i = 0; i < linear.in_features; ++i) {
          dW[static_cast<std::size_t>(o * linear.in_features + i)] +=
              delta * inputs[l][static_cast<std::size_t>(t * linear.in_features + i)];
        }
      }
    }
    const auto with = [&](Doubles& parameters, const Doubles& gradient) {
      const Loss loss = [&](const Doubles& at) {
        const Doubles kept = std::exchange(parameters, at);
        const double value = dot(dy, block.forward(x, rows));
        parameters = kept;
        return value;
      };
      // One token attends to itself alone: nothing depends on q and k.
      const double scale = std::sqrt(dot(gradient, gradient));
      for (const unsigned seed : {60U, 61U}) {
        const Doubles direction = random_values(static_cast<std::int64_t>(gradient.size()), seed);
        EXPECT_NEAR(
            slope(loss, parameters, direction),
            dot(gradient, direction),
            kFloatTolerance * scale * 4 + 1e-7)
            << linear.module;
      }
    };
    with(block.W[l], dW);
    if (linear.has_bias) {
      with(block.biases[l], db);
    }
  }
}

TEST_P(BlockBackward, MayWriteOverItsInputsAndNeedsNoObserver) {
  const TestContext context(1);
  const TestContext four(4);
  const ReferenceBlock block(GetParam().options);
  const std::int64_t rows = GetParam().rows;
  const std::vector<float> x = to_floats(random_values(rows * block.config.hidden_size, 52));
  const std::vector<float> dy = to_floats(random_values(rows * block.config.hidden_size, 53));
  const auto run = [&](const TestContext& with, const float* in, const float* up, float* out) {
    Workspace workspace(*with);
    block_backward(
        *with, workspace, block.config, block.graph, block.weights, rows, in, up, out, nullptr);
  };
  std::vector<float> expected(x.size());
  run(context, x.data(), dy.data(), expected.data());
  std::vector<float> over_x = x;
  run(context, over_x.data(), dy.data(), over_x.data());
  EXPECT_EQ(over_x, expected);
  std::vector<float> over_dy = dy;
  run(four, x.data(), over_dy.data(), over_dy.data());
  EXPECT_EQ(over_dy, expected);
}

// Final norm, head and loss in double; one row.
double head_loss(
    const testing::OwnedLinear& head, const Doubles& gain, const Doubles& x, std::int64_t label) {
  const Doubles normed = testing::rms_norm(x, gain, 1e-6);
  Doubles logits;
  for (std::int64_t o = 0; o < head.weights.out_features; ++o) {
    double sum = 0;
    for (std::int64_t i = 0; i < head.weights.in_features; ++i) {
      sum += head.at(o, i) * normed[static_cast<std::size_t>(i)];
    }
    logits.push_back(sum);
  }
  return -std::log(testing::softmax(logits)[static_cast<std::size_t>(label)]);
}

TEST(HeadBackward, IsTheCentralDifferenceInChunksOfRows) {
  const TestContext context(2);
  ModelConfig config;
  config.hidden_size = 6;
  config.vocab_size = 13;
  config.norm_eps = 1e-6F;
  const std::int64_t rows = 1100;  // logits exist for 1024 at a time
  const testing::OwnedLinear head(13, 6, testing::Stored::kBF16, 70);
  const std::vector<float> gain = to_floats(random_values(6, 71));
  const Doubles wide_gain(gain.begin(), gain.end());
  const std::vector<float> x = to_floats(random_values(rows * 6, 72));
  const auto label = [](std::int64_t row) { return static_cast<std::int32_t>(row % 15) - 2; };
  const float scale = 0.5F;
  std::vector<float> dx(x.size());
  Workspace workspace(*context);
  std::int64_t seen = 0;
  const LabelLoss loss = head_backward(
      *context,
      workspace,
      config,
      gain,
      head.weights,
      rows,
      x.data(),
      [&](std::int64_t row, std::span<const float> probabilities) {
        EXPECT_NEAR(std::accumulate(probabilities.begin(), probabilities.end(), 0.0), 1, 1e-6);
        return label(row);
      },
      scale,
      dx.data(),
      [&](std::int64_t n, const float* X, const float* delta) {
        EXPECT_LE(n, 1024);
        for (std::int64_t r = 0; r < n; ++r) {
          const double sum = std::accumulate(delta + r * 13, delta + (r + 1) * 13, 0.0);
          EXPECT_NEAR(sum, 0, 1e-6);  // p - onehot sums to 0
          EXPECT_EQ(delta[r * 13 + 12] == 0, label(seen + r) < 0);
          EXPECT_TRUE(std::isfinite(X[r * 6]));
        }
        seen += n;
      });
  EXPECT_EQ(seen, rows);
  double total = 0;
  std::int64_t labels = 0;
  for (std::int64_t t = 0; t < rows; ++t) {
    const Doubles row(x.begin() + t * 6, x.begin() + (t + 1) * 6);
    const std::vector<float> gradient(dx.begin() + t * 6, dx.begin() + (t + 1) * 6);
    if (label(t) < 0) {
      EXPECT_EQ(gradient, std::vector<float>(6, 0.0F));
      continue;
    }
    const Loss of_row = [&](const Doubles& at) {
      return 0.5 * head_loss(head, wide_gain, at, label(t));
    };
    EXPECT_LE(relative_error(gradient, central_differences(of_row, row)), 1e-5) << t;
    total += head_loss(head, wide_gain, row, label(t));
    ++labels;
  }
  EXPECT_EQ(loss.labels, labels);
  EXPECT_NEAR(loss.sum / total, 1, 1e-6);
}

}  // namespace
}  // namespace quern
