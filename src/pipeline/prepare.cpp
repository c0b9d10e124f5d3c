// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "base/units.h"
#include "format/checkpoint.h"
#include "format/derived_checkpoint.h"
#include "format/gguf_config.h"
#include "format/merged_modules.h"
#include "format/output_format.h"
#include "pipeline/calibration_input.h"
#include "pipeline/manifest.h"
#include "pipeline/output.h"
#include "pipeline/planner.h"
#include "pipeline/quantize.h"
#include "pipeline/tables.h"
#include "plan/recipes.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <optional>
#include <system_error>
#include <utility>

// A run before anything is rounded: what is asked for becomes a plan, and what cannot be done is
// said.
namespace quern {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kMostShards = 500;  // all are open at once

void check_bits(const QuantPlan& plan) {
  for (const PlannedLinear& linear : plan.linears) {
    if (linear.keep()) {
      continue;
    }
    const Method* method = find_method(linear.method);
    if (method == nullptr) {
      std::string known;
      for (const Method& each : methods()) {
        known += (known.empty() ? "" : ", ") + std::string(each.name);
      }
      throw UsageError(
          "unknown method", linear.method, "expected one of " + known, "--method gptq");
    }
    if (linear.scheme.bits < method->min_bits || linear.scheme.bits > method->max_bits) {
      throw UsageError(
          "a width that the method does not define",
          linear.name,
          fmt::format(
              "{} takes {} to {} bits, found {}",
              method->name,
              method->min_bits,
              method->max_bits,
              linear.scheme.bits),
          "choose another --bits or --method");
    }
  }
}

// Linears whose sizes do not fill the format's words stay in 16 bits, with the reason in the plan.
// A scheme that the format holds in no size is refused by the caller's own check.
void keep_odd_shapes(
    const Context& ctx,
    const OutputFormat& format,
    const QuantizeOptions& options,
    const ModelGraph& graph,
    QuantPlan& plan) {
  constexpr std::int64_t kWholeWords = 4096;
  PlannedLinear every;
  every.name = "every linear";
  every.out_features = kWholeWords;
  every.in_features = kWholeWords * std::max<std::int64_t>(1, options.scheme.group_size);
  every.method = options.method;
  every.scheme = options.scheme;
  every.activation = options.activation;
  format.check(output_module(every, format, graph));
  std::int64_t kept = 0;
  std::map<std::string, std::string> partners;  // engines' module -> the first of its odd parts
  for (PlannedLinear& linear : plan.linears) {
    if (linear.keep() || linear.is_table()) {
      continue;  // a table was asked for by itself: what cannot be held is refused below
    }
    try {
      format.check(output_module(linear, format, graph));
    } catch (const UnsupportedError& error) {
      linear.method = "keep";
      linear.reason = error.failed() + ": " + error.reason();
      partners.emplace(merged_name(linear.name), linear.name);
      ++kept;
    }
  }
  for (PlannedLinear& linear : plan.linears) {
    const auto odd = partners.find(merged_name(linear.name));
    if (!linear.keep() && odd != partners.end()) {
      linear.method = "keep";
      linear.reason = "engines hold it as one with " + odd->second + ", which stays in 16 bits";
      ++kept;
    }
  }
  if (kept > 0) {
    ctx.log.warning(fmt::format(
        "{} of {} linears stay in 16 bits: {} cannot hold their sizes (quern plan lists them)",
        kept,
        std::count_if(
            plan.linears.begin(),
            plan.linears.end(),
            [](const PlannedLinear& linear) { return !linear.is_table(); }),
        format.name));
  }
}

bool head_is_copy(const PreparedRun& run) {
  const TensorView* head = run.source->tensors().find("lm_head.weight");
  const TensorView* table = run.source->tensors().find(run.graph.embedding.weight());
  return run.graph.head_tied && head != nullptr && table != nullptr &&
         head->dtype == table->dtype && head->shape == table->shape &&
         std::equal(
             head->bytes.begin(), head->bytes.end(), table->bytes.begin(), table->bytes.end());
}

// What is said before hours of work and not after.
void check_other_formats(const PreparedRun& run, const std::vector<std::string>& also) {
  for (const std::string& name : also) {
    const OutputFormat& other = find_output_format(name);
    if (run.format->is_gguf || other.is_gguf) {
      throw UnsupportedError(
          "GGUF has grids of its own",
          "--also " + name,
          "expected formats that share a grid: gptq, gptq_v2, awq, compressed-tensors, quern",
          "a run of its own for GGUF");
    }
    for (const PlannedLinear& linear : run.plan.linears) {
      if (!linear.keep()) {
        other.check(output_module(linear, other, run.graph));
      }
    }
  }
}

// Whether a linear takes more than how large its inputs are.
bool needs_activations(
    const QuantPlan& plan, const PlannedLinear& linear, const MethodOptions& options) {
  const Method& method = *find_method(linear.method);
  return linear.hot_rows > 0 || !plan.transform.empty() || options.mismatch_target ||
         method.needs_reference || (linear.activation.active() && !linear.activation.dynamic);
}

// Whether a search needs to know which inputs are large.
bool weighs_columns(RangeSearch range) {
  return range == RangeSearch::kWeighted || range == RangeSearch::kOutput;
}

// Grids of free scales become the block types of GGUF: the type that --format names, else that of
// the width; a type that its blocks do not fit becomes what llama.cpp takes in its place.
void choose_ggml_types(const QuantizeOptions& options, const ModelGraph& graph, QuantPlan& plan) {
  const std::size_t colon = options.format.find(':');
  for (PlannedLinear& linear : plan.linears) {
    if (linear.keep() || linear.scheme.ggml) {
      continue;
    }
    if (linear.hot_rows > 0) {
      throw UnsupportedError(
          "GGUF has one type for a table",
          linear.name,
          "expected all rows alike, found frequent tokens with more bits",
          "--embedding-bits 8, or --format quern");
    }
    const GgmlType type = colon != std::string::npos && !linear.is_table()
                              ? rounded_ggml_type(options.format.substr(colon + 1))
                              : ggml_type_of_bits(linear.scheme.bits);
    linear.scheme = ggml_scheme(fitting_ggml_type(type, gguf_columns_together(graph, linear)));
  }
}

// Formats that know one scheme for all linears leave nothing to plan.
void refuse_one_scheme(const QuantizeOptions& options, const PreparedRun& run) {
  std::vector<std::string> names = options.also;
  names.emplace_back(run.format->name);
  for (const std::string& name : names) {
    const OutputFormat& format = find_output_format(name);
    if (format.is_gguf) {
      continue;
    }
    std::vector<OutputModule> modules;
    for (PlannedLinear linear : run.plan.linears) {
      if (!linear.is_table()) {
        linear.scheme.bits = 4;
        linear.scheme.group_size = linear.layer == 0 ? 64 : 128;
        modules.push_back(output_module(linear, format, run.graph));
      }
    }
    try {
      (void)format.config(
          {4, run.plan.linears.front().scheme.symmetric, 128, {}}, modules, Json::object());
    } catch (const UnsupportedError& error) {
      throw UnsupportedError(
          "nothing to plan in this format",
          "--format " + name,
          fmt::format("{} has one scheme for all linears", name),
          "--format compressed-tensors, gptq, gguf or quern; or --bits for all");
    }
  }
}

// From the file, for the budget, or every linear alike.
void make_plan(const Context& ctx, const QuantizeOptions& options, PreparedRun& run) {
  const bool from_file = !options.plan_file.empty();
  if (from_file) {
    run.plan = read_plan(read_json(options.plan_file), options.plan_file.string(), run.graph);
  } else {
    run.plan = uniform_plan(run.graph, options.method, options.scheme, options.tables);
    run.plan.transform = options.transform;
    if (options.experts_only) {
      keep_all_but_experts(run.graph, run.plan);
    }
    for (PlannedLinear& linear : run.plan.linears) {
      if (!linear.is_table()) {
        linear.range = range_for(linear.role, options.method_options.range);
        linear.activation = options.activation;
      }
    }
  }
  if (run.format->is_gguf) {
    choose_ggml_types(options, run.graph, run.plan);
  }
  check_bits(run.plan);
  resolve_hot_rows(run.source->directory(), !from_file, run.plan);
  if (options.planning.budget.given()) {
    refuse_one_scheme(options, run);
    plan_for_budget(ctx, options, run);
  } else if (!from_file && !run.format->is_gguf) {
    keep_odd_shapes(ctx, *run.format, options, run.graph, run.plan);
  }
}

}  // namespace

