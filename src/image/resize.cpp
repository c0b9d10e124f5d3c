// SPDX-License-Identifier: Apache-2.0
#include "image/resize.h"

#include <algorithm>
#include <cmath>

namespace quern {
namespace {

constexpr std::int64_t kRowChunk = 16;

// The source values behind each target value, of one direction.
struct Taps {
  struct Range {
    std::int64_t first = 0;
    std::int64_t count = 0;
  };
  std::vector<Range> ranges;  // [target]
  std::vector<std::int16_t> weights;  // [target, width]
  std::int64_t width = 0;
  int precision = 0;  // bits behind the point

  [[nodiscard]] std::uint8_t rounded(int sum) const noexcept {
    return static_cast<std::uint8_t>(std::clamp(sum >> precision, 0, 255));
  }
};

double keys(double x) {
  constexpr double a = -0.5;
  x = std::fabs(x);
  if (x < 1) {
    return ((a + 2) * x - (a + 3)) * x * x + 1;
  }
  return x < 2 ? ((a * x - 5 * a) * x + 8 * a) * x - 4 * a : 0;
}

// The most bits with which the largest weight still fits into 16.
int precision_for(double largest) {
  int precision = 0;
  while (precision < 22 &&
         static_cast<int>(0.5 + largest * static_cast<double>(1 << (precision + 1))) < 1 << 15) {
    ++precision;
  }
  return precision;
}

Taps make_taps(std::int64_t source, std::int64_t target) {
  const double scale = static_cast<double>(source) / static_cast<double>(target);
  const double stretch = std::max(scale, 1.0);
  const double support = 2 * stretch;
  Taps taps;
  taps.width = static_cast<std::int64_t>(std::ceil(support)) * 2 + 1;
  std::vector<double> weights(static_cast<std::size_t>(target * taps.width));
  double largest = 0;
  for (std::int64_t i = 0; i < target; ++i) {
    const double center = scale * (static_cast<double>(i) + 0.5);
    const std::int64_t first =
        std::max<std::int64_t>(0, static_cast<std::int64_t>(center - support + 0.5));
    const std::int64_t end = std::min(source, static_cast<std::int64_t>(center + support + 0.5));
    const std::int64_t count = std::clamp<std::int64_t>(end - first, 0, taps.width);
    double* row = weights.data() + i * taps.width;
    double total = 0;
    for (std::int64_t j = 0; j < count; ++j) {
      row[j] = keys((static_cast<double>(first + j) - center + 0.5) * (1 / stretch));
      total += row[j];
    }
    for (std::int64_t j = 0; j < count && total != 0; ++j) {
      row[j] /= total;
      largest = std::max(largest, row[j]);
    }
    taps.ranges.push_back({first, count});
  }
  taps.precision = precision_for(largest);
  taps.weights.resize(weights.size());
  std::transform(weights.begin(), weights.end(), taps.weights.begin(), [&](double weight) {
    const double scaled = weight * static_cast<double>(1 << taps.precision);
    return static_cast<std::int16_t>(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
  });
  return taps;
}

Image resize_columns(ThreadPool& pool, const Image& image, std::int64_t width) {
  const Taps taps = make_taps(image.width, width);
  Image out{width, image.height, {}};
  out.rgb.resize(static_cast<std::size_t>(width * image.height * 3));
  pool.for_chunks(image.height, kRowChunk, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t y = begin; y < end; ++y) {
      std::uint8_t* target = out.rgb.data() + y * width * 3;
      for (std::int64_t x = 0; x < width; ++x) {
        const auto [first, count] = taps.ranges[static_cast<std::size_t>(x)];
        const std::uint8_t* from = image.rgb.data() + (y * image.width + first) * 3;
        const std::int16_t* weights = taps.weights.data() + x * taps.width;
        int sums[3];
        std::fill_n(sums, 3, 1 << (taps.precision - 1));
        for (std::int64_t j = 0; j < count; ++j) {
          for (int c = 0; c < 3; ++c) {
            sums[c] += from[3 * j + c] * weights[j];
          }
        }
        for (int c = 0; c < 3; ++c) {
          target[3 * x + c] = taps.rounded(sums[c]);
        }
      }
    }
  });
  return out;
}

Image resize_rows(ThreadPool& pool, const Image& image, std::int64_t height) {
  const Taps taps = make_taps(image.height, height);
  const std::int64_t stride = image.width * 3;
  Image out{image.width, height, {}};
  out.rgb.resize(static_cast<std::size_t>(stride * height));
  pool.for_chunks(height, kRowChunk, [&](std::int64_t begin, std::int64_t end, int) {
    std::vector<int> sums(static_cast<std::size_t>(stride));
    for (std::int64_t y = begin; y < end; ++y) {
      const auto [first, count] = taps.ranges[static_cast<std::size_t>(y)];
      const std::int16_t* weights = taps.weights.data() + y * taps.width;
      std::fill(sums.begin(), sums.end(), 1 << (taps.precision - 1));
      for (std::int64_t j = 0; j < count; ++j) {
        const std::uint8_t* from = image.rgb.data() + (first + j) * stride;
        for (std::int64_t i = 0; i < stride; ++i) {
          sums[static_cast<std::size_t>(i)] += from[i] * weights[j];
        }
      }
      std::transform(sums.begin(), sums.end(), out.rgb.data() + y * stride, [&](int sum) {
        return taps.rounded(sum);
      });
    }
  });
  return out;
}

}  // namespace

Image resize_bicubic(
    ThreadPool& pool, const Image& image, std::int64_t width, std::int64_t height) {
  return resize_rows(pool, resize_columns(pool, image, width), height);
}

}  // namespace quern
