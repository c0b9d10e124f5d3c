// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "base/file.h"
#include "base/units.h"
#include "cli/quantize_arguments.h"
#include "format/checkpoint.h"
#include "pipeline/difference.h"
#include "pipeline/export.h"
#include "pipeline/manifest.h"
#include "pipeline/run_paths.h"
#include "pipeline/staging.h"
#include "report/report.h"

#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <vector>

namespace quern {
namespace {

struct Arguments : QuantizeArguments {
  bool dry_run = false;
  std::string report;
};

// The ten linears that lost most, and what to type next.
void log_result(const Context& ctx, const Json& manifest, const QuantizeArguments& arguments) {
  std::vector<Json> worst(manifest["linears"].begin(), manifest["linears"].end());
  std::sort(worst.begin(), worst.end(), [](const Json& a, const Json& b) {
    return a["relative_error"] > b["relative_error"];
  });
  worst.resize(std::min<std::size_t>(worst.size(), 10));
  std::string text = "largest relative errors\n";
  for (const Json& row : worst) {
    text += fmt::format(
        "  {:<44} {} {} bits  {:.3e}{}\n",
        row["name"].get<std::string>(),
        row["method"].get<std::string>(),
        row["bits"].get<int>(),
        row["relative_error"].get<double>(),
        row["fallback"].is_null() ? "" : "  (" + row["fallback"].get<std::string>() + ")");
  }
  ctx.log.info(text);
  ctx.log.info(fmt::format(
      "{}: {}, {:.3f} bits per weight, in {}; peak {}",
      arguments.output,
      human_bytes(manifest["bytes"].get<double>()),
      manifest["bits_per_weight"].get<double>(),
      human_duration(manifest["seconds"].get<double>()),
      human_bytes(manifest["peak_rss_bytes"].get<double>())));
  ctx.log.info(fmt::format(
      "next: quern eval {} --reference {} --perplexity TEXT", arguments.output, arguments.model));
}

std::filesystem::path also_output(const QuantizeOptions& options, const std::string& format) {
  return options.output.string() + "-" + format;
}

bool is_export(const std::filesystem::path& directory) {
  try {
    return read_json(directory / kManifestName).value("schema", "") == kExportSchema;
  } catch (const Error&) {
    return false;  // something else
  } catch (const Json::exception&) {
    return false;
  }
}

// Exports of the result; one that stands there from before is kept when it is equal.
Json write_also(Session& session, const QuantizeOptions& options) {
  const Context& ctx = session.context();
  Json exports = Json::array();
  for (const std::string& format : options.also) {
    ExportOptions target;
    target.model = options.output;
    target.output = also_output(options, format);
    target.format = format;
    target.force = options.force;
    target.shard_bytes = options.shard_bytes;
    target.command = options.command;
    const bool there =
        options.resume && !options.force && is_export(target.output) &&
        equal_checkpoints(ctx, *open_checkpoint(options.output), *open_checkpoint(target.output));
    if (!there) {
      (void)export_checkpoint(ctx, target);
    }
    ctx.log.info(fmt::format("{}: the same codes as {}", target.output.string(), format));
    exports.push_back({{"output", target.output.string()}, {"format", format}});
  }
  return exports;
}

// What would only come to light when the work is done.
void check_outputs(const QuantizeOptions& options, const Arguments& arguments) {
  for (const std::string& format : options.also) {
    const std::filesystem::path output = also_output(options, format);
    if (!(options.resume && is_export(output))) {
      refuse_occupied(output, options.force);
    }
  }
  if (!arguments.report.empty()) {
    const RunPaths paths = resolve_run_paths(options.output, options.work_directory, options.model);
    prepare_side_output(
        arguments.report, "--report", {paths.output, paths.staging, paths.work}, is_html_report);
  }
}

int run_quantize(Session& session, const Arguments& arguments) {
  const QuantizeOptions options = quantize_options(session, arguments);
  const Context& ctx = session.context();
  if (arguments.dry_run) {
    const PreparedRun run = prepare_quantize(ctx, options);
    ctx.log.info(describe_plan(run, options));
    session.print_json(
        {{"schema", "quern.quantize/1"},
         {"output", arguments.output},
         {"source", arguments.model},
         {"dry_run", true},
         {"predicted", predicted_json(run)}});
    return 0;
  }
  check_outputs(options, arguments);
  const Json manifest = quantize(ctx, options);
  log_result(ctx, manifest, arguments);
  if (!arguments.report.empty()) {
    write_file(arguments.report, render_html_report({manifest, std::nullopt, std::nullopt}));
  }
  Json document = manifest;
  document["also"] = write_also(session, options);
  document["output"] = arguments.output;
  document["source"] = arguments.model;
  session.print_json(document);
  return 0;
}

}  // namespace

std::function<int(Session&)> configure_quantize(CLI::App& app) {
  auto arguments = std::make_shared<Arguments>();
  add_quantize_options(app, *arguments);
  app.add_option(
         "-o,--output", arguments->output, "directory to make; it appears when it is complete")
      ->required();
  app.add_option("--report", arguments->report, "write the HTML report of the run here, FILE.html");
  app.add_flag(
      "--dry-run",
      arguments->dry_run,
      "say what would happen: bytes exact, memory and time estimated");
  add_footer(
      app,
      "  quern quantize ./model -o ./model-4bit\n  quern quantize ./model -o ./model-3bit --bits 3 "
      "--group-size 64 --asymmetric\n  quern quantize ./model -o ./out --calibration my.jsonl:3 "
      "--calibration code.txt:1 --samples 256\n");
  return [arguments](Session& session) { return run_quantize(session, *arguments); };
}

}  // namespace quern
