// SPDX-License-Identifier: Apache-2.0
#include "pipeline/export.h"

#include "base/units.h"
#include "cli/verb.h"
#include "format/output_format.h"

#include <fmt/format.h>

#include <memory>

namespace quern {
namespace {

struct ExportArguments {
  std::string model;
  std::string output;
  std::string format;
  std::string dtype;
  std::string shard_size = "5GB";
  bool force = false;
};

int run_export(Session& session, const ExportArguments& arguments) {
  ExportOptions options;
  options.model = resolve_model(arguments.model);
  options.output = arguments.output;
  options.format = arguments.format;
  options.dtype = arguments.dtype;
  options.force = arguments.force;
  options.shard_bytes = parse_size(arguments.shard_size, "--shard-size");
  options.command = session.command();
  Json document = export_checkpoint(session.context(), options);
  session.context().log.info(fmt::format(
      "{}: {} quantized linears of {} as {}, {}, {:.3f} bits per weight",
      arguments.output,
      document["linears"].size(),
      arguments.model,
      document["format"].get<std::string>(),
      human_bytes(document["bytes"].get<double>()),
      document["bits_per_weight"].get<double>()));
  document["output"] = arguments.output;
  document["source"] = arguments.model;
  session.print_json(document);
  return 0;
}

}  // namespace

std::function<int(Session&)> configure_export(CLI::App& app) {
  auto arguments = std::make_shared<ExportArguments>();
  app.add_option("MODEL", arguments->model, "quantized checkpoint directory, or a .gguf file")
      ->required();
  app.add_option(
         "-o,--output", arguments->output, "directory to make; it appears when it is complete")
      ->required();
  app.add_option("--format", arguments->format, "dense, " + output_format_names())->required();
  app.add_option(
      "--dtype",
      arguments->dtype,
      "with --format dense: float32, float16 or bfloat16 (default: that of the model)");
  app.add_option("--shard-size", arguments->shard_size, "largest weight file (default: 5GB)");
  app.add_flag("--force", arguments->force, "move what stands at OUT aside");
  add_footer(
      app,
      "  quern export ./model-4bit -o ./model-ct --format compressed-tensors\n  quern export "
      "./model-4bit -o ./model-32 --format dense --dtype float32\n");
  return [arguments](Session& session) { return run_export(session, *arguments); };
}

}  // namespace quern
