// SPDX-License-Identifier: Apache-2.0
#include "pipeline/quantize.h"

#include "base/error.h"
#include "base/file.h"
#include "base/process.h"
#include "format/checkpoint.h"
#include "format/imatrix.h"
#include "format/safetensors.h"
#include "format/side_files.h"
#include "kernels/blas.h"
#include "kernels/kernels.h"
#include "nn/decoder.h"
#include "pipeline/calibration_input.h"
#include "pipeline/gguf_output.h"
#include "pipeline/hazards.h"
#include "pipeline/importance.h"
#include "pipeline/manifest.h"
#include "pipeline/output.h"
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
#include <system_error>
#include <utility>

namespace quern {
namespace {

namespace fs = std::filesystem;

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
      {"failsafe", method.rare_experts == RareExperts::kRtn ? "rtn" : "pooled"},
      {"activation",
       options.activation.active() ? activation_json(options.activation) : Json(nullptr)},
      {"experts_only", options.experts_only},
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

void log_part(Log& log, const std::string& part, const QuantizedBlock& done) {
  double sum = 0;
  for (const QuantizedLinear& linear : done.linears) {
    sum += linear.report.relative_error;
    if (linear.report.fallback) {
      log.warning(fmt::format(
          "{}: {} instead of {}: {}",
          linear.plan->name,
          linear.report.method,
          linear.plan->method,
          *linear.report.fallback));
    }
  }
  const auto count = static_cast<double>(std::max<std::size_t>(done.linears.size(), 1));
  log.detail(fmt::format("part {}  mean relative error {:.3e}", part, sum / count));
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
  std::size_t left = 0;
  for (std::size_t i = 0; i < run.graph.blocks.size(); ++i) {
    const std::vector<std::string> names = block_parts(run.graph.blocks[i]);
    if (!std::all_of(
            names.begin(), names.end(), [&](const auto& name) { return state.holds(name); })) {
      left = i + 1;
    }
  }
  const bool head_left = !state.holds(kHeadPart);
  if (head_left && rounds_head(run)) {
    left = run.graph.blocks.size();
  }
  const BlockParts parts = {
      [&](const std::string& part) { return state.load(part, run.plan); },
      [&](const std::string& part, const QuantizedBlock& done) {
        state.save(part, done);
        log_part(ctx.log, part, done);
      }};
  for (std::size_t i = 0; i < left; ++i) {
    const Block& block = run.graph.blocks[i];
    BlockWeights weights = load_block_weights(block, *run.source);
    if (activations) {
      quantizer.run(block, weights, *activations, parts, progress);
    } else {
      quantizer.run_data_free(block, weights, imatrix ? &*imatrix : nullptr, parts, progress);
    }
    release_block_weights(block, *run.source);
  }
  if (head_left) {
    state.save(
        kHeadPart, quantize_head(ctx, run, activations ? &*activations : nullptr, method_options));
  }
  progress.finish();
  return quantizer.times();
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
        is_imatrix_file);
  }
  ctx.log.info(describe_plan(run, options));
  if (unties_table(run)) {
    ctx.log.warning(untied_text(run.graph.embedding.module, run.format->name));
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
  check_disk(run.gguf ? output_bytes(run) : run.layout.total_bytes(), paths.staging);
  if (state.parts_saved() > 0) {
    ctx.log.info(fmt::format(
        "resuming: {} of {} parts are done", state.parts_saved(), all_parts(run.graph).size()));
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
  Json coverage = coverage_json(run.graph, linears);
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
      {"experts", std::move(coverage)},
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
