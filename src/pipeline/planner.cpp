// SPDX-License-Identifier: Apache-2.0
#include "pipeline/planner.h"

#include "base/error.h"
#include "base/process.h"
#include "base/units.h"
#include "calib/calibration_set.h"
#include "calib/gradients.h"
#include "nn/decoder.h"
#include "nn/linear.h"
#include "pipeline/calibration_input.h"
#include "pipeline/manifest.h"
#include "pipeline/output.h"
#include "pipeline/progress.h"
#include "plan/allocation.h"
#include "plan/sensitivity.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <numeric>
#include <optional>
#include <random>
#include <tuple>
#include <utility>

namespace quern {
namespace {

constexpr std::int64_t kGradientTokens = 8192;  // enough to rank linears by; methods.md 12
constexpr std::int64_t kCheckTokens = 2048;
constexpr std::int64_t kLongestSequence = 2048;
constexpr int kNearbyAllocations = 8;
constexpr double kRangeCandidates = 250;  // that the weighted search tries for each group
// Bits that a linear never goes below; methods.md 11.3.
constexpr int kTableFloor = 8;
constexpr int kLinearFloor = 2;
// What a program that runs the model takes besides weights and cache (SizeBudget::kMemoryBytes).
constexpr std::uint64_t kProgramBytes = std::uint64_t{96} << 20U;

using Sequences = std::vector<std::vector<std::int32_t>>;

// Linears that are decided as one, and what they can become: in each option all linears have the
// same method and scheme, and bytes and loss are sums.
struct Unit {
  std::vector<std::size_t> linears;  // indices into QuantPlan::linears
  std::vector<PlanOption> options;
};

int smallest_bits(const PlannedLinear& linear) {
  return linear.is_table() ? kTableFloor : kLinearFloor;
}

std::int64_t weights_of(const PlannedLinear& linear) {
  return linear.out_features * linear.in_features;
}

bool same_form(const PlanOption& a, const PlanOption& b) {
  return a.method == b.method && (a.keep() || a.scheme == b.scheme);
}

// What is written of `linear` as it is planned now.
std::uint64_t stored_bytes(const PreparedRun& run, const PlannedLinear& linear) {
  if (linear.keep()) {
    return run.source->tensors().find(linear.name + ".weight")->bytes.size();
  }
  if (linear.scheme.ggml) {
    const GgmlTypeInfo& type = ggml_type_info(*linear.scheme.ggml);
    return static_cast<std::uint64_t>(weights_of(linear) / type.block * type.bytes);
  }
  return plan_safetensors(run.format->declare(output_module(linear, *run.format, run.graph)))
      .tensor_bytes;
}

// `linear` as it is planned now, if the format can hold it so.
std::optional<PlanOption> as_option(const PreparedRun& run, const PlannedLinear& linear) {
  try {
    if (!linear.keep()) {
      run.format->check(output_module(linear, *run.format, run.graph));
    }
  } catch (const UnsupportedError&) {
    return std::nullopt;
  }
  return PlanOption{linear.method, linear.scheme, stored_bytes(run, linear), 0};
}

// The schemes that are tried: every grid, or for GGUF the block type of every width.
std::vector<QuantScheme> candidate_schemes(
    const PreparedRun& run, const PlannedLinear& linear, const PlanningOptions& planning) {
  std::vector<QuantScheme> schemes;
  for (const int bits : planning.bits) {
    if (run.format->is_gguf) {
      const GgmlType type = fitting_ggml_type(ggml_type_of_bits(bits), linear.in_features);
      schemes.push_back(ggml_scheme(type));
      continue;
    }
    for (const std::int64_t group_size : planning.group_sizes) {
      for (const bool symmetric : planning.symmetric) {
        schemes.push_back({bits, symmetric, group_size, {}});
      }
    }
  }
  return schemes;
}

// What a linear of a block can become, smallest first.
std::vector<PlanOption> linear_options(
    const PreparedRun& run, const PlannedLinear& linear, const PlanningOptions& planning) {
  const Method& method = *find_method(linear.method);
  std::vector<PlanOption> options;
  for (const QuantScheme& scheme : candidate_schemes(run, linear, planning)) {
    PlannedLinear tried = linear;
    tried.scheme = scheme;
    const bool defined = scheme.bits >= std::max(smallest_bits(linear), method.min_bits) &&
                         scheme.bits <= method.max_bits;
    const std::optional<PlanOption> option =
        defined ? as_option(run, tried) : std::optional<PlanOption>();
    const bool known = option && std::any_of(options.begin(), options.end(), [&](const auto& each) {
                         return same_form(each, *option);
                       });
    if (option && !known) {
      options.push_back(*option);
    }
  }
  std::stable_sort(options.begin(), options.end(), [](const auto& a, const auto& b) {
    return a.bytes < b.bytes;
  });
  return options;
}

// A table stays as it was asked for; where nothing was asked and the budget counts it, it may also
// have the bits of its floor.
std::vector<PlanOption> table_options(
    const PreparedRun& run,
    const PlannedLinear& table,
    const QuantizeOptions& options,
    bool counted) {
  std::vector<PlanOption> possible = {{table.method, table.scheme, stored_bytes(run, table), 0}};
  if (!counted || !options.planning.choose_tables || !table.keep()) {
    return possible;
  }
  const TableChoice floor{kTableFloor, 0, kTableFloor};
  PlannedLinear tried =
      *uniform_plan(run.graph, options.method, options.scheme, floor).find(table.name);
  if (run.format->is_gguf) {
    tried.scheme =
        ggml_scheme(fitting_ggml_type(ggml_type_of_bits(kTableFloor), table.in_features));
  }
  if (const auto option = as_option(run, tried)) {
    possible.insert(possible.begin(), *option);
  }
  return possible;
}

// Whether the format refuses partners that serving engines merge (q, k and v; gate and up) with
// different schemes.
bool demands_alike(const PreparedRun& run) {
  if (run.format->is_gguf) {
    return false;
  }
  std::vector<OutputModule> modules;
  for (PlannedLinear linear : run.plan.linears) {
    linear.scheme = QuantScheme();
    linear.scheme.bits = linear.role == Role::kQuery || linear.role == Role::kGate ? 8 : 4;
    modules.push_back(output_module(linear, *run.format, run.graph));
  }
  try {
    (void)run.format->config(QuantScheme{}, modules, Json::object());
    return false;
  } catch (const UnsupportedError&) {
    return true;
  }
}

// Linears one by one or, with `alike`, those of a calibration site as one: engines merge what reads
// the same input. Tables are units where the budget counts them.
std::vector<Unit> make_units(
    const ModelGraph& graph, const QuantPlan& plan, bool alike, bool with_tables) {
  std::map<std::string, std::size_t> index;
  for (std::size_t i = 0; i < plan.linears.size(); ++i) {
    index[plan.linears[i].name] = i;
  }
  std::vector<Unit> units;
  for (const Block& block : graph.blocks) {
    for (const CalibrationSite& site : block.sites) {
      bool first = true;
      for (const int linear : site.linears) {
        const std::size_t i = index.at(block.linears[static_cast<std::size_t>(linear)].module);
        if (plan.linears[i].keep()) {
          continue;
        }
        if (first || !alike) {
          units.push_back({{i}, plan.linears[i].options});
        } else {
          units.back().linears.push_back(i);
          std::erase_if(units.back().options, [&](const PlanOption& option) {
            const auto& own = plan.linears[i].options;
            return std::none_of(own.begin(), own.end(), [&](const PlanOption& each) {
              return same_form(each, option);
            });
          });
        }
        first = false;
      }
    }
  }
  for (std::size_t i = 0; i < plan.linears.size(); ++i) {
    if (with_tables && plan.linears[i].is_table()) {
      units.push_back({{i}, plan.linears[i].options});
    }
  }
  return units;
}

// Bytes and losses of the units' options, from those of their linears.
void sum_up(const QuantPlan& plan, std::vector<Unit>& units) {
  for (Unit& unit : units) {
    for (PlanOption& option : unit.options) {
      option.bytes = 0;
      option.loss = 0;
      for (const std::size_t i : unit.linears) {
        const auto& own = plan.linears[i].options;
        const auto found = std::find_if(own.begin(), own.end(), [&](const PlanOption& each) {
          return same_form(each, option);
        });
        option.bytes += found->bytes;
        option.loss += found->loss;
      }
    }
  }
}

std::vector<AllocationUnit> to_allocate(const std::vector<Unit>& units) {
  std::vector<AllocationUnit> plain;
  for (const Unit& unit : units) {
    AllocationUnit& options = plain.emplace_back();
    for (const PlanOption& option : unit.options) {
      options.push_back({option.bytes, option.loss});
    }
  }
  return plain;
}

void apply(
    const std::vector<Unit>& units, const std::vector<std::size_t>& choice, QuantPlan& plan) {
  for (std::size_t u = 0; u < units.size(); ++u) {
    const PlanOption& option = units[u].options[choice[u]];
    for (const std::size_t i : units[u].linears) {
      plan.linears[i].method = option.method;
      plan.linears[i].scheme = option.scheme;
    }
  }
}

// Whether the budget is one for all weight files, not for the linears of the blocks.
bool counts_whole_model(const SizeBudget& budget) {
  return budget.unit != SizeBudget::Unit::kLinearBitsPerWeight &&
         budget.unit != SizeBudget::Unit::kUniform;
}

// Translates between a budget and bytes. Made while all linears are alike.
class BudgetRule {
 public:
  BudgetRule(const QuantizeOptions& options, const PreparedRun& run)
      : options_(options), budget_(options.planning.budget), run_(run) {
    for (const PlannedLinear& linear : run.plan.linears) {
      if (!linear.keep() && !linear.is_table()) {
        linear_weights_ += static_cast<double>(weights_of(linear));
        uniform_bytes_ += uniform_bytes(linear);
      }
    }
    for (const auto& [name, view] : run.source->tensors().tensors()) {
      parameters_ += static_cast<double>(view.count());
    }
  }

