// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "quant/method.h"
#include "quant/site_stats.h"

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

namespace quern::testing {

// A linear with inputs like those of a transformer (methods.md 1.2): correlated, because they are
// mixtures of fewer hidden directions, with log-normal channel scales. One hidden model draws the
// calibration rows, the hold-out and as many fresh rows as a test wants.
struct SyntheticLayer {
  std::int64_t out_features = 0;
  std::int64_t in_features = 0;
  std::vector<float> W;
  SiteStats stats;
  std::vector<double> unseen;  // of rows that no method has seen

  [[nodiscard]] LinearProblem problem(const QuantScheme& scheme) const {
    return {W, out_features, in_features, &stats, scheme};
  }
};

struct SyntheticOptions {
  std::int64_t out_features = 128;
  std::int64_t in_features = 256;
  std::int64_t rows = 2048;
  std::int64_t holdout_rows = 0;
  std::int64_t test_rows = 2048;
  double channel_sigma = 0.6;  // of the logarithm of the channel scales
  float tail_freedom = 12.0F;  // Student's t of the weights: somewhat heavier than normal
  double noise = 0.4;  // independent part of each input, against a shared part of 1
};

class SyntheticInputs {
 public:
  SyntheticInputs(const SyntheticOptions& options, std::mt19937_64& generator)
      : n_(options.in_features), hidden_(options.in_features / 2 + 1), noise_(options.noise) {
    std::normal_distribution<double> normal;
    mixing_.resize(static_cast<std::size_t>(n_ * hidden_));
    for (double& value : mixing_) {
      value = normal(generator) / std::sqrt(static_cast<double>(hidden_));
    }
    scales_.resize(static_cast<std::size_t>(n_));
    for (double& scale : scales_) {
      scale = std::exp(options.channel_sigma * normal(generator));
    }
  }

  // (1/rows) X^T X of `rows` fresh inputs.
  [[nodiscard]] std::vector<double> second_moment(
      std::int64_t rows, std::mt19937_64& generator) const {
    std::normal_distribution<double> normal;
    std::vector<double> H(static_cast<std::size_t>(n_ * n_));
    std::vector<double> hidden(static_cast<std::size_t>(hidden_));
    std::vector<double> x(static_cast<std::size_t>(n_));
    for (std::int64_t t = 0; t < rows; ++t) {
      for (double& value : hidden) {
        value = normal(generator);
      }
      for (std::int64_t j = 0; j < n_; ++j) {
        double value = noise_ * normal(generator);
        for (std::int64_t k = 0; k < hidden_; ++k) {
          value += mixing_[static_cast<std::size_t>(j * hidden_ + k)] *
                   hidden[static_cast<std::size_t>(k)];
        }
        x[static_cast<std::size_t>(j)] = scales_[static_cast<std::size_t>(j)] * value;
      }
      for (std::int64_t i = 0; i < n_; ++i) {
        for (std::int64_t j = 0; j < n_; ++j) {
          H[static_cast<std::size_t>(i * n_ + j)] +=
              x[static_cast<std::size_t>(i)] * x[static_cast<std::size_t>(j)];
        }
      }
    }
    for (double& value : H) {
      value /= static_cast<double>(rows);
    }
    return H;
  }

 private:
  std::int64_t n_;
  std::int64_t hidden_;
  double noise_;
  std::vector<double> mixing_;
  std::vector<double> scales_;
};

inline SyntheticLayer make_layer(const SyntheticOptions& options, std::uint64_t seed) {
  std::mt19937_64 generator(seed);
  SyntheticLayer layer;
  layer.out_features = options.out_features;
  layer.in_features = options.in_features;
  const SyntheticInputs inputs(options, generator);
  std::student_t_distribution<float> heavy_tailed(options.tail_freedom);
  layer.W.resize(static_cast<std::size_t>(options.out_features * options.in_features));
  for (float& w : layer.W) {
    w = 0.02F * heavy_tailed(generator);
  }
  layer.stats.width = options.in_features;
  layer.stats.rows = options.rows;
  layer.stats.holdout_rows = options.holdout_rows;
  layer.stats.H = inputs.second_moment(options.rows, generator);
  if (options.holdout_rows > 0) {
    layer.stats.H_holdout = inputs.second_moment(options.holdout_rows, generator);
  }
  if (options.test_rows > 0) {
    layer.unseen = inputs.second_moment(options.test_rows, generator);
  }
  return layer;
}

}  // namespace quern::testing
