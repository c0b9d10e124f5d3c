// SPDX-License-Identifier: Apache-2.0
#include "base/file.h"
#include "cli/quantize_arguments.h"

#include <fmt/format.h>

#include <memory>

namespace quern {
namespace {

int run_plan(Session& session, const QuantizeArguments& arguments) {
  QuantizeArguments shared = arguments;
  shared.output = arguments.output.empty() ? "out" : arguments.output;
  const QuantizeOptions options = quantize_options(session, shared);
  const PreparedRun run = prepare_quantize(session.context(), options);
  const Json document = {
      {"schema", "quern.plan/1"},
      {"model", arguments.model},
      {"budget", nullptr},
      {"predicted", predicted_json(run)},
      {"transform", run.plan.transform},
      {"linears", plan_linears_json(run.plan)},
      {"constraints", Json::array()}};
  session.context().log.info(describe_plan(run, options));
  if (!arguments.output.empty()) {
    write_file(
        arguments.output, document.dump(1, ' ', false, Json::error_handler_t::replace) + "\n");
    session.context().log.info(fmt::format(
        "{}: edit it, then quern quantize {} --plan {} -o OUT",
        arguments.output,
        arguments.model,
        arguments.output));
  }
  session.print_json(document);
  return 0;
}

}  // namespace

std::function<int(Session&)> configure_plan(CLI::App& app) {
  auto arguments = std::make_shared<QuantizeArguments>();
  add_quantize_options(app, *arguments);
  app.add_option(
      "-o,--output", arguments->output, "plan file to write; quern quantize --plan obeys it");
  add_footer(app, "  quern plan ./model\n  quern plan ./model --bits 3 -o plan.json\n");
  return [arguments](Session& session) { return run_plan(session, *arguments); };
}

}  // namespace quern
