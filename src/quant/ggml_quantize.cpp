// SPDX-License-Identifier: Apache-2.0
#include "quant/ggml_quantize.h"

#include "base/half.h"
#include "kernels/kernels.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <stdexcept>

namespace quern {
namespace {

constexpr std::size_t kMaxBlock = 256;
constexpr std::size_t kMaxGroups = 16;
constexpr std::size_t kMaxTrials = 96;
constexpr int kFineTrials = 10;  // scales to each side of the extreme value
constexpr int kCoarseTrials = 8;  // scales that cut values off
constexpr int kSuperTrials = 24;  // super-scales
constexpr std::size_t kKept = 4;  // trials that are followed further
constexpr int kRounds = 4;  // of codes and least squares in turn
constexpr float kLargestHalf = 65504.0F;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::uint16_t to_half(double value) {
  const auto limit = static_cast<double>(kLargestHalf);
  return float_to_f16(static_cast<float>(std::clamp(value, -limit, limit)));
}

// The nearest whole number within the bounds; the lower one for NaN.
int whole_within(double value, int low, int high) {
  if (!(value > low)) {
    return low;
  }
  return value >= high ? high : static_cast<int>(std::nearbyint(value));
}

// The half nearest to `value`, and the one on the other side of it.
std::array<float, 2> near_halves(float value) {
  const std::uint16_t nearest = to_half(value);
  const float rounded = f16_to_float(nearest);
  if (rounded == value || nearest % 0x8000U == 0) {
    return {rounded, rounded};
  }
  // Halves of one sign are ordered as their bits.
  const bool is_larger = std::abs(value) > std::abs(rounded);
  const auto other = static_cast<std::uint16_t>(is_larger ? nearest + 1 : nearest - 1);
  return {rounded, std::min(std::max(f16_to_float(other), -kLargestHalf), kLargestHalf)};
}

// Scale and minimum of a group, and the sums of kernels.fit_affine for the codes nearest to it.
struct Fit {
  float scale = 0;
  float minimum = 0;
  double error = kInfinity;
  double l = 0;  // sum w q
  double square = 0;  // sum w q^2
  double product = 0;  // sum w q x
};

using Fits = std::array<Fit, kMaxGroups>;

// The values of a group and what does not depend on codes.
struct Group {
  const float* x = nullptr;
  const float* w = nullptr;
  double weight = 0;  // sum w
  double sum = 0;  // sum w x
  double square = 0;  // sum w x^2
  float low = 0;  // extremes of x
  float high = 0;
};

// Scales and minimums that are tried together.
class Trials {
 public:
  void add(float scale, float minimum) {
    if (count_ < kMaxTrials) {
      scales_[count_] = scale;
      minimums_[count_++] = minimum;
    }
  }
  void clear() { count_ = 0; }
  [[nodiscard]] std::size_t count() const { return count_; }
  [[nodiscard]] const float* scales() const { return scales_.data(); }
  [[nodiscard]] const float* minimums() const { return minimums_.data(); }

 private:
  std::array<float, kMaxTrials> scales_{};
  std::array<float, kMaxTrials> minimums_{};
  std::size_t count_ = 0;
};

// The code of the level nearest to `value`.
std::uint8_t nearest_level(std::span<const float> levels, float value) {
  const auto above = std::upper_bound(levels.begin(), levels.end(), value);
  if (above == levels.begin() || above == levels.end()) {
    return static_cast<std::uint8_t>(above == levels.end() ? levels.size() - 1 : 0);
  }
  const auto code = static_cast<std::uint8_t>(above - levels.begin());
  return value - levels[code - 1U] > *above - value ? code : static_cast<std::uint8_t>(code - 1);
}

// Super-scales of a block and what they cost by the quadratic of scale_cost() and minimum_cost().
struct SuperScales {
  double error = kInfinity;
  std::uint16_t d = 0;
  std::uint16_t dmin = 0;
};

// Puts `next` in its place if it is among the best, least error first.
template <class T>
void keep_best(std::array<T, kKept>& kept, const T& next) {
  if (!(next.error < kept.back().error)) {
    return;
  }
  const auto place =
      std::upper_bound(kept.begin(), kept.end(), next.error, [](double error, const T& other) {
        return error < other.error;
      });
  std::move_backward(place, kept.end() - 1, kept.end());
  *place = next;
}

// The `i`-th of kSuperTrials factors on (largest scale) / (largest sub-scale).
double super_factor(int i) {
  return 0.97 + 0.0125 * i;
}

// What a block stores, with the fits of its groups.
struct Choice {
  std::uint16_t d = 0;
  std::uint16_t dmin = 0;
  std::array<std::int8_t, kMaxGroups> sub_scale{};
  std::array<std::int8_t, kMaxGroups> sub_minimum{};
  Fits fits;
  double error = kInfinity;
};

class BlockSearch {
 public:
  BlockSearch(
      const KernelTable& kernels,
      const GgmlLayout& layout,
      std::span<const float> values,
      std::span<const float> weights);

