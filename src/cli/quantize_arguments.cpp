// SPDX-License-Identifier: Apache-2.0
#include "cli/quantize_arguments.h"

#include "base/error.h"
#include "base/units.h"
#include "format/output_format.h"
#include "plan/recipes.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <limits>
#include <string_view>
#include <utility>

namespace quern {
namespace {

std::int64_t parse_group_size(const std::string& text) {
  if (text == "channel" || text == "-1") {
    return 0;
  }
  std::int64_t value = 0;
  const auto [end, code] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (code != std::errc() || end != text.data() + text.size() || value < 1 || value > (1 << 20)) {
    throw UsageError(
        "not a group size",
        "--group-size " + text,
        "expected 16, 32, 64, 128 … or channel",
        "--group-size 128");
  }
  return value;
}

// FILE[:weight]; a colon that no number follows is part of the name.
std::pair<std::filesystem::path, double> parse_calibration(const std::string& text) {
  const std::size_t colon = text.rfind(':');
  if (colon != std::string::npos && colon + 1 < text.size()) {
    double weight = 0;
    const char* begin = text.data() + colon + 1;
    const char* end = text.data() + text.size();
    const auto [rest, code] = std::from_chars(begin, end, weight);
    if (code == std::errc() && rest == end) {
      if (!(weight > 0) || weight > 1e6) {
        throw UsageError(
            "not a weight",
            "--calibration " + text,
            "expected a positive number after the colon",
            "--calibration FILE:2");
      }
      return {text.substr(0, colon), weight};
    }
  }
  return {text, 1.0};
}

// 16, 8, 6, 4, mixed or mixed:COUNT.
void parse_embedding_bits(const std::string& text, bool force, TableChoice& tables) {
  constexpr std::int64_t kFrequentTokens = 20'000;
  constexpr std::string_view kMixed = "mixed";
  const auto refuse = [&](const std::string& expected) {
    throw UsageError(
        "not a choice for the embedding",
        "--embedding-bits " + text,
        expected,
        "--embedding-bits 8");
  };
  const auto number = [&](std::string_view digits) {
    std::int64_t value = 0;
    const auto [end, code] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    if (code != std::errc() || end != digits.data() + digits.size() || value < 1) {
      refuse("expected 16, 8, 6, 4, mixed or mixed:COUNT");
    }
    return value;
  };
  if (text.starts_with(kMixed)) {
    const std::string_view rest = std::string_view(text).substr(kMixed.size());
    if (!rest.empty() && rest.front() != ':') {
      refuse("expected mixed or mixed:COUNT");
    }
    tables.frequent_tokens = rest.empty() ? kFrequentTokens : number(rest.substr(1));
    tables.embedding_bits = 4;
    return;
  }
  const std::int64_t bits = number(text);
  if (bits != 16 && (bits > 8 || bits < 2)) {
    refuse("expected 16, 8, 6, 4, mixed or mixed:COUNT");
  }
  if (bits == 5 || bits == 7) {
    refuse("no format has such tables; expected 16, 8, 6, 4, mixed or mixed:COUNT");
  }
  if (bits < 4 && !force) {
    refuse("below 4 bits rare tokens lose their meaning; --force does it all the same");
  }
  tables.embedding_bits = static_cast<int>(bits);
}

ColumnOrder parse_order(const std::string& text) {
  if (text == "natural") {
    return ColumnOrder::kNatural;
  }
  return text == "group-aware" ? ColumnOrder::kGroupAware : ColumnOrder::kActivation;
}

// "power" is the older name of power-2.4.
RangeSearch parse_range(const std::string& text) {
  return range_from_name(text).value_or(RangeSearch::kPower24);
}

// Where the bytes go is decided by what each linear loses (GASQ).
void add_budget_options(CLI::App& app, QuantizeArguments& a) {
  const std::string group = "Mixed precision";
  std::vector<CLI::Option*> exclusive = {
      app.add_option("--plan", a.plan, "obey this plan, made by quern plan and edited"),
      app.add_option("--bpw", a.bpw, "plan for so many bits per weight, every stored byte counted")
          ->check(number_within(0.01, 64)),
      app.add_option(
             "--linear-bpw",
             a.linear_bpw,
             "the same of the quantized linears alone, scales and zero points counted")
          ->check(number_within(0.01, 64)),
      app.add_option("--target-size", a.target_size, "plan for weight files of this size: 3.5GB"),
      app.add_option(
          "--fit-ram",
          a.fit_ram,
          "plan for running in this much memory: weights, keys and values of --fit-context tokens, "
          "a chunk of logits, 96 MiB")};
  for (CLI::Option* option : exclusive) {
    option->group(group);
    for (CLI::Option* other : exclusive) {
      if (other != option) {
        option->excludes(other);
      }
    }
  }
  app.add_option("--fit-context", a.fit_context, "tokens that --fit-ram counts (default: 4096)")
      ->check(CLI::Range(1, 1 << 24))
      ->group(group);
  app.add_option("--plan-bits", a.plan_bits, "widths to choose from (default: 2,3,4,5,6,8)")
      ->delimiter(',')
      ->check(CLI::Range(2, 8))
      ->group(group);
  auto* alike = app.add_flag(
                       "--fused-alike",
                       a.fused_alike,
                       "q, k and v alike, gate and up alike (default: where the format demands it)")
                    ->group(group);
  app.add_flag("--fused-apart", a.fused_apart, "each on its own")->excludes(alike)->group(group);
  app.add_flag("--no-check", a.no_check, "do not measure that the losses of the linears add up")
      ->group(group);
}

PlanningOptions planning_options(const QuantizeArguments& a, const Recipe& recipe) {
  PlanningOptions planning;
  SizeBudget& budget = planning.budget;
  budget.context = a.fit_context;
  if (a.bpw > 0) {
    budget.unit = SizeBudget::Unit::kBitsPerWeight;
    budget.bits = a.bpw;
  } else if (a.linear_bpw > 0) {
    budget.unit = SizeBudget::Unit::kLinearBitsPerWeight;
    budget.bits = a.linear_bpw;
  } else if (!a.target_size.empty()) {
    budget.unit = SizeBudget::Unit::kFileBytes;
    budget.bytes = parse_size(a.target_size, "--target-size");
  } else if (!a.fit_ram.empty()) {
    budget.unit = SizeBudget::Unit::kMemoryBytes;
    budget.bytes = parse_size(a.fit_ram, "--fit-ram");
  } else if (recipe.planned && a.plan.empty()) {
    budget.unit = SizeBudget::Unit::kUniform;
  }
  if (!a.plan_bits.empty()) {
    planning.bits = a.plan_bits;
  }
  if (a.group_size) {
    planning.group_sizes = {parse_group_size(*a.group_size)};
  }
  if (a.symmetric || a.asymmetric) {
    planning.symmetric = {a.symmetric};
  }
  if (a.fused_alike || a.fused_apart) {
    planning.fused_alike = a.fused_alike;
  }
  planning.choose_tables = !a.embedding_bits && !a.head_bits;
  planning.check_additivity = !a.no_check;
  return planning;
}

}  // namespace

void add_quantize_options(CLI::App& app, QuantizeArguments& a) {
  app.add_option("MODEL", a.model, "checkpoint directory: config.json, safetensors, tokenizer")
      ->required();
  std::string names;
  for (const Recipe& recipe : recipes()) {
    names += (names.empty() ? "" : ", ") + std::string(recipe.name);
  }
  auto* method = app.add_option("--method", a.method, names + " (default: gptq)")->group("What");
  app.add_option("--recipe", a.recipe, "the same")->group("What")->excludes(method);
  app.add_option("--bits", a.bits, "1 to 8 (default: 4; smoothquant 8, billm 1)")->group("What");
  app.add_option(
         "--group-size",
         a.group_size,
         "columns that share a scale, or channel (default: 128; smoothquant channel)")
      ->group("What");
  app.add_option(
         "--activation-bits",
         a.activation_bits,
         "integer inputs of the linears: 8, 4, or 16 for none (default: 16; smoothquant 8)")
      ->check(CLI::IsMember({16, 8, 4}))
      ->group("What");
  app.add_option(
         "--activation-scale",
         a.activation_scale,
         "dynamic (of each token, at run time) or static (of the calibration; default: dynamic)")
      ->check(CLI::IsMember({"dynamic", "static"}))
      ->group("What");
  app.add_option(
         "--embedding-bits",
         a.embedding_bits,
         "16, 8, 6, 4, or mixed[:COUNT]: COUNT frequent tokens at 8, the others at 4, tied at 6 "
         "(default: 16)")
      ->group("What");
  app.add_option("--head-bits", a.head_bits, "16 or 2 to 8, of a head of its own (default: 16)")
      ->group("What");
  auto* symmetric =
      app.add_flag("--symmetric", a.symmetric, "zero point in the middle (the default)")
          ->group("What");
  app.add_flag("--asymmetric", a.asymmetric, "a zero point for each group")
      ->group("What")
      ->excludes(symmetric);
  app.add_option(
         "--format",
         a.format,
         output_format_names() + " (default: gptq; experts-int4 compressed-tensors)")
      ->group("What");
  app.add_option("--also", a.also, "the same codes in this format too, in OUT-FORMAT; repeatable")
      ->group("What");
  add_budget_options(app, a);
  app.add_option(
         "--order",
         a.order,
         "columns: natural, activation or group-aware (default: activation, with static groups)")
      ->check(CLI::IsMember({"natural", "activation", "group-aware"}))
      ->group("How");
  app.add_option(
         "--range",
         a.range,
         "minmax, absmax, power-2.4, weighted or output (default: weighted; rtn minmax, awq "
         "output, smoothquant absmax)")
      ->check(CLI::IsMember({"minmax", "absmax", "power-2.4", "power", "weighted", "output"}))
      ->group("How");
  app.add_option("--damping", a.damping, "first damping of the second moments (default: 0.01)")
      ->check(number_within(0, 1))
      ->group("How");
  app.add_option("--sweeps", a.sweeps, "coordinate-descent sweeps (default: 3)")
      ->check(CLI::Range(0, 100))
      ->group("How");
  app.add_option("--refits", a.refits, "rounds of scale refit (default: 3)")
      ->check(CLI::Range(0, 100))
      ->group("How");
  app.add_option(
         "--transform",
         a.transform,
         "channel factors: none, awq, scale or smoothquant (default: as the method has it)")
      ->check(CLI::IsMember({"none", "awq", "scale", "smoothquant"}))
      ->group("How");
  auto* towards = app.add_flag(
                         "--mismatch-target",
                         a.mismatch_target,
                         "round towards the unquantized model's outputs; a second forward pass "
                         "(best and gasq do)")
                      ->group("How");
  app.add_flag("--no-mismatch-target", a.no_mismatch_target, "do not")
      ->group("How")
      ->excludes(towards);
  app.add_flag("--experts-only", a.experts_only, "round routed experts, and keep all else as it is")
      ->group("What");
  app.add_option(
         "--failsafe",
         a.failsafe,
         "experts that few tokens reach: pooled (with the tokens nearest to them) or rtn")
      ->check(CLI::IsMember({"pooled", "rtn"}))
      ->group("How");
  app.add_option(
         "--restarts", a.restarts, "further rounds of recursion and descent (default: 0; best 1)")
      ->check(CLI::Range(0, 100))
      ->group("How");
  app.add_option(
         "--asymmetry",
         a.asymmetry,
         "gptaq: share of the way to the unquantized model's outputs (default: 0.25)")
      ->check(number_within(0, 1))
      ->group("How");
  app.add_option(
         "--calibration",
         a.calibration,
         "FILE[:weight], repeatable: .txt, .jsonl (each also .gz, .zst), or .safetensors with "
         "input_ids (default: the bundled mix)")
      ->group("Calibration");
  app.add_option(
         "--imatrix",
         a.imatrix,
         "llama.cpp's importance matrix in place of calibration text: how large the inputs are")
      ->excludes("--calibration")
      ->group("Calibration");
  app.add_option(
         "--imatrix-out", a.imatrix_output, "write what calibration found as such a file (GGUF)")
      ->excludes("--imatrix")
      ->group("Calibration");
  app.add_option("--samples", a.samples, "sequences (default: 128; all of a .safetensors file)")
      ->check(CLI::Range(1, 1 << 24))
      ->group("Calibration");
  app.add_option("--sequence-length", a.length, "tokens of a sequence (default: 512)")
      ->check(CLI::Range(2, 1 << 20))
      ->group("Calibration");
  app.add_option("--work-dir", a.work_directory, "where a run keeps its state (default: OUT.run)")
      ->group("Run");
  app.add_option("--shard-size", a.shard_size, "largest weight file (default: 5GB)")->group("Run");
  app.add_flag("--resume,!--no-resume", a.resume, "go on with an unfinished run (the default)")
      ->group("Run");
  app.add_flag("--force", a.force, "move what stands at OUT aside")->group("Run");
}

QuantizeOptions quantize_options(const Session& session, const QuantizeArguments& a) {
  QuantizeOptions options;
  options.model = resolve_model(a.model);
  options.output = a.output;
  const Recipe& recipe = find_recipe(a.recipe ? *a.recipe : a.method.value_or("gptq"));
  options.recipe = recipe.name;
  options.planning = planning_options(a, recipe);
  options.method = recipe.method;
  options.scheme.bits = a.bits.value_or(recipe.bits);
  options.scheme.group_size = a.group_size ? parse_group_size(*a.group_size) : recipe.group_size;
  options.scheme.symmetric = !a.asymmetric;
  if (a.embedding_bits) {
    parse_embedding_bits(*a.embedding_bits, a.force, options.tables);
  }
  options.tables.head_bits = a.head_bits.value_or(16);
  if (options.tables.head_bits != 16 &&
      (options.tables.head_bits < 2 || options.tables.head_bits > 8)) {
    throw UsageError(
        "not a width for the head",
        fmt::format("--head-bits {}", options.tables.head_bits),
        "expected 16, or 2 to 8",
        "--head-bits 8");
  }
  options.activation.bits = a.activation_bits.value_or(recipe.activation_bits);
  options.activation.dynamic = a.activation_scale == "dynamic";
  options.format = a.format.value_or(std::string(recipe.format));
  options.experts_only = recipe.experts_only || a.experts_only;
  options.also = a.also;
  for (const std::string& name : a.also) {
    const auto known = output_formats();
    if (std::none_of(known.begin(), known.end(), [&](const OutputFormat& format) {
          return format.name == name;
        })) {
      throw UsageError(
          "unknown output format",
          "--also " + printable(name, 60),
          "expected one of " + output_format_names(),
          "--also compressed-tensors");
    }
  }
  options.method_options.order = a.order.empty() ? recipe.order : parse_order(a.order);
  options.method_options.range = a.range.empty() ? recipe.range : parse_range(a.range);
  if (a.range.empty() && !a.imatrix.empty() && recipe.range == RangeSearch::kMinMax) {
    options.method_options.range = RangeSearch::kWeighted;  // what else was it given for
  }
  options.method_options.damping = a.damping;
  options.method_options.descent_sweeps = a.sweeps >= 0 ? a.sweeps : recipe.descent_sweeps;
  options.method_options.refit_rounds = a.refits >= 0 ? a.refits : recipe.refit_rounds;
  options.method_options.restarts = a.restarts.value_or(recipe.restarts);
  options.method_options.mismatch_target =
      a.mismatch_target || (recipe.mismatch_target && !a.no_mismatch_target);
  options.method_options.asymmetry = a.asymmetry;
  if (a.failsafe == "rtn") {
    options.method_options.rare_experts = RareExperts::kRtn;
  }
  const std::string transform = a.transform.empty() ? std::string(recipe.transform) : a.transform;
  options.transform = transform == "none" ? "" : transform;
  for (const std::string& file : a.calibration) {
    options.calibration.files.push_back(parse_calibration(file));
  }
  const bool fixed_ids = options.calibration.files.size() == 1 &&
                         options.calibration.files.front().first.extension() == ".safetensors";
  options.calibration.samples = a.samples > 0 ? a.samples
                                : fixed_ids   ? std::numeric_limits<std::int32_t>::max()
                                              : 128;
  options.calibration.length = a.length;
  if (!a.plan.empty() && (a.method || a.recipe || a.bits || a.group_size || a.embedding_bits ||
                          a.head_bits || a.activation_bits || !a.transform.empty())) {
    throw UsageError(
        "a plan says this already",
        "--plan " + a.plan,
        "with it --method, --bits, --group-size, --transform and the widths of tables and inputs "
        "have no meaning",
        "leave them out, or edit the plan");
  }
  if (a.activation_scale == "static" && !options.activation.active()) {
    throw UsageError(
        "no inputs to scale",
        "--activation-scale static",
        "the inputs of the linears stay floats",
        "--activation-bits 8");
  }
  if (options.planning.budget.given() && options.format.find(':') != std::string::npos) {
    throw UsageError(
        "a type for all linears leaves nothing to plan",
        "--format " + options.format,
        "a budget chooses the type of each",
        "--format gguf");
  }
  options.imatrix = a.imatrix;
  if (options.planning.budget.given() && !options.imatrix.empty()) {
    throw UsageError(
        "an importance matrix is not enough",
        "--imatrix " + a.imatrix,
        "planning for a budget takes gradients, and those take text",
        "--calibration instead of --imatrix");
  }
  options.imatrix_output = a.imatrix_output;
  options.plan_file = a.plan;
  options.work_directory = a.work_directory;
  options.resume = a.resume;
  options.force = a.force;
  options.shard_bytes = parse_size(a.shard_size, "--shard-size");
  options.command = session.command();
  return options;
}

}  // namespace quern
