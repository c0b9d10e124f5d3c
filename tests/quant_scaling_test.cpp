// SPDX-License-Identifier: Apache-2.0
#include "kernels/kernels.h"
#include "model/graph.h"
#include "nn/block.h"
#include "quant/gptq.h"
#include "quant/mismatch.h"
#include "quant/quadratic_error.h"
#include "quant/scaling.h"
#include "quant_fixture.h"
#include "synthetic_layer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <vector>

namespace quern {
namespace {

using testing::make_layer;
using testing::SyntheticLayer;
using testing::SyntheticOptions;
using testing::TestContext;

ScalingProblem problem_of(const SyntheticLayer& layer, const QuantScheme& scheme) {
  ScalingProblem problem;
  problem.stats = &layer.stats;
  problem.consumers.push_back({layer.W, layer.out_features, scheme});
  return problem;
}

// The layer as it is after its inputs were divided by the factors.
SyntheticLayer scaled(const SyntheticLayer& layer, const std::vector<float>& factors) {
  SyntheticLayer other = layer;
  const auto n = static_cast<std::size_t>(layer.in_features);
  for (std::size_t i = 0; i < other.W.size(); ++i) {
    other.W[i] *= factors[i % n];
  }
  other.stats.abs_max.assign(n, 1.0F);
  divide_by_factors(other.stats, factors);
  for (std::size_t i = 0; i < n * n; ++i) {
    other.unseen[i] /= static_cast<double>(factors[i / n]) * static_cast<double>(factors[i % n]);
  }
  return other;
}

// Error of GPTQ on unseen rows, relative to the output.
double unseen_error(const Context& ctx, const SyntheticLayer& layer, const QuantScheme& scheme) {
  const LinearResult result = quantize_gptq(ctx, layer.problem(scheme), {});
  const std::array<const QuantizedMatrix*, 1> candidates = {result.matrix.get()};
  return quadratic_errors(
             ctx, layer.W, layer.out_features, layer.in_features, layer.unseen, candidates)
      .relative(0);
}

TEST(Scaling, LowersTheErrorOfUnevenChannelsOnUnseenRows) {
  const TestContext context;
  SyntheticOptions uneven;
  uneven.channel_sigma = 1.5;
  uneven.noise = 1.0;
  uneven.holdout_rows = 256;
  for (const int bits : {4, 3}) {
    const QuantScheme scheme = {bits, true, 128};
    const SyntheticLayer layer = make_layer(uneven, 7);
    for (const char* name : {"awq", "scale"}) {
      const ScalingResult found =
          find_transform(name)->find(*context, problem_of(layer, scheme), {});
      ASSERT_EQ(found.factors.size(), 256U) << name;
      EXPECT_LT(found.error_ratio, 0.9) << name;
      const double before = unseen_error(*context, layer, scheme);
      const double after = unseen_error(*context, scaled(layer, found.factors), scheme);
      EXPECT_LT(after, 0.95 * before) << name << " at " << bits << " bits: " << found.rule;
    }
  }
}

TEST(Scaling, NeverPredictsALoss) {
  const TestContext context;
  SyntheticOptions even;
  even.channel_sigma = 0;
  for (const std::uint64_t seed : {1U, 2U, 3U}) {
    const SyntheticLayer layer = make_layer(even, seed);
    const ScalingResult found =
        find_transform("scale")->find(*context, problem_of(layer, {4, true, 128}), {});
    EXPECT_LE(found.error_ratio, 1.0);
    EXPECT_EQ(found.factors.empty(), found.rule == "none");
  }
}

TEST(Scaling, UnitsShareTheirFactorAndPowersOfTwoAreExact) {
  const TestContext context;
  SyntheticOptions uneven;
  uneven.channel_sigma = 2.0;
  uneven.noise = 1.0;
  const SyntheticLayer layer = make_layer(uneven, 3);
  ScalingProblem problem = problem_of(layer, {3, true, 128});
  problem.powers_of_two = true;
  for (std::int32_t j = 0; j < 256; ++j) {
    problem.unit_of.push_back(j / 2);
  }
  const ScalingResult found = find_transform("awq")->find(*context, problem, {});
  ASSERT_FALSE(found.factors.empty());
  for (std::size_t j = 0; j < 256; ++j) {
    EXPECT_EQ(found.factors[j], found.factors[j / 2 * 2]);
    int exponent = 0;
    EXPECT_EQ(std::frexp(found.factors[j], &exponent), 0.5F);
  }
}

TEST(Scaling, IsTheSameForAnyThreadCount) {
  const TestContext one(1);
  const TestContext two(2);
  const SyntheticLayer layer = make_layer({}, 5);
  const auto find = [&](const Context& ctx) {
    return find_transform("scale")->find(ctx, problem_of(layer, {4, false, 64}), {}).factors;
  };
  EXPECT_EQ(find(*one), find(*two));
}

// A block whose folds are checked: factors taken out of the producers and put into the consumers
// must leave its output as it was.
class FoldedBlock : public ::testing::Test {
 protected:
  static constexpr std::int64_t kHidden = 32;
  static constexpr std::int64_t kRows = 11;