  [[nodiscard]] bool whole() const { return counts_whole_model(budget_); }

  // What may be spent: on the files if whole(), else on the quantized linears.
  [[nodiscard]] std::uint64_t bytes() const {
    switch (budget_.unit) {
      case SizeBudget::Unit::kNone: break;
      case SizeBudget::Unit::kBitsPerWeight: return from_bits(parameters_);
      case SizeBudget::Unit::kLinearBitsPerWeight: return from_bits(linear_weights_);
      case SizeBudget::Unit::kFileBytes: return budget_.bytes;
      case SizeBudget::Unit::kMemoryBytes:
        return budget_.bytes - std::min(budget_.bytes, besides_weights());
      case SizeBudget::Unit::kUniform: return uniform_bytes_;
    }
    return 0;
  }

  // `bytes` in the unit of the budget, rounded up, as an option of the command line.
  [[nodiscard]] std::string option_for(std::uint64_t bytes) const {
    const auto bits = [&](double weights) {
      return std::ceil(8e4 * static_cast<double>(bytes) / weights) / 1e4;
    };
    switch (budget_.unit) {
      case SizeBudget::Unit::kBitsPerWeight: return fmt::format("--bpw {}", bits(parameters_));
      case SizeBudget::Unit::kLinearBitsPerWeight:
        return fmt::format("--linear-bpw {}", bits(linear_weights_));
      case SizeBudget::Unit::kMemoryBytes:
        return fmt::format("--fit-ram {}", bytes + besides_weights());
      default: return fmt::format("--target-size {}", bytes);
    }
  }