  [[nodiscard]] Choice search();

 private:
  using Minimums = std::array<double, kMaxGroups>;

  [[nodiscard]] std::size_t groups() const { return static_cast<std::size_t>(layout_.groups()); }
  [[nodiscard]] bool has_minimum() const { return layout_.has_minimum(); }
  void normalise(std::span<const float> weights);
  void evaluate(const Group& group, const Trials& trials);
  [[nodiscard]] Fit fit(const Trials& trials, std::size_t c) const;

  void add_trials(float range, float level, float minimum, Trials& trials) const;
  void first_trials(const Group& group, Trials& trials) const;
  [[nodiscard]] bool least_squares(const Group& group, Fit& fit) const;
  [[nodiscard]] Fit fit_group(const Group& group);

  [[nodiscard]] Choice search_single(const Fit& free);
  [[nodiscard]] Choice search_super(const Fits& free);
  [[nodiscard]] double scale_cost(const Fits& free, double d) const;
  [[nodiscard]] Minimums free_minimums(const Fits& free, double d) const;
  [[nodiscard]] double minimum_cost(const Minimums& minimums, double dmin) const;
  [[nodiscard]] std::array<SuperScales, kKept> rank_super(const Fits& free) const;
  [[nodiscard]] double free_minimum(std::size_t g, const Fit& fit, double scale) const;
  [[nodiscard]] Choice try_super(const Fits& from, std::uint16_t d, std::uint16_t dmin);
  void improve(Choice& choice);

