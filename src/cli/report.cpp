// SPDX-License-Identifier: Apache-2.0
#include "report/report.h"

#include "base/error.h"
#include "base/file.h"
#include "cli/verb.h"
#include "pipeline/run_paths.h"

#include <fmt/format.h>

#include <memory>

namespace quern {
namespace {

struct ReportArguments {
  std::string run;
  std::string original_eval;
  std::string result_eval;
  std::string output;
};

std::optional<Json> optional_json(const std::string& path) {
  return path.empty() ? std::nullopt : std::optional<Json>(read_json(path));
}

int run_report(Session& session, const ReportArguments& arguments) {
  ReportData data;
  const std::filesystem::path run = arguments.run;
  data.manifest =
      read_json(std::filesystem::is_directory(run) ? run / "quantization_manifest.json" : run);
  const Json* schema = data.manifest.is_object() && data.manifest.contains("schema")
                           ? &data.manifest["schema"]
                           : nullptr;
  if (schema == nullptr || !schema->is_string() ||
      !schema->get<std::string>().starts_with("quern.quantize/")) {
    throw ParseError(
        "not the manifest of a run",
        arguments.run,
        "expected the schema quern.quantize/1",
        "give the output directory of quern quantize");
  }
  data.original_eval = optional_json(arguments.original_eval);
  data.result_eval = optional_json(arguments.result_eval);
  if (!arguments.output.empty()) {
    prepare_side_output(arguments.output, "-o", {}, is_html_report);
    write_file(arguments.output, render_html_report(data));
    session.context().log.info(fmt::format("report: {}", arguments.output));
  }
  session.print_text(render_text_summary(data));
  session.print_json(
      {{"schema", "quern.report/1"},
       {"output", arguments.output},
       {"manifest", std::move(data.manifest)}});
  return 0;
}

}  // namespace

std::function<int(Session&)> configure_report(CLI::App& app) {
  auto arguments = std::make_shared<ReportArguments>();
  app.add_option("RUN", arguments->run, "output directory of quern quantize, or its manifest")
      ->required();
  app.add_option(
      "--original-eval",
      arguments->original_eval,
      "what quern eval --json printed of the original");
  app.add_option(
      "--result-eval", arguments->result_eval, "what quern eval --json printed of the result");
  app.add_option("-o,--output", arguments->output, "HTML file to write");
  add_footer(
      app,
      "  quern report ./model-4bit --original-eval original.json --result-eval result.json -o "
      "report.html\n");
  return [arguments](Session& session) { return run_report(session, *arguments); };
}

}  // namespace quern
