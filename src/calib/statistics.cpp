// SPDX-License-Identifier: Apache-2.0
#include "calib/statistics.h"

#include "kernels/blas.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

namespace quern {
namespace {

constexpr std::int64_t kTile = 384;
// Rows summed in float before the double sum takes over: rounding grows with their square root.
constexpr std::int64_t kFlushRows = 8192;
constexpr std::int64_t kRowChunk = 64;

struct TilePair {
  std::int64_t row;
  std::int64_t column;  // >= row
};

std::vector<TilePair> upper_tiles(std::int64_t width) {
  std::vector<TilePair> tiles;
  for (std::int64_t row = 0; row < width; row += kTile) {
    for (std::int64_t column = row; column < width; column += kTile) {
      tiles.push_back({row, column});
    }
  }
  return tiles;
}

}  // namespace

SiteAccumulator::SiteAccumulator(std::int64_t width) {
  stats_.width = width;
  stats_.abs_max.assign(static_cast<std::size_t>(width), 0.0F);
}

std::uint64_t SiteAccumulator::memory(std::int64_t width, bool with_holdout, bool with_reference) {
  const auto cells = static_cast<std::uint64_t>(width) * static_cast<std::uint64_t>(width);
  const std::uint64_t one = cells * (with_holdout ? 8 + 8 + 4 : 8 + 4);
  return with_reference ? 2 * one : one;
}

std::int64_t SiteAccumulator::drop_non_finite(
    const Context& ctx, float* X, float* reference, std::int64_t rows) {
  const std::int64_t width = stats_.width;
  std::vector<std::uint8_t> finite(static_cast<std::size_t>(rows), 1);
  ctx.pool.for_chunks(rows, kRowChunk, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t r = begin; r < end; ++r) {
      // x * 0 is 0 for finite x and NaN otherwise; one sum instead of a branch per value.
      float sum = 0;
      for (const float* rows_of :
           {static_cast<const float*>(X), static_cast<const float*>(reference)}) {
        for (std::int64_t i = 0; rows_of != nullptr && i < width; ++i) {
          sum += rows_of[r * width + i] * 0.0F;
        }
      }
      finite[static_cast<std::size_t>(r)] = sum == 0.0F ? 1 : 0;
    }
  });
  std::int64_t kept = 0;
  for (std::int64_t r = 0; r < rows; ++r) {
    if (finite[static_cast<std::size_t>(r)] == 0) {
      ++stats_.dropped_rows;
      continue;
    }
    for (float* rows_of : {X, reference}) {
      if (rows_of != nullptr && kept != r) {
        std::memcpy(
            rows_of + kept * width,
            rows_of + r * width,
            static_cast<std::size_t>(width) * sizeof(float));
      }
    }
    ++kept;
  }
  return kept;
}

void SiteAccumulator::add(
    const Context& ctx, float* X, float* reference, std::int64_t rows, bool holdout) {
  const std::int64_t kept = drop_non_finite(ctx, X, reference, rows);
  if (kept == 0) {
    return;
  }
  if (partial_rows_ > 0 && (partial_holdout_ != holdout || partial_rows_ + kept > kFlushRows)) {
    flush(ctx);
  }
  partial_holdout_ = holdout;
  const std::int64_t width = stats_.width;
  ctx.pool.for_chunks(width, 256, [&](std::int64_t begin, std::int64_t end, int) {
    float* highest = stats_.abs_max.data();
    for (std::int64_t r = 0; r < kept; ++r) {
      const float* row = X + r * width;
      for (std::int64_t i = begin; i < end; ++i) {
        highest[i] = std::max(highest[i], std::fabs(row[i]));
      }
    }
  });
  add_products(ctx, X, kept);
  if (reference != nullptr) {
    add_mixed_products(ctx, X, reference, kept);
  }
  if (!holdout) {
    take_sample(X, kept);
  }
  partial_rows_ += kept;
  (holdout ? stats_.holdout_rows : stats_.rows) += kept;
}

void SiteAccumulator::take_sample(const float* X, std::int64_t rows) {
  const std::int64_t width = stats_.width;
  std::vector<float>& sample = stats_.sample;
  for (std::int64_t r = 0; r < rows; ++r) {
    if ((stats_.rows + r) % sample_stride_ != 0) {
      continue;
    }
    if (stats_.sample_rows() == SiteStats::kSampledRows) {
      for (std::int64_t kept = 0; 2 * kept < SiteStats::kSampledRows; ++kept) {
        std::copy_n(sample.begin() + 2 * kept * width, width, sample.begin() + kept * width);
      }
      sample.resize(static_cast<std::size_t>(SiteStats::kSampledRows / 2 * width));
      sample_stride_ *= 2;
      if ((stats_.rows + r) % sample_stride_ != 0) {
        continue;
      }
    }
    sample.insert(sample.end(), X + r * width, X + (r + 1) * width);
  }
}