  FoldedBlock() {
    const Json config = {
        {"model_type", "qwen2"},
        {"architectures", {"Qwen2ForCausalLM"}},
        {"vocab_size", 64},
        {"hidden_size", kHidden},
        {"num_hidden_layers", 1},
        {"num_attention_heads", 4},
        {"num_key_value_heads", 2},
        {"intermediate_size", 48},
        {"max_position_embeddings", 64},
        {"rms_norm_eps", 1e-6},
        {"rope_theta", 10000.0},
        {"hidden_act", "silu"},
        {"tie_word_embeddings", true},
        {"torch_dtype", "float32"}};
    graph_ = build_graph(config, "config");
    for (const Linear& linear : graph_.blocks[0].linears) {
      values_.emplace_back(static_cast<std::size_t>(linear.parameters()));
      for (float& value : values_.back()) {
        value = 0.3F * normal_(generator_);
      }
      LinearWeights weights;
      weights.out_features = linear.out_features;
      weights.in_features = linear.in_features;
      if (linear.has_bias) {
        for (std::int64_t i = 0; i < linear.out_features; ++i) {
          weights.bias.push_back(normal_(generator_));
        }
      }
      weights_.linears.push_back(std::move(weights));
    }
    weights_.attention_norm.assign(kHidden, 1.25F);
    weights_.mlp_norm.assign(kHidden, 0.75F);
  }

  [[nodiscard]] std::vector<float> output(const Context& ctx) {
    for (std::size_t i = 0; i < values_.size(); ++i) {
      const Linear& linear = graph_.blocks[0].linears[i];
      weights_.linears[i].dense = {
          DType::kF32,
          {linear.out_features, linear.in_features},
          std::as_bytes(std::span(values_[i]))};
    }
    std::mt19937 generator(3);
    std::vector<float> x(kRows * kHidden);
    for (float& value : x) {
      value = normal_(generator);
    }
    Workspace workspace(ctx);
    LayerCache cache;
    block_forward(
        ctx, workspace, graph_.config, graph_.blocks[0], weights_, kRows, cache, x.data());
    return x;
  }

  void fold(const CalibrationSite& site, int index) {
    std::vector<float> factors(static_cast<std::size_t>(site.width));
    for (std::size_t c = 0; c < factors.size(); ++c) {
      const std::size_t unit =
          site.producer_rows.empty() ? c : static_cast<std::size_t>(site.producer_rows[c]);
      factors[c] = std::exp(std::sin(static_cast<float>(unit + 1)));
    }
    if (site.producer < 0) {
      std::vector<float>& gain = site_norm_gain(weights_, index);
      for (std::size_t c = 0; c < gain.size(); ++c) {
        gain[c] /= factors[c];
      }
    } else {
      const auto producer = static_cast<std::size_t>(site.producer);
      const auto width = static_cast<std::size_t>(weights_.linears[producer].in_features);
      std::set<std::size_t> done;
      for (std::size_t c = 0; c < factors.size(); ++c) {
        const std::size_t row =
            site.producer_rows.empty() ? c : static_cast<std::size_t>(site.producer_rows[c]);
        if (done.insert(row).second) {
          for (std::size_t j = 0; j < width; ++j) {
            values_[producer][row * width + j] /= factors[c];
          }
          if (!weights_.linears[producer].bias.empty()) {
            weights_.linears[producer].bias[row] /= factors[c];
          }
        }
      }
    }
    for (const int consumer : site.linears) {
      std::vector<float>& W = values_[static_cast<std::size_t>(consumer)];
      for (std::size_t i = 0; i < W.size(); ++i) {
        W[i] *= factors[i % factors.size()];
      }
    }
  }

  std::mt19937 generator_{11};
  std::normal_distribution<float> normal_;
  ModelGraph graph_;
  std::vector<std::vector<float>> values_;
  BlockWeights weights_;
};

TEST_F(FoldedBlock, EverySiteOfTheGraphKeepsTheOutput) {
  const TestContext context;
  const std::vector<float> before = output(*context);
  const float largest = std::fabs(*std::max_element(
      before.begin(), before.end(), [](float a, float b) { return std::fabs(a) < std::fabs(b); }));
  for (int site = 0; site < static_cast<int>(graph_.blocks[0].sites.size()); ++site) {
    fold(graph_.blocks[0].sites[static_cast<std::size_t>(site)], site);
    const std::vector<float> after = output(*context);
    for (std::size_t i = 0; i < before.size(); ++i) {
      // Sums of at most 48 products, each rounded: 48 * 2^-24 of the largest, some times over.
      ASSERT_NEAR(after[i], before[i], 1e-5F * largest) << "site " << site << ", value " << i;
    }
  }
}

// Rows of X and X~ for the mismatch target, and their moments.
struct TwoStreams {
  std::int64_t width;
  SiteStats stats;
  std::vector<double> H_test;
  std::vector<double> G_test;