  [[nodiscard]] Json json() const {
    Json json = {{"bytes", bytes()}, {"of", whole() ? "weight files" : "quantized linears"}};
    switch (budget_.unit) {
      case SizeBudget::Unit::kBitsPerWeight: json["bpw"] = budget_.bits; break;
      case SizeBudget::Unit::kLinearBitsPerWeight: json["linear_bpw"] = budget_.bits; break;
      case SizeBudget::Unit::kMemoryBytes:
        json["fit_ram"] = budget_.bytes;
        json["context"] = budget_.context;
        json["besides_weights"] = besides_weights();
        break;
      case SizeBudget::Unit::kUniform: json["size_of"] = scheme_text(options_.scheme); break;
      default: break;
    }
    return json;
  }

 private:
  [[nodiscard]] std::uint64_t from_bits(double weights) const {
    return static_cast<std::uint64_t>(std::floor(budget_.bits * weights / 8));
  }

  // Keys and values of `context` tokens in float, as quern's engine keeps them, a chunk of logits,
  // and the program.
  [[nodiscard]] std::uint64_t besides_weights() const {
    const ModelConfig& config = run_.graph.config;
    std::int64_t cached = 0;
    for (const Block& block : run_.graph.blocks) {
      cached += block.sliding_window > 0 ? std::min(block.sliding_window, budget_.context)
                                         : budget_.context;
    }
    const std::int64_t floats = 2 * cached * config.kv_heads * config.head_dim +
                                logit_rows_per_chunk(config.vocab_size) * config.vocab_size;
    return static_cast<std::uint64_t>(floats) * sizeof(float) + kProgramBytes;
  }