std::uint64_t output_bytes(const PreparedRun& run) {
  if (run.gguf) {
    return run.gguf->layout.bytes;
  }
  return run.layout.total_bytes() - run.layout.index.size();
}

PreparedRun prepare_quantize(const Context& ctx, const QuantizeOptions& options) {
  PreparedRun run;
  run.format = &find_output_format(options.format);
  run.source = with_plain_weights(open_checkpoint(options.model));
  if (run.source->format() != "dense") {
    throw UnsupportedError(
        "the model is quantized already",
        options.model.string(),
        "found the format " + run.source->format(),
        "start from the BF16 release");
  }
  run.graph = build_graph(*run.source);
  check_tensors(run.graph, *run.source);
  if (options.planning.budget.given()) {
    refuse_sparse_and_linear(run.graph, options.model);  // gradients know dense blocks only
  }
  run.head_is_copy = head_is_copy(run);
  if (run.format->is_gguf) {
    (void)gguf_architecture(run.graph);  // refuses what readers would compute differently
  }
  make_plan(ctx, options, run);
  run.needs_calibration = !options.calibration.files.empty() || !options.imatrix_output.empty();
  for (const PlannedLinear& linear : run.plan.linears) {
    if (!linear.keep()) {
      run.format->check(output_module(linear, *run.format, run.graph));
      const bool needs_text = needs_activations(run.plan, linear, options.method_options);
      if (needs_text && !options.imatrix.empty()) {
        throw UsageError(
            "an importance matrix is not enough",
            linear.name,
            "channel factors, mismatch targets, static scales and tables of mixed rows need text",
            "--calibration instead of --imatrix, or --method rtn, gptq");
      }
      const bool weighs = find_method(linear.method)->needs_statistics ||
                          weighs_columns(linear.range.value_or(options.method_options.range));
      run.needs_calibration =
          run.needs_calibration || needs_text || (weighs && options.imatrix.empty());
    }
  }
  if (std::all_of(run.plan.linears.begin(), run.plan.linears.end(), [](const auto& linear) {
        return linear.keep();
      })) {
    const bool from_file = !options.plan_file.empty();
    throw UsageError(
        "the plan quantizes nothing",
        from_file ? options.plan_file.string() : "--format " + options.format,
        "every linear is kept: " + run.plan.linears.front().reason,
        from_file ? "give at least one linear a method"
                  : "--group-size channel, or another format");
  }
  check_other_formats(run, options.also);
  if (run.format->is_gguf) {
    run.gguf =
        plan_gguf_output(*run.source, run.graph, run.plan, model_name(run.source->directory()));
  } else {
    (void)output_config(run, Json::object());  // refuses what the format cannot say
    run.declarations = declare_output(run);
    SafetensorsOptions layout;
    layout.max_file_bytes = options.shard_bytes;
    run.layout = plan_safetensors(run.declarations, layout);
  }
  if (unties_table(run) && run.source->tensors().find("lm_head.weight") != nullptr &&
      !run.head_is_copy) {
    throw UnsupportedError(
        "a head that is no copy of the table that it is tied to",
        "lm_head.weight",
        "config.json ties them, and the file holds two different ones",
        "set tie_word_embeddings to false in config.json if both are meant");
  }
  if (run.layout.files.size() > kMostShards) {
    throw UsageError(
        "too many weight files",
        fmt::format("--shard-size {}", options.shard_bytes),
        fmt::format("at most {} expected, there would be {}", kMostShards, run.layout.files.size()),
        "--shard-size 5GB");
  }
  const CalibrationExtent extent = calibration_extent(options.calibration);
  run.estimate = estimate_run(
      ctx,
      run.graph,
      run.plan,
      options.method_options,
      options.imatrix.empty() ? extent.samples : 0,
      extent.length,
      run.needs_calibration || !options.imatrix.empty());
  return run;
}