  const KernelTable& kernels_;
  const GgmlLayout& layout_;
  float low_level_;
  float high_level_;
  std::array<float, 15> steps_{};  // between the levels, for uneven ones
  std::array<float, kMaxBlock> weights_{};
  std::array<Group, kMaxGroups> groups_;
  Trials trials_;
  std::array<float, 4 * kMaxTrials> sums_{};
};

BlockSearch::BlockSearch(
    const KernelTable& kernels,
    const GgmlLayout& layout,
    std::span<const float> values,
    std::span<const float> weights)
    : kernels_(kernels),
      layout_(layout),
      low_level_(layout.values[static_cast<std::size_t>(layout.lowest_code)]),
      high_level_(layout.values.back()) {
  if (!layout.linear) {
    for (std::size_t k = 0; k < steps_.size(); ++k) {
      steps_[k] = (layout.values[k] + layout.values[k + 1]) / 2;
    }
  }
  normalise(weights);
  const auto width = static_cast<std::size_t>(layout.group);
  for (std::size_t g = 0; g < groups(); ++g) {
    Group& group = groups_[g];
    group.x = values.data() + g * width;
    group.w = weights_.data() + g * width;
    const auto [low, high] = std::minmax_element(group.x, group.x + width);
    group.low = *low;
    group.high = *high;
    for (std::size_t i = 0; i < width; ++i) {
      const double x = group.x[i];
      const double w = group.w[i];
      group.weight += w;
      group.sum += w * x;
      group.square += w * x * x;
    }
  }
}

// To a mean of 1, so that sums stay within the range of floats, and above 0, so that every group
// has a best fit.
void BlockSearch::normalise(std::span<const float> weights) {
  constexpr float kLeast = 1e-6F;
  double mean = 0;
  for (const float w : weights) {
    mean += w;
  }
  mean /= static_cast<double>(weights.size());
  const double factor = mean > 0 ? 1 / mean : 0;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    weights_[i] = std::max(static_cast<float>(weights[i] * factor), kLeast);
  }
}

void BlockSearch::evaluate(const Group& group, const Trials& trials) {
  const auto count = static_cast<std::int64_t>(trials.count());
  if (layout_.linear) {
    kernels_.fit_affine(
        group.x,
        group.w,
        layout_.group,
        trials.scales(),
        trials.minimums(),
        low_level_,
        high_level_,
        count,
        sums_.data());
  } else {
    kernels_.fit_levels(
        group.x,
        group.w,
        layout_.group,
        trials.scales(),
        layout_.values.data(),
        steps_.data(),
        count,
        sums_.data());
  }
}

// The result of trial `c` of the last evaluate().
Fit BlockSearch::fit(const Trials& trials, std::size_t c) const {
  const float* sums = sums_.data() + 4 * c;
  return {trials.scales()[c], trials.minimums()[c], sums[0], sums[1], sums[2], sums[3]};
}

// The extreme value may lie up to nearly a step beyond the extreme level, as in ggml's searches;
// and, since values of little weight may better be cut off, much further.
void BlockSearch::add_trials(float range, float level, float minimum, Trials& trials) const {
  const float step = (high_level_ - low_level_) / static_cast<float>(layout_.codes() - 1);
  const float towards = level < 0 ? -step : step;
  for (int i = -kFineTrials; i <= kFineTrials; ++i) {
    trials.add(range / (level + towards * 0.9F * static_cast<float>(i) / kFineTrials), minimum);
  }
  for (int i = 1; i <= kCoarseTrials; ++i) {
    trials.add(range / level * (1 - 0.5F * static_cast<float>(i) / kCoarseTrials), minimum);
  }
}

void BlockSearch::first_trials(const Group& group, Trials& trials) const {
  if (has_minimum()) {
    const bool is_free = layout_.minimum_low < 0;  // the minimum may have either sign
    const float low = is_free ? group.low : std::min(group.low, 0.0F);
    for (const float part : {1.0F, 0.9F, 0.75F}) {
      add_trials(group.high - part * low, high_level_, -part * low, trials);
    }
    return;
  }
  const float extreme = -group.low > group.high ? group.low : group.high;
  add_trials(extreme, low_level_, 0.0F, trials);
  if (low_level_ != -high_level_) {
    add_trials(extreme, high_level_, 0.0F, trials);
  }
}

// Moves `fit` to the best scale and minimum for its codes, `error` to the error there. False when
// there is none.
bool BlockSearch::least_squares(const Group& group, Fit& fit) const {
  double scale = fit.square > 0 ? fit.product / fit.square : 0;
  double minimum = 0;
  if (has_minimum()) {
    const double determinant = group.weight * fit.square - fit.l * fit.l;
    if (determinant > 0) {
      scale = (group.weight * fit.product - group.sum * fit.l) / determinant;
      minimum = (fit.l * fit.product - fit.square * group.sum) / determinant;
      if (minimum < 0 && layout_.minimum_low >= 0) {
        minimum = 0;
        scale = fit.product / fit.square;
      }
    } else {
      scale = 0;
      minimum = layout_.minimum_low >= 0 ? std::max(-group.sum / group.weight, 0.0)
                                         : -group.sum / group.weight;
    }
  }
  if (!std::isfinite(scale) || !std::isfinite(minimum) || (has_minimum() && scale < 0)) {
    return false;
  }
  fit.scale = static_cast<float>(scale);
  fit.minimum = static_cast<float>(minimum);
  fit.error = scale * scale * fit.square + minimum * minimum * group.weight + group.square -
              2 * scale * minimum * fit.l - 2 * scale * fit.product + 2 * minimum * group.sum;
  return true;
}

// The best scale and minimum of a group that nothing binds to the rest of its block.
Fit BlockSearch::fit_group(const Group& group) {
  Trials& trials = trials_;
  trials.clear();
  first_trials(group, trials);
  Fit best;
  for (int round = 0; round < kRounds; ++round) {
    evaluate(group, trials);
    std::array<Fit, kKept> kept;  // those with the least error after least squares
    for (std::size_t c = 0; c < trials.count(); ++c) {
      Fit next = fit(trials, c);
      if (next.error < best.error) {
        best = next;
      }
      if (least_squares(group, next)) {
        keep_best(kept, next);
      }
    }
    trials.clear();
    for (const Fit& each : kept) {
      if (each.error < kInfinity) {
        trials.add(each.scale, each.minimum);
      }
    }
    // The lowest value decided the first trials; what least squares made of it decides the second.
    if (round == 0 && has_minimum() && kept[0].error < kInfinity) {
      add_trials(group.high + kept[0].minimum, high_level_, kept[0].minimum, trials);
    }
  }
  return best;
}

// A block of one group: its scale and minimum as halves near the free ones.
Choice BlockSearch::search_single(const Fit& free) {
  Choice best;
  Fit target = free;
  Trials& trials = trials_;
  for (int round = 0; round < 2; ++round) {
    trials.clear();
    for (const float scale : near_halves(target.scale)) {
      for (const float minimum : near_halves(target.minimum)) {
        trials.add(scale, minimum);
      }
    }
    evaluate(groups_[0], trials);
    for (std::size_t c = 0; c < trials.count(); ++c) {
      const Fit next = fit(trials, c);
      if (next.error < best.error) {
        best.error = next.error;
        best.fits[0] = next;
      }
    }
    target = best.fits[0];
    if (!least_squares(groups_[0], target)) {
      break;
    }
  }
  best.d = to_half(best.fits[0].scale);
  best.sub_scale[0] = 1;
  if (has_minimum()) {
    best.sub_minimum[0] = -1;
    best.dmin = to_half(-best.fits[0].minimum);
  }
  return best;
}

// What the minimum would be for the codes of `fit` at another scale.
double BlockSearch::free_minimum(std::size_t g, const Fit& fit, double scale) const {
  return (scale * fit.l - groups_[g].sum) / groups_[g].weight;
}

// What it costs to round the scales of all groups to multiples of d, while codes stay and minimums
// follow freely.
double BlockSearch::scale_cost(const Fits& free, double d) const {
  const double inverse = 1 / d;
  double cost = 0;
  for (std::size_t g = 0; g < groups(); ++g) {
    const double scale = free[g].scale;
    const int sub = whole_within(scale * inverse, layout_.scale_low, layout_.scale_high);
    const double change = d * sub - scale;
    const double shared = has_minimum() ? free[g].l * free[g].l / groups_[g].weight : 0;
    cost += change * change * (free[g].square - shared);
  }
  return cost;
}

// The minimums that follow from those scales.
BlockSearch::Minimums BlockSearch::free_minimums(const Fits& free, double d) const {
  Minimums minimums{};
  for (std::size_t g = 0; g < groups(); ++g) {
    const int sub = whole_within(free[g].scale / d, layout_.scale_low, layout_.scale_high);
    minimums[g] = free_minimum(g, free[g], d * sub);
  }
  return minimums;
}

// What it costs to round them to multiples of dmin.
double BlockSearch::minimum_cost(const Minimums& minimums, double dmin) const {
  const double inverse = dmin > 0 ? 1 / dmin : 0;
  double cost = 0;
  for (std::size_t g = 0; g < groups(); ++g) {
    const int sub = whole_within(minimums[g] * inverse, 0, layout_.minimum_high);
    const double change = dmin * sub - minimums[g];
    cost += groups_[g].weight * change * change;
  }
  return cost;
}

// Super-scales fixed: each group takes the best of the sub-scales next to where `from` is, with the
// minimums next to the best one for it.
Choice BlockSearch::try_super(const Fits& from, std::uint16_t d, std::uint16_t dmin) {
  const double super = f16_to_float(d);
  const double super_minimum = f16_to_float(dmin);
  Choice choice;
  choice.d = d;
  choice.dmin = dmin;
  choice.error = 0;
  for (std::size_t g = 0; g < groups(); ++g) {
    const int middle =
        super == 0 ? 0 : whole_within(from[g].scale / super, layout_.scale_low, layout_.scale_high);
    trials_.clear();
    Trials& trials = trials_;
    std::array<std::array<int, 2>, 6> integers{};
    for (int sub = std::max(middle - 1, layout_.scale_low);
         sub <= std::min(middle + 1, layout_.scale_high);
         ++sub) {
      // As unpacked: products of floats.
      const float scale = static_cast<float>(super) * static_cast<float>(sub);
      if (super_minimum <= 0) {
        integers[trials.count()] = {sub, 0};
        trials.add(scale, 0.0F);
        continue;
      }
      const double minimum = free_minimum(g, from[g], scale) / super_minimum;
      const int below = whole_within(std::floor(minimum), 0, layout_.minimum_high);
      for (int m = below; m <= std::min(below + 1, layout_.minimum_high); ++m) {
        integers[trials.count()] = {sub, m};
        trials.add(scale, static_cast<float>(super_minimum) * static_cast<float>(m));
      }
    }
    evaluate(groups_[g], trials);
    for (std::size_t c = 0; c < trials.count(); ++c) {
      const Fit next = fit(trials, c);
      if (next.error < choice.fits[g].error) {
        choice.fits[g] = next;
        choice.sub_scale[g] = static_cast<std::int8_t>(integers[c][0]);
        choice.sub_minimum[g] = static_cast<std::int8_t>(integers[c][1]);
      }
    }
    choice.error += choice.fits[g].error;
  }
  return choice;
}

// Least squares for d and dmin with codes and sub-scales fixed, then those anew; while it helps.
void BlockSearch::improve(Choice& choice) {
  for (int round = 0; round < kRounds; ++round) {
    double ss = 0;
    double sm = 0;
    double mm = 0;
    double sx = 0;
    double mx = 0;
    for (std::size_t g = 0; g < groups(); ++g) {
      const double s = choice.sub_scale[g];
      const double m = choice.sub_minimum[g];
      ss += s * s * choice.fits[g].square;
      sm += s * m * choice.fits[g].l;
      mm += m * m * groups_[g].weight;
      sx += s * choice.fits[g].product;
      mx += m * groups_[g].sum;
    }
    const double determinant = ss * mm - sm * sm;
    double d = ss > 0 ? sx / ss : 0;
    double dmin = 0;
    if (determinant > 0) {
      d = (sx * mm - sm * mx) / determinant;
      dmin = std::max((sm * sx - ss * mx) / determinant, 0.0);
    }
    if (!std::isfinite(d) || !std::isfinite(dmin)) {
      return;
    }
    Choice next = try_super(choice.fits, to_half(d), to_half(dmin));
    if (!(next.error < choice.error)) {
      return;
    }
    choice = next;
  }
}

// The cheapest super-scales, by the quadratic.
std::array<SuperScales, kKept> BlockSearch::rank_super(const Fits& free) const {
  const Fit* largest = std::max_element(
      free.begin(), free.begin() + layout_.groups(), [](const Fit& a, const Fit& b) {
        return std::abs(a.scale) < std::abs(b.scale);
      });
  std::array<SuperScales, kKept> scales;
  for (const int highest : {layout_.scale_high, layout_.scale_low}) {
    for (int i = 0; highest != 0 && i < kSuperTrials; ++i) {
      const std::uint16_t d =
          to_half(static_cast<double>(largest->scale) / highest * super_factor(i));
      if (const double value = f16_to_float(d); value != 0) {
        keep_best(scales, {scale_cost(free, value), d, 0});
      }
    }
  }
  if (!has_minimum()) {
    return scales;
  }
  std::array<SuperScales, kKept> both;
  for (const SuperScales& scale : scales) {
    if (scale.error == kInfinity) {
      continue;
    }
    const Minimums minimums = free_minimums(free, f16_to_float(scale.d));
    const double highest =
        std::max(*std::max_element(minimums.begin(), minimums.begin() + layout_.groups()), 0.0);
    for (int i = 0; i < kSuperTrials; ++i) {
      SuperScales next = scale;
      next.dmin = to_half(highest / layout_.minimum_high * super_factor(i));
      next.error += minimum_cost(minimums, f16_to_float(next.dmin));
      keep_best(both, next);
    }
  }
  return both;
}

Choice BlockSearch::search_super(const Fits& free) {
  Choice best = try_super(free, 0, 0);
  for (const SuperScales& super : rank_super(free)) {
    if (super.error < kInfinity) {
      Choice choice = try_super(free, super.d, super.dmin);
      improve(choice);
      if (choice.error < best.error) {
        best = choice;
      }
    }
  }
  return best;
}

Choice BlockSearch::search() {
  Fits free;
  for (std::size_t g = 0; g < groups(); ++g) {
    free[g] = fit_group(groups_[g]);
  }
  return layout_.has_sub_scales() ? search_super(free) : search_single(free[0]);
}

// ggml's sigma2 is this multiple of the mean square over the block, or over the row.
struct WeightRule {
  double factor = 0;  // 0: the importance alone
  bool whole_row = false;
};

WeightRule weight_rule(GgmlType type) {
  switch (type) {
    case GgmlType::kQ40:
    case GgmlType::kQ41:
    case GgmlType::kQ50:
    case GgmlType::kQ51: return {1, true};
    case GgmlType::kQ2K: return {1, false};
    case GgmlType::kQ3K:
    case GgmlType::kQ4K:
    case GgmlType::kQ5K:
    case GgmlType::kIQ4NL:
    case GgmlType::kIQ4XS: return {2, false};
    default: return {};
  }
}

double mean_square(std::span<const float> values) {
  double sum = 0;
  for (const float x : values) {
    sum += static_cast<double>(x) * x;
  }
  return sum / static_cast<double>(values.size());
}

void check_sizes(const GgmlLayout& layout, std::size_t values, std::size_t weights) {
  if (values != weights || values % static_cast<std::size_t>(layout.block) != 0) {
    throw std::logic_error(
        fmt::format("{} values and {} weights are no blocks of {}", values, weights, layout.block));
  }
}

}  // namespace