  [[nodiscard]] std::uint64_t uniform_bytes(const PlannedLinear& linear) const {
    if (budget_.unit != SizeBudget::Unit::kUniform) {
      return 0;
    }
    run_.format->check(output_module(linear, *run_.format, run_.graph));
    return stored_bytes(run_, linear);
  }

  const QuantizeOptions& options_;
  const SizeBudget& budget_;
  const PreparedRun& run_;
  double linear_weights_ = 0;
  std::uint64_t uniform_bytes_ = 0;
  double parameters_ = 0;
};

std::uint64_t file_bytes(const PreparedRun& run, std::uint64_t shard_bytes) {
  if (run.format->is_gguf) {
    return plan_gguf_output(*run.source, run.graph, run.plan, model_name(run.source->directory()))
        .layout.bytes;
  }
  SafetensorsOptions layout;
  layout.max_file_bytes = shard_bytes;
  const SafetensorsLayout planned = plan_safetensors(declare_output(run), layout);
  return planned.total_bytes() - planned.index.size();
}

[[noreturn]] void refuse_budget(const BudgetRule& rule, std::uint64_t smallest) {
  throw UsageError(
      "the budget is below the safety floor",
      fmt::format("{} bytes of {}", rule.bytes(), rule.whole() ? "weight files" : "linears"),
      fmt::format(
          "expected at least {} bytes: linears at their fewest bits, embeddings and head as the "
          "format stores them",
          smallest),
      rule.option_for(smallest));
}

// The best choice that the budget pays for. Leaves it in run.plan.
Allocation allocate_within(
    const BudgetRule& rule,
    const std::vector<Unit>& units,
    std::uint64_t shard_bytes,
    PreparedRun& run) {
  const std::vector<AllocationUnit> plain = to_allocate(units);
  const std::uint64_t smallest = smallest_bytes(plain);
  if (!rule.whole()) {
    if (rule.bytes() < smallest) {
      refuse_budget(rule, smallest);
    }
    Allocation found = allocate(plain, rule.bytes());
    apply(units, found.choice, run.plan);
    return found;
  }
  // Headers grow a little with what is chosen: what they took is counted until everything fits.
  Allocation found = allocate(plain, smallest);
  apply(units, found.choice, run.plan);
  std::uint64_t total = file_bytes(run, shard_bytes);
  if (total > rule.bytes()) {
    refuse_budget(rule, total);
  }
  const Allocation least = found;
  std::uint64_t besides = total - found.bytes;
  do {
    const std::uint64_t left = rule.bytes() - std::min(rule.bytes(), besides);
    found = left < smallest ? least : allocate(plain, left);
    apply(units, found.choice, run.plan);
    total = file_bytes(run, shard_bytes);
    besides = total - found.bytes;
  } while (total > rule.bytes());
  return found;
}

// Calibration sequences of about `tokens` tokens, evenly spread over those with an index for which
// `wanted` holds, cut to kLongestSequence.
template <class Wanted>
Sequences pick_sequences(const Sequences& all, std::int64_t tokens, const Wanted& wanted) {
  std::vector<std::size_t> candidates;
  for (std::size_t i = 0; i < all.size(); ++i) {
    if (wanted(i)) {
      candidates.push_back(i);
    }
  }
  Sequences picked;
  if (candidates.empty()) {
    return picked;
  }
  const auto length =
      std::min<std::int64_t>(kLongestSequence, static_cast<std::int64_t>(all.front().size()));
  const std::size_t count = std::min(
      candidates.size(), static_cast<std::size_t>(std::max<std::int64_t>(1, tokens / length)));
  for (std::size_t k = 0; k < count; ++k) {
    picked.push_back(all[candidates[k * candidates.size() / count]]);
    picked.back().resize(std::min<std::size_t>(picked.back().size(), kLongestSequence));
  }
  return picked;
}

// Gradients of all linears, block after block, and from them the loss of every option.
class Scorer {
 public:
  Scorer(const Context& ctx, const QuantizeOptions& options, PreparedRun& run)
      : ctx_(ctx),
        run_(run),
        method_options_(options.method_options),
        transform_(find_transform(options.transform)) {
    method_options_.storage = run.format->storage(run.graph.config.dtype, OutputModule());
    gradients_.parts = [](const Linear&) {
      GradientParts parts;
      parts.guided_groups = 1;
      return parts;
    };
  }

