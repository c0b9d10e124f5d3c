// SPDX-License-Identifier: Apache-2.0
#include "pipeline/quantize.h"

#include "base/error.h"
#include "base/file.h"
#include "base/process.h"
#include "base/units.h"
#include "format/checkpoint.h"
#include "format/gguf_names.h"
#include "format/imatrix.h"
#include "format/safetensors.h"
#include "format/side_files.h"
#include "kernels/blas.h"
#include "kernels/kernels.h"
#include "nn/decoder.h"
#include "pipeline/calibration_input.h"
#include "pipeline/gguf_output.h"
#include "pipeline/hazards.h"
#include "pipeline/manifest.h"
#include "pipeline/output.h"
#include "pipeline/planner.h"
#include "pipeline/run_paths.h"
#include "pipeline/run_state.h"
#include "pipeline/source_card.h"
#include "pipeline/staging.h"
#include "pipeline/tables.h"
#include "plan/recipes.h"
#include "quant/activation.h"
#include "quern/version.h"
#include "report/report.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <set>
#include <system_error>
#include <utility>

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
  for (PlannedLinear& linear : plan.linears) {
    if (linear.keep() || linear.is_table()) {
      continue;  // a table was asked for by itself: what cannot be held is refused below
    }
    try {
      format.check(output_module(linear, format, graph));
    } catch (const UnsupportedError& error) {
      linear.method = "keep";
      linear.reason = error.failed() + ": " + error.reason();
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

// What a format does to numbers: what all linears share, or else what it does to any.
StorageRules common_storage(const PreparedRun& run, const OutputFormat& format) {
  const DType source = run.graph.config.dtype;
  std::optional<StorageRules> common;
  for (const PlannedLinear& linear : run.plan.linears) {
    if (linear.keep()) {
      continue;
    }
    const StorageRules own = format.storage(source, output_module(linear, format, run.graph));
    if (common.value_or(own) != own) {
      return format.storage(source, OutputModule());
    }
    common = own;
  }
  return common.value_or(format.storage(source, OutputModule()));
}

// Numbers that all of the formats hold. Every BF16 in the range of scales is an F16, and every F16
// an F32.
StorageRules joint_storage(const PreparedRun& run, const std::vector<std::string>& also) {
  StorageRules joint = common_storage(run, *run.format);
  for (const std::string& name : also) {
    const StorageRules other = common_storage(run, find_output_format(name));
    joint.minimum_zero_one = joint.minimum_zero_one || other.minimum_zero_one;
    const bool narrower = joint.scale_dtype == DType::kF32 || other.scale_dtype == DType::kBF16;
    joint.scale_dtype = narrower ? other.scale_dtype : joint.scale_dtype;
  }
  return joint;
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

// Static scales of activations are known when every linear was rounded.
void settle_static_scales(const PartSource& parts, const ModelGraph& graph, QuantPlan& plan) {
  if (std::all_of(plan.linears.begin(), plan.linears.end(), [](const PlannedLinear& linear) {
        return linear.activation.dynamic;
      })) {
    return;
  }
  for (const std::string& part : all_parts(graph)) {
    for (const QuantizedLinear& done : parts(part).linears) {
      plan.linears[static_cast<std::size_t>(done.plan - plan.linears.data())].activation =
          done.activation;
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

Json options_json(const QuantizeOptions& options) {
  const MethodOptions& method = options.method_options;
  return {
      {"recipe", options.recipe},
      {"method", options.method},
      {"bits", options.scheme.bits},
      {"group_size", options.scheme.group_size == 0 ? -1 : options.scheme.group_size},
      {"symmetric", options.scheme.symmetric},
      {"order", order_name(method.order)},
      {"range", range_name(method.range)},
      {"damping", method.damping},
      {"descent_sweeps", method.descent_sweeps},
      {"refit_rounds", method.refit_rounds},
      {"restarts", method.restarts},
      {"mismatch_target", method.mismatch_target},
      {"asymmetry", method.asymmetry},
      {"activation",
       options.activation.active() ? activation_json(options.activation) : Json(nullptr)},
      {"transform", options.transform.empty() ? "none" : options.transform},
      {"embedding_bits", options.tables.embedding_bits},
      {"frequent_tokens", options.tables.frequent_tokens},
      {"head_bits", options.tables.head_bits},
      {"format", options.format},
      {"also", options.also},
      {"shard_bytes", options.shard_bytes}};
}

bool is_gguf_file(const fs::path& output) {
  return output.extension() == ".gguf";
}

// The file in the staging directory: the output's own name, or one inside of its directory.
fs::path gguf_file_name(const fs::path& output) {
  return is_gguf_file(output) ? output.filename() : fs::path(kGgufInDirectory);
}

// Where the manifest of a finished result stands.
fs::path manifest_path(const fs::path& output) {
  return is_gguf_file(output) ? beside(output, ".manifest.json") : output / kManifestName;
}

// Grids of free scales become the block types of GGUF: the type that --format names, else that of
// the width; a type that its blocks do not fit becomes what llama.cpp takes in its place.
void choose_ggml_types(const QuantizeOptions& options, QuantPlan& plan) {
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
    linear.scheme = ggml_scheme(fitting_ggml_type(type, linear.in_features));
  }
}

// Everything that decides the bytes of the result. The files of the source are known by name, size
// and header, which holds every name, type, shape and offset.
Json fingerprint_of(
    const Context& ctx,
    const PreparedRun& run,
    const QuantizeOptions& options,
    const CalibrationSet& calibration) {
  Json files = Json::array();
  for (const fs::path& path : weight_files(run.source->directory())) {
    const auto time = fs::last_write_time(path).time_since_epoch().count();
    files.push_back(
        {{"name", path.filename().string()}, {"bytes", fs::file_size(path)}, {"written", time}});
  }
  return {
      {"schema", "quern.state/1"},
      {"program", fmt::format("{} {}", kVersion, kCommit)},
      {"arithmetic", fmt::format("{}; {}", ctx.kernels.isa, ctx.blas.description())},
      {"source", std::move(files)},
      {"config", run.source->config()},
      {"options", options_json(options)},
      {"plan", plan_linears_json(run.plan)},
      {"calibration", calibration.sha256},
      {"seed", ctx.seed}};
}

// What stands at `output`, if it is the whole result of the run with this fingerprint.
std::optional<Json> finished_manifest(const fs::path& output, const std::string& fingerprint) {
  const fs::path path = manifest_path(output);
  const fs::path folder = is_gguf_file(output) ? output.parent_path() : output;
  if (!fs::exists(path)) {
    return std::nullopt;
  }
  try {
    Json manifest = read_json(path);
    const JsonReader reader(manifest, path.string());
    if (reader.get_string_or("fingerprint", "") != fingerprint) {
      return std::nullopt;
    }
    for (const Json& entry : reader.get_array("files")) {
      const JsonReader file(entry, path.string());
      std::error_code code;
      const auto size = fs::file_size(folder / file.get_string("name"), code);
      if (code || size != static_cast<std::uint64_t>(file.get_int("size"))) {
        return std::nullopt;
      }
    }
    return manifest;
  } catch (const Error&) {
    return std::nullopt;  // whatever it is, it is not ours
  }
}

// What an earlier run left in the staging directory is ours to take; anything else is not.
void refuse_foreign_staging(const RunPaths& paths) {
  std::error_code code;
  if (!RunState::is_started(paths.work) && fs::exists(paths.staging, code) &&
      !fs::is_empty(paths.staging, code)) {
    throw UsageError(
        "a directory is in the way",
        paths.staging.string(),
        "the result is put together there, and it holds files of something else",
        "move it away, or choose another output");
  }
}

CalibrationState initial_state(
    const Context& ctx,
    const PreparedRun& run,
    const CalibrationSet& calibration,
    bool two_streams,
    const std::shared_ptr<const QuantizedMatrix>& rounded_embedding,
    const fs::path& spill) {
  std::vector<std::int64_t> rows;
  for (const auto& sequence : calibration.sequences) {
    rows.push_back(static_cast<std::int64_t>(sequence.size()));
  }
  const ModelConfig& config = run.graph.config;
  const fs::path where = run.estimate.spill_residual ? spill : fs::path();
  CalibrationState state{ActivationStore(config.hidden_size, rows, where), std::nullopt, {}, 0};
  if (two_streams) {
    state.reference.emplace(config.hidden_size, rows, where);
  }
  LinearWeights embedding = load_linear_weights(run.graph.embedding, *run.source);
  const LinearWeights original = embedding;
  embedding.quantized = rounded_embedding;
  const std::int64_t count = state.x.count();
  std::vector<std::int64_t> held;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::vector<float> x =
        embed_tokens(ctx.kernels, embedding, calibration.sequences[static_cast<std::size_t>(i)]);
    state.x.write(i, x.data());
    if (state.reference) {
      const std::vector<float> exact =
          embed_tokens(ctx.kernels, original, calibration.sequences[static_cast<std::size_t>(i)]);
      state.reference->write(i, exact.data());
    }
    (is_holdout(i, count) ? held : state.order).push_back(i);
  }
  state.holdout_count = static_cast<std::int64_t>(held.size());
  state.order.insert(state.order.end(), held.begin(), held.end());
  run.source->tensors().release(embedding.dense);
  return state;
}

bool rounds_head(const PreparedRun& run) {
  const PlannedLinear* head = run.plan.find(run.graph.head.module);
  return !run.graph.head_tied && head != nullptr && !head->keep();
}

// Rounds (or takes from the work directory) every part; what each linear became stays on disk.
PartTimes quantize_blocks(
    const Context& ctx,
    const PreparedRun& run,
    const MethodOptions& method_options,
    const CalibrationSet& calibration,
    const std::optional<Imatrix>& imatrix,
    const RunState& state) {
  BlockQuantizer quantizer(
      ctx,
      run.graph,
      run.source->tensors(),
      run.plan,
      method_options,
      run.estimate.spill_carried ? state.directory() : fs::path());
  Progress progress(ctx.log, run.estimate.work);
  const auto embedding = state.load(kEmbeddingPart, run.plan);
  const QuantizedBlock table =
      embedding ? *embedding : quantize_embedding(ctx, run, calibration, method_options);
  if (!embedding) {
    state.save(kEmbeddingPart, table);
  }
  // A table alone takes the tokens of the text and nothing of what the model makes of them.
  const bool beyond_table =
      std::any_of(run.plan.linears.begin(), run.plan.linears.end(), [](const PlannedLinear& each) {
        return !each.keep() && each.role != Role::kEmbedding;
      });
  std::optional<CalibrationState> activations;
  if (run.needs_calibration && beyond_table) {
    activations.emplace(initial_state(
        ctx,
        run,
        calibration,
        needs_reference(run.plan, method_options),
        table.linears.empty() ? nullptr : table.linears.front().matrix,
        state.directory()));
  }
  // Blocks done before are run through again, and only as far as one is left to do.
  std::size_t left = run.graph.blocks.size();
  std::vector<bool> saved;
  for (const Block& block : run.graph.blocks) {
    saved.push_back(state.load(block_part(block), run.plan).has_value());
  }
  for (std::size_t i = 0; i < run.graph.blocks.size(); ++i) {
    left = saved[i] ? left : i + 1;
  }
  const bool head_left = !state.load(kHeadPart, run.plan).has_value();
  if (std::all_of(saved.begin(), saved.end(), [](bool done) { return done; })) {
    left = head_left && rounds_head(run) ? run.graph.blocks.size() : 0;
  } else if (rounds_head(run)) {
    left = run.graph.blocks.size();
  }
  for (std::size_t i = 0; i < left; ++i) {
    const Block& block = run.graph.blocks[i];
    BlockWeights weights = load_block_weights(block, *run.source);
    if (saved[i]) {
      const BlockWeights original = weights;
      install(block, *state.load(block_part(block), run.plan), weights);
      if (activations) {
        quantizer.advance(block, original, weights, *activations, progress);
      }
    } else {
      const QuantizedBlock done =
          activations
              ? quantizer.run(block, weights, *activations, progress)
              : quantizer.run_data_free(block, weights, imatrix ? &*imatrix : nullptr, progress);
      state.save(block_part(block), done);
      const std::vector<QuantizedLinear>& linears = done.linears;
      for (const QuantizedLinear& linear : linears) {
        if (linear.report.fallback) {
          ctx.log.warning(fmt::format(
              "{}: {} instead of {}: {}",
              linear.plan->name,
              linear.report.method,
              linear.plan->method,
              *linear.report.fallback));
        }
      }
      const double mean = linears.empty() ? 0.0
                                          : std::accumulate(
                                                linears.begin(),
                                                linears.end(),
                                                0.0,
                                                [](double sum, const QuantizedLinear& l) {
                                                  return sum + l.report.relative_error;
                                                }) /
                                                static_cast<double>(linears.size());
      ctx.log.detail(fmt::format(
          "layer {}/{}  mean relative error {:.3e}", i + 1, run.graph.blocks.size(), mean));
    }
    release_block_weights(weights, *run.source);
  }
  if (head_left) {
    state.save(
        kHeadPart, quantize_head(ctx, run, activations ? &*activations : nullptr, method_options));
  }
  progress.finish();
  return quantizer.times();
}

// Rates in multiply-adds a CPU second, beside the best that one core reaches in a plain product.
Json timing_json(const PartTimes& times, double rate_per_core) {
  const auto part = [&](const PartTime& time) -> Json {
    const double rate = time.cpu_seconds > 0 ? time.work / time.cpu_seconds : 0;
    return {
        {"seconds", time.seconds},
        {"cpu_seconds", time.cpu_seconds},
        {"gflops_per_cpu_second", 2e-9 * rate},
        {"share_of_gemm_rate", rate_per_core > 0 ? rate / rate_per_core : 0}};
  };
  return {
      {"gemm_gflops_per_core", 2e-9 * rate_per_core},
      {"second_moments", part(times.gather)},
      {"rounding", part(times.round)},
      {"forward", part(times.apply)}};
}

Json kept_json(const PreparedRun& run) {
  std::set<std::string> replaced;
  for (const PlannedLinear& linear : run.plan.linears) {
    if (!linear.keep()) {
      replaced.insert(linear.name + ".weight");
    }
  }
  Json kept = Json::array();
  for (const auto& [name, view] : run.source->tensors().tensors()) {
    if (replaced.contains(name) || is_copy_of_table(run, name)) {
      continue;
    }
    std::string reason = "norm or bias";
    if (name == run.graph.embedding.weight()) {
      reason = run.graph.head_tied ? "embedding, tied with the head" : "embedding";
    } else if (name == run.graph.head.module + ".weight") {
      reason = "head";
    } else if (
        run.plan.find(name.substr(0, name.rfind('.'))) != nullptr && name.ends_with(".weight")) {
      reason = "the plan keeps it";
    }
    kept.push_back(
        {{"name", name},
         {"dtype", dtype_name(view.dtype)},
         {"bytes", view.bytes.size()},
         {"reason", reason}});
  }
  return kept;
}

Json calibration_json(const CalibrationSet& calibration) {
  return {
      {"samples", calibration.sequences.size()},
      {"tokens", calibration.tokens()},
      {"length", calibration.sequences.empty() ? 0 : calibration.sequences.front().size()},
      {"sha256", calibration.sha256},
      {"sources", calibration.sources}};
}

Json planning_json(const PlanRecord& planning) {
  if (planning.budget.is_null()) {
    return nullptr;
  }
  return {
      {"budget", planning.budget},
      {"constraints", planning.constraints},
      {"additivity", planning.additivity ? additivity_json(*planning.additivity) : Json(nullptr)},
      {"seconds", planning.seconds}};
}

std::uint64_t layout_bytes(const PreparedRun& run) {
  if (run.gguf) {
    return run.gguf->layout.bytes;
  }
  return run.layout.total_bytes() - run.layout.index.size();
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
    for (PlannedLinear& linear : run.plan.linears) {
      if (!linear.is_table()) {
        linear.range = range_for(linear.role, options.method_options.range);
        linear.activation = options.activation;
      }
    }
  }
  if (run.format->is_gguf) {
    choose_ggml_types(options, run.plan);
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

PreparedRun prepare_quantize(const Context& ctx, const QuantizeOptions& options) {
  PreparedRun run;
  run.format = &find_output_format(options.format);
  run.source = open_checkpoint(options.model);
  if (run.source->format() != "dense") {
    throw UnsupportedError(
        "the model is quantized already",
        options.model.string(),
        "found the format " + run.source->format(),
        "start from the BF16 release");
  }
  run.graph = build_graph(*run.source);
  check_tensors(run.graph, *run.source);
  refuse_sparse_and_linear(run.graph, options.model);
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
      !is_copy_of_table(run, "lm_head.weight")) {
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
  const std::uint64_t bytes = layout_bytes(run);
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
  const std::uint64_t bytes = layout_bytes(run);
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

namespace {

// As much of the calibration as an importance matrix tells, for the manifest and the fingerprint.
CalibrationSet calibration_of(const Imatrix& imatrix, const fs::path& path) {
  CalibrationSet set;
  set.sha256 = sha256_of_file(path);
  set.sources = imatrix.datasets;
  set.sources.push_back(path.filename().string());
  return set;
}

void check_imatrix(const Imatrix& imatrix, const ModelGraph& graph, const fs::path& path) {
  int known = 0;
  for (const Block& block : graph.blocks) {
    for (const Linear& linear : block.linears) {
      const auto name = gguf_tensor_name(linear.weight());
      const auto entry = name ? imatrix.entries.find(*name) : imatrix.entries.end();
      if (entry == imatrix.entries.end()) {
        continue;
      }
      ++known;
      const std::size_t width = entry->second.sums.size();
      if (width != static_cast<std::size_t>(linear.in_features)) {
        throw UsageError(
            "an importance matrix of another model",
            "--imatrix " + path.string() + ", " + *name,
            fmt::format("expected {} columns, found {}", linear.in_features, width),
            "make one of this model with quern quantize --imatrix-out, or with llama.cpp");
      }
    }
  }
  if (known == 0) {
    throw UsageError(
        "an importance matrix of another model",
        "--imatrix " + path.string(),
        "it names none of the linears",
        "make one of this model with quern quantize --imatrix-out, or with llama.cpp");
  }
}

bool is_imatrix(const fs::path& file) {
  try {
    (void)read_imatrix(file);
    return true;
  } catch (const Error&) {
    return false;
  }
}

void write_imatrix_of(
    const PartSource& parts,
    const ModelGraph& graph,
    const CalibrationSet& calibration,
    const fs::path& path) {
  Imatrix imatrix;
  for (const std::string& part : all_parts(graph)) {
    for (const InputSquares& inputs : parts(part).inputs) {
      if (const auto name = gguf_tensor_name(inputs.name + ".weight")) {
        imatrix.entries[*name] = {inputs.sums, {static_cast<float>(inputs.rows)}};
      }
    }
  }
  if (imatrix.entries.empty()) {
    throw UsageError(
        "no inputs were seen",
        "--imatrix-out " + path.string(),
        "the plan rounds no linear of a block, so the text went no further than the embedding",
        "leave out --imatrix-out");
  }
  imatrix.datasets = calibration.sources;
  imatrix.chunks = static_cast<std::int64_t>(calibration.sequences.size());
  imatrix.chunk_size = static_cast<std::int64_t>(calibration.sequences.front().size());
  write_imatrix(path, imatrix);
}

}  // namespace

Json quantize(const Context& ctx, const QuantizeOptions& options) {
  const double started = steady_seconds();
  PreparedRun run = prepare_quantize(ctx, options);
  const RunPaths paths =
      resolve_run_paths(options.output, options.work_directory, run.source->directory());
  if (!options.imatrix_output.empty()) {
    prepare_side_output(
        options.imatrix_output,
        "--imatrix-out",
        {paths.output, paths.staging, paths.work},
        is_imatrix);
  }
  ctx.log.info(describe_plan(run, options));
  if (unties_table(run)) {
    ctx.log.warning(fmt::format(
        "{} is untied from the head: {} cannot tie a packed table, so it is written twice",
        run.graph.embedding.module,
        run.format->name));
  }
  CalibrationSet calibration;
  if (run.needs_calibration) {
    calibration = load_calibration(options.calibration, run, ctx.seed);
    const CalibrationExtent asked = calibration_extent(options.calibration);
    const auto sequences = static_cast<std::int64_t>(calibration.sequences.size());
    const auto length = static_cast<std::int64_t>(calibration.sequences.front().size());
    if (sequences < asked.samples || length != asked.length) {
      ctx.log.info(fmt::format("calibration: {} sequences, all that the text holds", sequences));
      run.estimate =
          estimate_run(ctx, run.graph, run.plan, options.method_options, sequences, length, true);
    }
  }
  std::optional<Imatrix> imatrix;
  if (!options.imatrix.empty()) {
    imatrix = read_imatrix(options.imatrix);
    calibration = calibration_of(*imatrix, options.imatrix);
    check_imatrix(*imatrix, run.graph, options.imatrix);
  }
  MethodOptions method_options = options.method_options;
  method_options.storage = joint_storage(run, options.also);
  // File names need not be UTF-8; JSON is.
  const std::string fingerprint_text = fingerprint_of(ctx, run, options, calibration)
                                           .dump(-1, ' ', false, Json::error_handler_t::replace);
  Sha256 hash;
  hash.update(fingerprint_text);
  const std::string fingerprint_hash = hash.hex();
  const auto finished = [&]() -> std::optional<Json> {
    auto manifest =
        options.resume ? finished_manifest(paths.output, fingerprint_hash) : std::optional<Json>();
    if (manifest) {
      if (!options.imatrix_output.empty() && !fs::exists(options.imatrix_output)) {
        throw UsageError(
            "the run is finished, and what it knew of the inputs is gone",
            "--imatrix-out " + options.imatrix_output.string(),
            options.output.string() + " holds the finished result of this run already",
            "--no-resume --force makes it again");
      }
      ctx.log.info(
          fmt::format("{} holds the finished result of this run already", options.output.string()));
    } else {
      refuse_occupied(paths.output, options.force);
    }
    return manifest;
  };
  const Json fingerprint = parse_json(fingerprint_text, "fingerprint");
  if (const auto manifest = finished()) {
    RunState::remove_leftover(paths.work, fingerprint);
    return *manifest;
  }
  refuse_foreign_staging(paths);
  const RunState state(paths.work, fingerprint, options.resume);
  const DirectoryLock staging_lock(paths.staging);
  if (const auto manifest = finished()) {
    state.remove();
    return *manifest;  // another run has just made it
  }
  for (const auto& entry : fs::directory_iterator(paths.staging)) {
    fs::remove_all(entry.path());
  }
  check_disk(run.gguf ? layout_bytes(run) : run.layout.total_bytes(), paths.staging);
  if (state.blocks_saved() > 0) {
    ctx.log.info(fmt::format(
        "resuming: {} of {} blocks are done", state.blocks_saved(), run.graph.blocks.size()));
  }
  const PartTimes times = quantize_blocks(ctx, run, method_options, calibration, imatrix, state);

  const PartSource parts = [&](const std::string& part) {
    auto done = state.load(part, run.plan);
    if (!done) {
      throw Error(
          ErrorKind::kFailed,
          "a finished part cannot be read back",
          state.directory().string(),
          part,
          "check the disk and run the same command again");
    }
    return std::move(*done);
  };
  settle_static_scales(parts, run.graph, run.plan);
  if (!options.imatrix_output.empty()) {
    write_imatrix_of(parts, run.graph, calibration, options.imatrix_output);
  }
  const fs::path& staging = paths.staging;
  const Json meta = {
      {"options", options_json(options)},
      {"seed", ctx.seed},
      {"calibration_sha256", calibration.sha256}};
  SideFiles side_files;
  if (run.gguf) {
    write_gguf_output(run, parts, staging / gguf_file_name(paths.output));
  } else {
    write_output(run, parts, meta, staging);
    side_files = copy_side_files(run.source->directory(), staging);
  }
  const Census census =
      verify_output(ctx, run, parts, run.gguf ? staging / gguf_file_name(paths.output) : staging);

  Json linears = Json::array();
  Json transforms = Json::array();
  for (const std::string& part : all_parts(run.graph)) {
    const QuantizedBlock done = parts(part);
    for (const QuantizedLinear& linear : done.linears) {
      linears.push_back(report_json(linear));
    }
    for (const Json& entry : done.transforms) {
      transforms.push_back(entry);
    }
  }
  const std::int64_t parameters = parameters_of(*run.source);
  const Json output_files = files_json(staging);
  const std::uint64_t bytes = total_size(output_files);
  const ProcessUsage usage = process_usage();
  Json manifest = {
      {"schema", "quern.quantize/1"},
      {"program", program_json(ctx)},
      {"output", paths.output.filename().string()},
      {"source", source_json(*run.source, parameters)},
      {"format", options.format},
      {"recipe", options.recipe},
      {"method", options.method},
      {"bits_per_weight", bits_per_weight(bytes, parameters)},
      {"bytes", bytes},
      {"parameters", parameters},
      {"seconds", steady_seconds() - started},
      {"cpu_seconds", usage.cpu_seconds},
      {"peak_rss_bytes", usage.peak_rss_bytes},
      {"peak_anonymous_bytes", usage.peak_anonymous_bytes},
      {"seed", ctx.seed},
      {"options", options_json(options)},
      {"calibration", calibration_json(calibration)},
      {"linears", std::move(linears)},
      {"transforms", std::move(transforms)},
      {"kept", kept_json(run)},
      {"hazards", run_hazards(*run.source, run.graph, run.plan)},
      {"planning", planning_json(run.planning)},
      {"census", census_json(census)},
      {"files", output_files},
      {"side_files", side_files_json(side_files)},
      {"predicted", predicted_json(run)},
      {"timing", timing_json(times, measure_core_rate(ctx))},
      {"command", options.command},
      {"fingerprint", fingerprint_hash}};
  write_file(
      staging / "README.md",
      render_model_card(manifest, read_card_source(run.source->directory())));
  write_file(
      staging / kManifestName, manifest.dump(1, ' ', false, Json::error_handler_t::replace) + "\n");
  if (is_gguf_file(paths.output)) {
    put_in_place(staging / gguf_file_name(paths.output), paths.output, options.force);
    fs::rename(staging / kManifestName, manifest_path(paths.output));
    fs::remove_all(staging);
  } else {
    put_in_place(staging, paths.output, options.force);
  }
  state.remove();
  return manifest;
}

}  // namespace quern