void find_scales(
    const KernelTable& kernels,
    const GgmlLayout& layout,
    std::span<const float> values,
    std::span<const float> weights,
    GgmlRow& row,
    std::size_t b) {
  const Choice choice = BlockSearch(kernels, layout, values, weights).search();
  row.d[b] = choice.d;
  if (layout.has_minimum()) {
    row.dmin[b] = choice.dmin;
  }
  const auto groups = static_cast<std::size_t>(layout.groups());
  std::copy_n(choice.sub_scale.begin(), groups, row.sub_scale.data() + b * groups);
  std::copy_n(choice.sub_minimum.begin(), groups, row.sub_minimum.data() + b * groups);
  row.apply_scales(layout, b);
}

void nearest_codes(
    const GgmlLayout& layout, std::span<const float> values, GgmlRow& row, std::size_t b) {
  const auto block = static_cast<std::size_t>(layout.block);
  const auto width = static_cast<std::size_t>(layout.group);
  const float first = layout.values.front();
  const auto low = static_cast<float>(layout.lowest_code);
  const float high = static_cast<float>(layout.codes() - 1);
  for (std::size_t i = 0; i < block; ++i) {
    const std::size_t g = (b * block + i) / width;
    const float inverse = row.scale[g] == 0 ? 0.0F : 1 / row.scale[g];
    const float level = (values[i] + row.minimum[g]) * inverse;
    std::uint8_t& code = row.codes[b * block + i];
    if (layout.linear) {
      const float clamped = std::min(std::max(low, level - first), high);
      code = static_cast<std::uint8_t>(std::nearbyint(clamped));
    } else {
      code = nearest_level(layout.values, level);
    }
  }
}