  [[nodiscard]] double work(const Sequences& sequences) const {
    double work = gradient_work(run_.graph, sequences, gradients_);
    for (const PlannedLinear& linear : run_.plan.linears) {
      work += scoring_work(linear);
    }
    return work;
  }

  // Fills in the losses of run.plan's options; a score for each linear, by name.
  std::map<std::string, LinearScore> run(const Sequences& sequences, Progress& progress) {
    keep_within_memory(sequences);
    gradients_.progress = [&](double work) { progress.add(work); };
    progress.set_stage("gradients");
    std::map<std::string, LinearScore> scores;
    std::vector<LinearGradients> waiting;
    const GradientSummary summary = gather_gradients(
        ctx_,
        run_.graph,
        *run_.source,
        sequences,
        gradients_,
        [&](const Block* block, const Linear& linear, LinearGradients&& gradients) {
          if (block == nullptr) {
            score_head(linear, gradients);
            return;
          }
          waiting.push_back(std::move(gradients));
          if (waiting.size() == block->linears.size()) {
            progress.set_stage(fmt::format("scores of layer {}", block->index + 1));
            score_block(*block, waiting, scores, progress);
            progress.set_stage("gradients");
            waiting.clear();
          }
        });
    score_embedding(summary);
    return scores;
  }

 private:
  [[nodiscard]] static double scoring_work(const PlannedLinear& linear) {
    return static_cast<double>(linear.options.size()) * kRangeCandidates *
           static_cast<double>(std::min<std::int64_t>(linear.out_features, kScoredRows)) *
           static_cast<double>(linear.in_features);
  }

  void keep_within_memory(const Sequences& sequences) {
    const GradientMemory memory = gradient_memory(ctx_, run_.graph, sequences, gradients_);
    if (ctx_.memory_budget == 0 || memory.stored + memory.working <= ctx_.memory_budget) {
      return;
    }
    gradients_.spill_directory = std::filesystem::temp_directory_path();
    if (memory.working > ctx_.memory_budget) {
      throw ResourceError(
          "not enough memory to plan for this model",
          "--memory " + human_bytes(static_cast<double>(ctx_.memory_budget)),
          fmt::format(
              "at least {} are needed with everything else on disk",
              human_bytes(static_cast<double>(memory.working))),
          fmt::format("--memory {}MiB", (memory.working >> 20U) + 1));
    }
  }

