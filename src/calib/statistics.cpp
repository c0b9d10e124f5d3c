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

std::uint64_t SiteAccumulator::memory(std::int64_t width, bool with_holdout) {
  const auto cells = static_cast<std::uint64_t>(width) * static_cast<std::uint64_t>(width);
  return cells * (with_holdout ? 8 + 8 + 4 : 8 + 4);
}

std::int64_t SiteAccumulator::drop_non_finite(const Context& ctx, float* X, std::int64_t rows) {
  const std::int64_t width = stats_.width;
  std::vector<std::uint8_t> finite(static_cast<std::size_t>(rows), 1);
  ctx.pool.for_chunks(rows, kRowChunk, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t r = begin; r < end; ++r) {
      const float* row = X + r * width;
      // x * 0 is 0 for finite x and NaN otherwise; one sum instead of a branch per value.
      float sum = 0;
      for (std::int64_t i = 0; i < width; ++i) {
        sum += row[i] * 0.0F;
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
    if (kept != r) {
      std::memcpy(X + kept * width, X + r * width, static_cast<std::size_t>(width) * sizeof(float));
    }
    ++kept;
  }
  return kept;
}

void SiteAccumulator::add(const Context& ctx, float* X, std::int64_t rows, bool holdout) {
  const std::int64_t kept = drop_non_finite(ctx, X, rows);
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
  partial_rows_ += kept;
  (holdout ? stats_.holdout_rows : stats_.rows) += kept;
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
  std::vector<double>& H = partial_holdout_ ? stats_.H_holdout : stats_.H;
  H.resize(static_cast<std::size_t>(width * width), 0.0);
  ctx.pool.for_chunks(width, 16, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t i = begin; i < end; ++i) {
      for (std::int64_t j = i; j < width; ++j) {
        H[static_cast<std::size_t>(i * width + j)] +=
            static_cast<double>(partial_[static_cast<std::size_t>(i * width + j)]);
      }
    }
  });
  partial_rows_ = 0;
}

SiteStats SiteAccumulator::finish(const Context& ctx) {
  if (partial_rows_ > 0) {
    flush(ctx);
  }
  partial_ = {};
  const std::int64_t width = stats_.width;
  stats_.H.resize(static_cast<std::size_t>(width * width), 0.0);
  const auto mirror = [&](std::vector<double>& H, std::int64_t rows) {
    if (rows == 0) {
      return;
    }
    const double inverse = 1.0 / static_cast<double>(rows);
    ctx.pool.for_chunks(width, 64, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t i = begin; i < end; ++i) {
        for (std::int64_t j = i; j < width; ++j) {
          H[static_cast<std::size_t>(i * width + j)] *= inverse;
        }
      }
    });
    ctx.pool.for_chunks(width, 64, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t i = begin; i < end; ++i) {
        for (std::int64_t j = 0; j < i; ++j) {
          H[static_cast<std::size_t>(i * width + j)] = H[static_cast<std::size_t>(j * width + i)];
        }
      }
    });
  };
  mirror(stats_.H, stats_.rows);
  mirror(stats_.H_holdout, stats_.holdout_rows);
  SiteStats result = std::move(stats_);
  stats_ = SiteStats{};
  stats_.width = width;
  stats_.abs_max.assign(static_cast<std::size_t>(width), 0.0F);
  return result;
}

}  // namespace quern