  TwoStreams(std::int64_t n, std::int64_t rows, double mismatch, std::uint64_t seed) : width(n) {
    std::mt19937_64 generator(seed);
    std::normal_distribution<double> normal;
    std::vector<double> mixing(static_cast<std::size_t>(n * n));
    std::vector<double> shift(mixing.size());
    for (std::size_t i = 0; i < mixing.size(); ++i) {
      mixing[i] = normal(generator) / std::sqrt(static_cast<double>(n));
      shift[i] = mismatch * normal(generator) / std::sqrt(static_cast<double>(n));
    }
    const auto gather = [&](std::int64_t count, std::vector<double>& H, std::vector<double>& G) {
      H.assign(mixing.size(), 0.0);
      G.assign(mixing.size(), 0.0);
      const auto size = static_cast<std::size_t>(n);
      std::vector<double> z(size);
      std::vector<double> x(size);
      std::vector<double> reference(size);
      for (std::int64_t t = 0; t < count; ++t) {
        for (double& value : z) {
          value = normal(generator);
        }
        for (std::size_t i = 0; i < size; ++i) {
          reference[i] = 0.2 * normal(generator);
          x[i] = reference[i];
          for (std::size_t k = 0; k < size; ++k) {
            reference[i] += mixing[i * size + k] * z[k];
            x[i] += (mixing[i * size + k] + shift[i * size + k]) * z[k];
          }
        }
        for (std::size_t i = 0; i < size; ++i) {
          for (std::size_t j = 0; j < size; ++j) {
            H[i * size + j] += x[i] * x[j] / static_cast<double>(count);
            G[i * size + j] += x[i] * reference[j] / static_cast<double>(count);
          }
        }
      }
    };
    stats.width = n;
    stats.rows = rows;
    stats.holdout_rows = rows / 8;
    stats.abs_max.assign(static_cast<std::size_t>(n), 1.0F);
    gather(rows, stats.H, stats.G);
    gather(stats.holdout_rows, stats.H_holdout, stats.G_holdout);
    gather(4096, H_test, G_test);
  }

  // tr(V H V^T) - 2 tr(V G W^T) on unseen rows: |X~ W^T - X V^T|^2 / T up to a constant.
  [[nodiscard]] double error(const std::vector<float>& V, const std::vector<float>& W) const {
    const auto n = static_cast<std::size_t>(width);
    double sum = 0;
    for (std::size_t row = 0; row * n < V.size(); ++row) {
      for (std::size_t i = 0; i < n; ++i) {
        for (std::size_t j = 0; j < n; ++j) {
          sum += static_cast<double>(V[row * n + i]) *
                 (H_test[i * n + j] * V[row * n + j] - 2 * G_test[i * n + j] * W[row * n + j]);
        }
      }
    }
    return sum;
  }
};

std::vector<float> random_weights(std::int64_t count) {
  std::mt19937 generator(9);
  std::normal_distribution<float> normal;
  std::vector<float> W(static_cast<std::size_t>(count));
  for (float& w : W) {
    w = normal(generator);
  }
  return W;
}

TEST(Mismatch, ComesCloserToTheOriginalsOutputs) {
  const TestContext context;
  const TwoStreams streams(24, 4096, 0.15, 1);
  const std::vector<float> W = random_weights(16 * 24);
  const auto correction = MismatchCorrection::make(*context, streams.stats, {});
  ASSERT_TRUE(correction.has_value());
  const MismatchCorrection::Target target = correction->target(*context, W, 16);
  EXPECT_GT(target.strength, 0.5);
  EXPECT_LT(streams.error(target.W, W), streams.error(W, W));
}

TEST(Mismatch, StrengthOneIsTheLeastSquaresSolution) {
  const TestContext context;
  const TwoStreams streams(12, 2048, 0.3, 2);
  MethodOptions options;
  options.damping = 0;
  options.shrinkage = 0.0;
  options.mismatch_strength = 1.0;
  const std::vector<float> W = random_weights(12);
  const auto correction = MismatchCorrection::make(*context, streams.stats, options);
  ASSERT_TRUE(correction.has_value());
  const MismatchCorrection::Target target = correction->target(*context, W, 1);
  // The normal equations V H = W G^T hold.
  for (std::size_t i = 0; i < 12; ++i) {
    double left = 0;
    double right = 0;
    for (std::size_t j = 0; j < 12; ++j) {
      left += static_cast<double>(target.W[j]) * streams.stats.H[j * 12 + i];
      right += static_cast<double>(W[j]) * streams.stats.G[i * 12 + j];
    }
    EXPECT_NEAR(left, right, 1e-4) << i;
  }
}

TEST(Mismatch, ChangesNothingWhereTheStreamsAgreeAndIsNotMadeWithoutTheSecond) {
  const TestContext context;
  TwoStreams streams(16, 512, 0.0, 3);
  streams.stats.G = streams.stats.H;
  streams.stats.G_holdout = streams.stats.H_holdout;
  const std::vector<float> W = random_weights(4 * 16);
  EXPECT_EQ(MismatchCorrection::make(*context, streams.stats, {})->target(*context, W, 4).W, W);
  streams.stats.G.clear();
  EXPECT_FALSE(MismatchCorrection::make(*context, streams.stats, {}).has_value());
}

}  // namespace
}  // namespace quern