  [[nodiscard]] RowReader rows_of(const LinearWeights& weights) const {
    return [this, &weights](std::int64_t row, std::span<float> out) {
      std::vector<std::uint8_t> scratch(out.size());
      const float* from = weight_row(ctx_.kernels, weights, row, scratch.data(), out.data());
      if (from != out.data()) {
        std::copy(from, from + out.size(), out.begin());
      }
    };
  }

  // As outputs: every row of the table is one.
  void score_head(const Linear& head, const LinearGradients& gradients) {
    PlannedLinear& table = planned(head);
    const LinearWeights weights = load_linear_weights(head, *run_.source);
    const LinearEvidence evidence{
        rows_of(weights), &gradients.guided.front(), gradients.delta_square, table.options};
    add_losses(score_linear(ctx_, evidence, {}, method_options_).losses, table);
    release_linear_weights(head, *run_.source);
  }

  // As inputs; a table that is the head too loses both.
  void score_embedding(const GradientSummary& summary) {
    PlannedLinear& table = planned(run_.graph.embedding);
    const LinearWeights weights = load_linear_weights(run_.graph.embedding, *run_.source);
    std::vector<double> squares = summary.embedding_square;
    for (double& square : squares) {
      square /= static_cast<double>(summary.tokens);
    }
    add_losses(
        score_lookup(
            ctx_, rows_of(weights), table.out_features, squares, table.options, method_options_),
        table);
    release_linear_weights(run_.graph.embedding, *run_.source);
  }

  static void add_losses(const std::vector<double>& losses, PlannedLinear& linear) {
    for (std::size_t o = 0; o < losses.size(); ++o) {
      linear.options[o].loss += losses[o];
    }
  }

  PlannedLinear& planned(const Linear& linear) {
    auto& linears = run_.plan.linears;
    return *std::find_if(linears.begin(), linears.end(), [&](const PlannedLinear& each) {
      return each.name == linear.module;
    });
  }

  void score_block(
      const Block& block,
      const std::vector<LinearGradients>& gradients,
      std::map<std::string, LinearScore>& scores,
      Progress& progress) {
    const BlockWeights weights = load_block_weights(block, *run_.source);
    for (int site = 0; site < static_cast<int>(block.sites.size()); ++site) {
      const std::vector<int>& members = block.sites[static_cast<std::size_t>(site)].linears;
      std::vector<LinearEvidence> evidence;
      for (const int index : members) {
        const auto i = static_cast<std::size_t>(index);
        evidence.push_back(
            {rows_of(weights.linears[i]),
             &gradients[i].guided.front(),
             gradients[i].delta_square,
             planned(block.linears[i]).options});
      }
      std::vector<LinearScore> found =
          score_site(ctx_, block, site, evidence, transform_, method_options_);
      for (std::size_t k = 0; k < members.size(); ++k) {
        PlannedLinear& linear = planned(block.linears[static_cast<std::size_t>(members[k])]);
        add_losses(found[k].losses, linear);
        progress.add(scoring_work(linear));
        scores.emplace(linear.name, std::move(found[k]));
      }
    }
    release_block_weights(block, *run_.source);
  }

