// SPDX-License-Identifier: Apache-2.0
#include "quant/row_block.h"

#include "kernels/kernels.h"
#include "quant/clipping.h"
#include "quant/ggml_quantize.h"

#include <algorithm>

namespace quern {

std::vector<float> load_columns(
    std::span<const float> matrix,
    std::int64_t columns,
    std::int64_t first,
    std::int64_t rows,
    std::int64_t lanes) {
  std::vector<float> loaded(static_cast<std::size_t>(columns * lanes));
  // Strips of columns keep both the rows read and the columns written in the cache.
  constexpr std::int64_t kStrip = 64;
  for (std::int64_t begin = 0; begin < columns; begin += kStrip) {
    const std::int64_t end = std::min(begin + kStrip, columns);
    for (std::int64_t r = 0; r < rows; ++r) {
      const float* row = matrix.data() + (first + r) * columns;
      for (std::int64_t j = begin; j < end; ++j) {
        loaded[static_cast<std::size_t>(j * lanes + r)] = row[j];
      }
    }
  }
  return loaded;
}

RowBlock RowBlock::load(const LinearProblem& problem, std::int64_t first, std::int64_t end) {
  RowBlock block;
  block.first = first;
  block.rows = end - first;
  block.lanes = (block.rows + kRowLanes - 1) / kRowLanes * kRowLanes;
  block.columns = problem.in_features;
  const auto size = static_cast<std::size_t>(block.columns * block.lanes);
  const auto cells =
      static_cast<std::size_t>(problem.scheme.groups(problem.in_features) * block.lanes);
  block.W = load_columns(problem.goal(), block.columns, first, block.rows, block.lanes);
  block.codes.resize(size);
  block.D.resize(size);
  block.scales.resize(cells);
  block.zeros.resize(cells);
  block.group_of.resize(static_cast<std::size_t>(block.columns));
  const std::int64_t width = problem.scheme.group_width(block.columns);
  for (std::int64_t j = 0; j < block.columns; ++j) {
    block.group_of[static_cast<std::size_t>(j)] = static_cast<std::int32_t>(j / width);
  }
  return block;
}

ColumnGrid RowBlock::grid(const QuantScheme& scheme, std::int64_t begin, std::int64_t count) const {
  return {
      lanes,
      count,
      group_of.data() + begin,
      scales.data(),
      zeros.data(),
      static_cast<float>(scheme.max_code())};
}

void RowBlock::find_all_ranges(
    const KernelTable& kernels,
    const QuantScheme& scheme,
    const GridRules& rules,
    const float* weights) {
  if (scheme.ggml) {
    find_ggml_scales(kernels, *scheme.ggml, weights);
    return;
  }
  const std::int64_t width = scheme.group_width(columns);
  for (std::int64_t group = 0; group < scheme.groups(columns); ++group) {
    const std::int64_t begin = group * width;
    find_ranges(
        kernels,
        rules,
        W.data() + begin * lanes,
        lanes,
        weights + begin,
        std::min(width, columns - begin),
        scales.data() + group * lanes,
        zeros.data() + group * lanes);
  }
}

void RowBlock::fit_all_ranges_to_output(
    const Context& ctx,
    const QuantScheme& scheme,
    const GridRules& rules,
    const GroupMoments& moments) {
  const std::int64_t width = scheme.group_width(columns);
  for (std::int64_t group = 0; group < scheme.groups(columns); ++group) {
    const std::int64_t begin = group * width;
    fit_ranges_to_output(
        ctx,
        rules,
        moments.at(begin),
        W.data() + begin * lanes,
        lanes,
        std::min(width, columns - begin),
        scales.data() + group * lanes,
        zeros.data() + group * lanes);
  }
}

void RowBlock::round_all(const KernelTable& kernels, const QuantScheme& scheme) {
  const ColumnGrid all = grid(scheme, 0, columns);
  kernels.round_columns(&all, W.data(), D.data(), codes.data());
}

void RowBlock::update_difference() {
  for (std::int64_t j = 0; j < columns; ++j) {
    const std::int64_t cells = group_of[static_cast<std::size_t>(j)] * lanes;
    for (std::int64_t r = 0; r < lanes; ++r) {
      const auto at = static_cast<std::size_t>(j * lanes + r);
      const auto cell = static_cast<std::size_t>(cells + r);
      D[at] = scales[cell] * (static_cast<float>(codes[at]) - zeros[cell]) - W[at];
    }
  }
}

void RowBlock::take_row(const RowBlock& other, std::int64_t row) {
  for (auto at = static_cast<std::size_t>(row); at < codes.size();
       at += static_cast<std::size_t>(lanes)) {
    codes[at] = other.codes[at];
    D[at] = other.D[at];
  }
  for (auto cell = static_cast<std::size_t>(row); cell < scales.size();
       cell += static_cast<std::size_t>(lanes)) {
    scales[cell] = other.scales[cell];
    zeros[cell] = other.zeros[cell];
  }
  if (!ggml.empty() && row < rows) {
    ggml[static_cast<std::size_t>(row)] = other.ggml[static_cast<std::size_t>(row)];
    for (auto at = static_cast<std::size_t>(row); at < W.size();
         at += static_cast<std::size_t>(lanes)) {
      W[at] = other.W[at];  // with the other minimums
    }
  }
}

void RowBlock::find_ggml_scales(const KernelTable& kernels, GgmlType type, const float* weights) {
  const GgmlLayout& layout = *ggml_layout(type);
  const auto n = static_cast<std::size_t>(columns);
  const auto width = static_cast<std::size_t>(layout.block);
  std::vector<float> values(n);
  // Lanes without a row keep a grid that divides by something.
  std::fill(scales.begin(), scales.end(), 1.0F);
  std::fill(zeros.begin(), zeros.end(), -layout.values.front());
  ggml.assign(static_cast<std::size_t>(rows), GgmlRow());
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t j = 0; j < columns; ++j) {
      values[static_cast<std::size_t>(j)] = W[static_cast<std::size_t>(j * lanes + r)];
    }
    GgmlRow& row = ggml[static_cast<std::size_t>(r)];
    row = GgmlRow::make(layout, n);
    for (std::size_t b = 0; b * width < n; ++b) {
      find_scales(
          kernels,
          layout,
          std::span(values).subspan(b * width, width),
          {weights + b * width, width},
          row,
          b);
    }
    std::fill(row.minimum.begin(), row.minimum.end(), 0.0F);  // what W holds so far
    apply_ggml_row(layout, r);
  }
}