void SiteAccumulator::add_mixed_products(
    const Context& ctx, const float* X, const float* reference, std::int64_t rows) {
  const std::int64_t width = stats_.width;
  partial_mixed_.resize(static_cast<std::size_t>(width * width));
  const float keep = partial_rows_ == 0 ? 0.0F : 1.0F;
  const std::int64_t tiles = (width + kTile - 1) / kTile;
  ctx.pool.for_chunks(tiles * tiles, 1, [&](std::int64_t item, std::int64_t, int) {
    const std::int64_t row = item / tiles * kTile;
    const std::int64_t column = item % tiles * kTile;
    ctx.blas.gemm(
        true,
        false,
        std::min(kTile, width - row),
        std::min(kTile, width - column),
        rows,
        1.0F,
        X + row,
        width,
        reference + column,
        width,
        keep,
        partial_mixed_.data() + row * width + column,
        width);
  });
}

void SiteAccumulator::add_products(const Context& ctx, const float* X, std::int64_t rows) {
  const std::int64_t width = stats_.width;
  partial_.resize(static_cast<std::size_t>(width * width));
  const float keep = partial_rows_ == 0 ? 0.0F : 1.0F;
  const std::vector<TilePair> tiles = upper_tiles(width);
  ctx.pool.for_chunks(
      static_cast<std::int64_t>(tiles.size()), 1, [&](std::int64_t item, std::int64_t, int) {
        const TilePair tile = tiles[static_cast<std::size_t>(item)];
        const std::int64_t m = std::min(kTile, width - tile.row);
        const std::int64_t n = std::min(kTile, width - tile.column);
        float* C = partial_.data() + tile.row * width + tile.column;
        if (tile.row == tile.column) {
          ctx.blas.syrk_upper(m, rows, 1.0F, X + tile.row, width, keep, C, width);
        } else {
          ctx.blas.gemm(
              true,
              false,
              m,
              n,
              rows,
              1.0F,
              X + tile.row,
              width,
              X + tile.column,
              width,
              keep,
              C,
              width);
        }
      });
}

void SiteAccumulator::flush(const Context& ctx) {
  const std::int64_t width = stats_.width;
  const auto add = [&](const std::vector<float>& partial, std::vector<double>& sums, bool upper) {
    sums.resize(static_cast<std::size_t>(width * width), 0.0);
    ctx.pool.for_chunks(width, 16, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t i = begin; i < end; ++i) {
        for (std::int64_t j = upper ? i : 0; j < width; ++j) {
          sums[static_cast<std::size_t>(i * width + j)] +=
              static_cast<double>(partial[static_cast<std::size_t>(i * width + j)]);
        }
      }
    });
  };
  add(partial_, partial_holdout_ ? stats_.H_holdout : stats_.H, true);
  if (!partial_mixed_.empty()) {
    add(partial_mixed_, partial_holdout_ ? stats_.G_holdout : stats_.G, false);
  }
  partial_rows_ = 0;
}

SiteStats SiteAccumulator::finish(const Context& ctx) {
  if (partial_rows_ > 0) {
    flush(ctx);
  }
  partial_ = {};
  partial_mixed_ = {};
  const std::int64_t width = stats_.width;
  stats_.H.resize(static_cast<std::size_t>(width * width), 0.0);
  const auto scale = [&](std::vector<double>& sums, std::int64_t rows) {
    const double inverse = rows == 0 ? 0.0 : 1.0 / static_cast<double>(rows);
    ctx.pool.for_chunks(
        static_cast<std::int64_t>(sums.size()),
        64 * width,
        [&](std::int64_t begin, std::int64_t end, int) {
          for (std::int64_t i = begin; i < end; ++i) {
            sums[static_cast<std::size_t>(i)] *= inverse;
          }
        });
  };
  const auto mirror = [&](std::vector<double>& H) {
    ctx.pool.for_chunks(H.empty() ? 0 : width, 64, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t i = begin; i < end; ++i) {
        for (std::int64_t j = 0; j < i; ++j) {
          H[static_cast<std::size_t>(i * width + j)] = H[static_cast<std::size_t>(j * width + i)];
        }
      }
    });
  };
  scale(stats_.H, stats_.rows);
  scale(stats_.H_holdout, stats_.holdout_rows);
  scale(stats_.G, stats_.rows);
  scale(stats_.G_holdout, stats_.holdout_rows);
  mirror(stats_.H);
  mirror(stats_.H_holdout);
  SiteStats result = std::move(stats_);
  stats_ = SiteStats{};
  stats_.width = width;
  stats_.abs_max.assign(static_cast<std::size_t>(width), 0.0F);
  sample_stride_ = 1;
  return result;
}

}  // namespace quern