  const Context& ctx_;
  PreparedRun& run_;
  MethodOptions method_options_;
  const Transform* transform_;
  GradientOptions gradients_;
};

// Measures the chosen allocation and some around it, in which the linears of the blocks are moved
// one step along their hull, down, up or not at all.
AdditivityCheck check_additivity(
    const Context& ctx,
    const PreparedRun& run,
    const std::vector<Unit>& units,
    const Allocation& chosen,
    const std::map<std::string, LinearScore>& scores,
    const Sequences& sequences,
    Progress& progress) {
  const std::vector<AllocationUnit> plain = to_allocate(units);
  std::mt19937_64 random(ctx.seed);
  AdditivityCheck check;
  std::vector<QuantPlan> plans;
  for (int k = 0; k <= kNearbyAllocations; ++k) {
    std::vector<std::size_t> choice = chosen.choice;
    double loss = 0;
    for (std::size_t u = 0; u < units.size(); ++u) {
      if (run.plan.linears[units[u].linears.front()].is_table()) {
        continue;
      }
      const std::vector<std::size_t> hull = convex_hull(plain[u]);
      const auto at = std::find(hull.begin(), hull.end(), choice[u]) - hull.begin();
      const auto move = k == 0 ? 0 : static_cast<std::ptrdiff_t>(random() % 3) - 1;
      choice[u] = hull[static_cast<std::size_t>(
          std::clamp<std::ptrdiff_t>(at + move, 0, static_cast<std::ptrdiff_t>(hull.size()) - 1))];
      loss += plain[u][choice[u]].loss;
    }
    check.predicted.push_back(loss);
    apply(units, choice, plans.emplace_back(run.plan));
  }
  check.measured = measure_variants(
      ctx,
      run.graph,
      *run.source,
      sequences,
      static_cast<int>(plans.size()),
      [&](const Block& block, const BlockWeights& original, int variant) {
        progress.set_stage(fmt::format("additivity, layer {}", block.index + 1));
        BlockWeights weights = original;
        for (std::size_t i = 0; i < block.linears.size(); ++i) {
          const PlannedLinear& linear =
              *plans[static_cast<std::size_t>(variant)].find(block.linears[i].module);
          if (!linear.keep()) {
            weights.linears[i] = with_rounding_errors(
                ctx,
                original.linears[i],
                linear.scheme,
                scores.at(linear.name),
                chosen_option(linear)->loss);
          }
        }
        return weights;
      },
      [&](double work) { progress.add(work); });
  return check;
}

// The option by which linears are compared: its bits nearest to kSensitivityBits, its group
// largest.
const PlanOption& sensitivity_option(const std::vector<PlanOption>& options) {
  const auto key = [](const PlanOption& option) {
    return std::tuple(
        option.keep(),
        std::abs(option.scheme.bits - kSensitivityBits),
        option.scheme.group_size == 0 ? 0 : -option.scheme.group_size,
        !option.scheme.symmetric);
  };
  return *std::min_element(options.begin(), options.end(), [&](const auto& a, const auto& b) {
    return key(a) < key(b);
  });
}

std::string short_text(const PlanOption& option) {
  const QuantScheme& scheme = option.scheme;
  if (option.keep() || scheme.ggml) {
    return option.keep() ? "the floats" : scheme_text(scheme);
  }
  return fmt::format(
      "{} bits{}{}",
      scheme.bits,
      scheme.group_size == 0 ? " by channel" : fmt::format(" in {}s", scheme.group_size),
      scheme.symmetric ? "" : " with zero points");
}

// Sensitivities and reasons, for people.
void explain_choices(const std::vector<Unit>& units, const Allocation& chosen, QuantPlan& plan) {
  double total = 0;
  double weights = 0;
  for (PlannedLinear& linear : plan.linears) {
    if (!linear.keep() && !linear.is_table()) {
      linear.sensitivity = sensitivity_option(linear.options).loss;
      total += *linear.sensitivity;
      weights += static_cast<double>(weights_of(linear));
    }
  }
  const std::vector<AllocationUnit> plain = to_allocate(units);
  for (std::size_t u = 0; u < units.size(); ++u) {
    const Unit& unit = units[u];
    const std::vector<std::size_t> hull = convex_hull(plain[u]);
    const auto at = static_cast<std::size_t>(
        std::find(hull.begin(), hull.end(), chosen.choice[u]) - hull.begin());
    const PlanOption& option = unit.options[hull[at]];
    std::string steps;
    if (at > 0) {
      const PlanOption& lower = unit.options[hull[at - 1]];
      steps += fmt::format(
          "; {} cost {:.2g} nats less than {}",
          short_text(option),
          lower.loss - option.loss,
          short_text(lower));
    }
    if (at + 1 < hull.size()) {
      const PlanOption& upper = unit.options[hull[at + 1]];
      steps += fmt::format(
          "; {} would save {:.2g} for {}",
          short_text(upper),
          option.loss - upper.loss,
          human_bytes(static_cast<double>(upper.bytes - option.bytes)));
    }
    for (const std::size_t i : unit.linears) {
      PlannedLinear& linear = plan.linears[i];
      if (linear.is_table()) {
        linear.reason += steps;
        continue;
      }
      const double mean = total / weights * static_cast<double>(weights_of(linear));
      linear.reason = fmt::format(
          "{:.2g}x the mean sensitivity{}{}",
          mean > 0 ? *linear.sensitivity / mean : 1.0,
          steps,
          unit.linears.size() > 1 ? "; decided with its fused partners" : "");
    }
  }
}

std::vector<std::string> constraints_of(const PreparedRun& run, bool alike) {
  std::vector<std::string> constraints = {
      "norms and biases keep their floats",
      fmt::format("linears of the blocks have at least {} bits", kLinearFloor)};
  if (alike) {
    constraints.emplace_back(
        "linears with the same input (q, k and v; gate and up) are alike, as engines merge them");
  }
  for (const PlannedLinear& linear : run.plan.linears) {
    if (linear.is_table()) {
      const std::string is = linear.options.size() > 1
                                 ? fmt::format("has at least {} bits", kTableFloor)
                             : linear.keep() ? "keeps its floats"
                                             : "has the bits that were asked for";
      constraints.push_back(fmt::format(
          "{}{} {}", linear.name, run.graph.head_tied ? ", embedding and head in one," : "", is));
    } else if (linear.keep()) {
      constraints.push_back(linear.name + " keeps its floats: " + linear.reason);
    }
  }
  return constraints;
}

void set_options(const QuantizeOptions& options, bool counts_tables, PreparedRun& run) {
  for (PlannedLinear& linear : run.plan.linears) {
    if (linear.is_table()) {
      linear.options = table_options(run, linear, options, counts_tables);
      continue;
    }
    linear.options = linear_options(run, linear, options.planning);
    if (linear.options.empty()) {
      linear.method = "keep";
      linear.reason = fmt::format("{} holds none of the options in its size", run.format->name);
    }
  }
}

}  // namespace

void plan_for_budget(const Context& ctx, const QuantizeOptions& options, PreparedRun& run) {
  const double started = steady_seconds();
  const PlanningOptions& planning = options.planning;
  const bool whole = counts_whole_model(planning.budget);
  set_options(options, whole, run);
  const BudgetRule rule(options, run);
  const bool alike = planning.fused_alike.value_or(demands_alike(run));
  std::vector<Unit> units = make_units(run.graph, run.plan, alike, whole);
  if (units.empty()) {
    throw UsageError(
        "there is nothing to choose from",
        fmt::format("--format {}", run.format->name),
        "it holds no linear of this model at the widths and group sizes asked for",
        "leave out --plan-bits and --group-size");
  }
  sum_up(run.plan, units);
  (void)allocate_within(rule, units, options.shard_bytes, run);  // refuses before the work

  const Sequences all = load_calibration(options.calibration, run, ctx.seed).sequences;
  const auto is_checked = [&](std::size_t i) {
    return planning.check_additivity &&
           is_holdout(static_cast<std::int64_t>(i), static_cast<std::int64_t>(all.size()));
  };
  const Sequences scored =
      pick_sequences(all, kGradientTokens, [&](std::size_t i) { return !is_checked(i); });
  const Sequences checked = pick_sequences(all, kCheckTokens, is_checked);

  Scorer scorer(ctx, options, run);
  Progress progress(
      ctx.log, scorer.work(scored) + variants_work(run.graph, checked, kNearbyAllocations + 1));
  const std::map<std::string, LinearScore> scores = scorer.run(scored, progress);
  sum_up(run.plan, units);
  const Allocation chosen = allocate_within(rule, units, options.shard_bytes, run);
  explain_choices(units, chosen, run.plan);
  run.planning.budget = rule.json();
  run.planning.constraints = constraints_of(run, alike);
  if (!checked.empty()) {
    run.planning.additivity = check_additivity(ctx, run, units, chosen, scores, checked, progress);
  }
  progress.finish();
  run.planning.seconds = steady_seconds() - started;
}

}  // namespace quern