void RowBlock::apply_ggml_row(const GgmlLayout& layout, std::int64_t r) {
  // A group whose scale is 0 holds only its minimum, whatever the codes.
  constexpr float kNoScale = 1e-20F;
  GgmlRow& row = ggml[static_cast<std::size_t>(r)];
  const std::vector<float> before = row.minimum;
  for (std::size_t b = 0; b < row.d.size(); ++b) {
    row.apply_scales(layout, b);
  }
  for (std::size_t group = 0; group < row.scale.size(); ++group) {
    const float scale = row.scale[group];
    scales[group * static_cast<std::size_t>(lanes) + static_cast<std::size_t>(r)] =
        scale == 0.0F ? kNoScale : scale;
  }
  for (std::int64_t j = 0; j < columns; ++j) {
    const auto group = static_cast<std::size_t>(group_of[static_cast<std::size_t>(j)]);
    W[static_cast<std::size_t>(j * lanes + r)] += row.minimum[group] - before[group];
  }
}

void RowBlock::store(QuantizedMatrix& matrix) const {
  if (ggml.empty()) {
    store_packed(static_cast<PackedLinear&>(matrix));
  } else {
    store_ggml(static_cast<GgmlMatrix&>(matrix));
  }
}

void RowBlock::store_ggml(GgmlMatrix& matrix) const {
  for (std::int64_t r = 0; r < rows; ++r) {
    GgmlRow row = ggml[static_cast<std::size_t>(r)];
    for (std::int64_t j = 0; j < columns; ++j) {
      row.codes[static_cast<std::size_t>(j)] = codes[static_cast<std::size_t>(j * lanes + r)];
    }
    pack_row(
        matrix.type,
        row,
        std::span(*matrix.owner)
            .subspan(static_cast<std::size_t>(first + r) * matrix.row_bytes(), matrix.row_bytes()));
  }
}

void RowBlock::store_packed(PackedLinear& packed) const {
  const std::int64_t groups = packed.groups();
  std::vector<std::uint8_t> row_codes(static_cast<std::size_t>(columns));
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t j = 0; j < columns; ++j) {
      row_codes[static_cast<std::size_t>(j)] = codes[static_cast<std::size_t>(j * lanes + r)];
    }
    packed.set_row_codes(first + r, row_codes);
    for (std::int64_t group = 0; group < groups; ++group) {
      const auto cell = static_cast<std::size_t>(group * lanes + r);
      const auto at = static_cast<std::size_t>((first + r) * groups + group);
      packed.scales[at] = scales[cell];
      if (!packed.zeros.empty()) {
        packed.zeros[at] = static_cast<std::uint8_t>(zeros[cell]);
      }
    }
  }
}

std::shared_ptr<QuantizedMatrix> make_matrix(
    const LinearProblem& problem, const StorageRules& storage) {
  if (problem.scheme.ggml) {
    const GgmlType type = *problem.scheme.ggml;
    const GgmlTypeInfo& info = ggml_type_info(type);
    const std::int64_t bytes =
        problem.out_features * (problem.in_features / info.block) * info.bytes;
    return std::make_shared<GgmlMatrix>(GgmlMatrix::make(
        type,
        problem.out_features,
        problem.in_features,
        std::vector<std::byte>(static_cast<std::size_t>(bytes))));
  }
  return std::make_shared<PackedLinear>(PackedLinear::make(
      problem.scheme, problem.out_features, problem.in_features, storage.scale_dtype));
}

std::int64_t rows_per_block(std::int64_t out_features) {
  // Products with the n x n matrix are more efficient with more rows, but a small linear must still
  // give every thread of a larger machine a block.
  return out_features >= 2048 ? 128 : 64;
}

}  // namespace quern