Json predicted_json(const PreparedRun& run) {
  const std::uint64_t bytes = output_bytes(run);
  const std::optional<double> loss = predicted_loss(run.plan);
  return {
      {"bits_per_weight", bits_per_weight(bytes, parameters_of(*run.source))},
      {"bytes", bytes},
      {"peak_rss_bytes", run.estimate.peak()},
      {"spilled_bytes", run.estimate.spilled},
      {"seconds", run.estimate.seconds},
      {"kl", loss ? Json(*loss) : Json(nullptr)}};
}

std::string describe_plan(const PreparedRun& run, const QuantizeOptions& options) {
  const Estimate& e = run.estimate;
  const auto human = [](std::uint64_t bytes) { return human_bytes(static_cast<double>(bytes)); };
  const std::int64_t parameters = parameters_of(*run.source);
  const std::uint64_t bytes = output_bytes(run);
  std::int64_t quantized = 0;
  std::int64_t linears = 0;
  for (const PlannedLinear& linear : run.plan.linears) {
    if (!linear.keep()) {
      quantized += linear.out_features * linear.in_features;
      ++linears;
    }
  }
  std::error_code code;
  const auto space = fs::space(fs::absolute(options.output, code).parent_path(), code);
  std::string text;
  text += fmt::format(
      "Model    {}  {} layers, {:.1f} M parameters, {} in {} file(s)\n",
      run.graph.config.architecture.empty() ? run.graph.config.family
                                            : run.graph.config.architecture,
      run.graph.config.layers,
      static_cast<double>(parameters) / 1e6,
      human(tensor_bytes(*run.source)),
      weight_files(run.source->directory()).size());
  text += fmt::format(
      "Target   {} in {} file(s), {:.3f} bits per weight; {} linears of {:.1f} M weights rounded, "
      "the rest kept as it is\n",
      human(bytes),
      run.gguf ? 1 : run.layout.files.size(),
      bits_per_weight(bytes, parameters),
      linears,
      static_cast<double>(quantized) / 1e6);
  text += fmt::format(
      "Memory   {} = weights {} + statistics {} + residual stream {} + between sites {} + scratch "
      "{}\n",
      human(e.peak()),
      human(e.weights),
      human(e.statistics),
      human(e.residual),
      human(e.carried),
      human(e.scratch));
  text += fmt::format(
      "Disk     {} for the result + {} for spilled activations{}\n",
      human(bytes),
      human(e.spilled),
      code ? "" : ", free " + human(space.available));
  text += fmt::format(
      "Time     about {} on {}\n",
      human_duration(e.seconds),
      "this machine (measured rate x work)");
  return text;
}

}  // namespace quern