GgmlRow quantize_row(
    const KernelTable& kernels,
    const GgmlLayout& layout,
    std::span<const float> values,
    std::span<const float> weights) {
  check_sizes(layout, values.size(), weights.size());
  const auto block = static_cast<std::size_t>(layout.block);
  GgmlRow row = GgmlRow::make(layout, values.size());
  for (std::size_t b = 0; b < row.d.size(); ++b) {
    const auto part = values.subspan(b * block, block);
    find_scales(kernels, layout, part, weights.subspan(b * block, block), row, b);
    nearest_codes(layout, part, row, b);
  }
  return row;
}

double weighted_error(
    const GgmlLayout& layout,
    std::span<const float> values,
    std::span<const float> weights,
    const GgmlRow& row) {
  check_sizes(layout, values.size(), weights.size());
  double error = 0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const std::size_t g = i / static_cast<std::size_t>(layout.group);
    const float q = row.scale[g] * layout.values[row.codes[i]] - row.minimum[g];
    const double difference = static_cast<double>(q) - values[i];
    error += weights[i] * difference * difference;
  }
  return error;
}

void ggml_weights(
    GgmlType type,
    std::span<const float> values,
    std::span<const float> importance,
    std::span<float> weights) {
  const WeightRule rule = weight_rule(type);
  std::copy(importance.begin(), importance.end(), weights.begin());
  if (rule.factor == 0) {
    return;
  }
  const std::size_t part =
      rule.whole_row ? values.size() : static_cast<std::size_t>(ggml_type_info(type).block);
  for (std::size_t begin = 0; begin + part <= values.size(); begin += part) {
    const double sigma2 = rule.factor * mean_square(values.subspan(begin, part));
    for (std::size_t i = begin; i < begin + part; ++i) {
      const double x = values[i];
      weights[i] *= static_cast<float>(std::sqrt(sigma2 + x * x));
    }
  }
}

}  // namespace quern
