// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "base/file.h"
#include "cli/quantize_arguments.h"
#include "pipeline/run_paths.h"

#include <fmt/format.h>

#include <memory>
#include <string>

namespace quern {
namespace {

struct Arguments : QuantizeArguments {
  std::string explain;
};

bool is_plan_file(const std::filesystem::path& file) {
  try {
    const Json document = read_json(file);
    return document.is_object() && document.value("schema", Json()) == kPlanSchema;
  } catch (const Error&) {
    return false;
  }
}

// The linear that is called `name`, or whose name ends so.
const PlannedLinear& named_linear(const QuantPlan& plan, const std::string& name) {
  const PlannedLinear* found = plan.find(name);
  std::string matches;
  std::string found_first;
  if (found == nullptr && !name.empty()) {
    int count = 0;
    for (const PlannedLinear& linear : plan.linears) {
      if (linear.name.ends_with("." + name)) {
        found = &linear;
        found_first = found_first.empty() ? linear.name : found_first;
        matches += (++count > 1 ? ", " : "") + linear.name;
      }
    }
    found = count == 1 ? found : nullptr;
  }
  if (found == nullptr) {
    throw UsageError(
        matches.empty() ? "no such linear" : "more than one linear ends so",
        "--explain " + name,
        matches.empty() ? "the plan does not name it" : "found " + printable(matches),
        found_first.empty() ? "quern plan MODEL lists them" : "--explain " + found_first);
  }
  return *found;
}

Json linear_json(const QuantPlan& plan, const PlannedLinear& linear) {
  for (Json& row : plan_linears_json(plan)) {
    if (row["name"] == linear.name) {
      return row;
    }
  }
  return nullptr;
}

void log_check(const Session& session, const PlanRecord& record) {
  if (record.additivity) {
    session.context().log.info(fmt::format(
        "Check    {} allocations near this one: measured KL = {:.3g} x predicted, r = {:.3f}",
        record.additivity->predicted.size(),
        record.additivity->slope(),
        record.additivity->correlation()));
  }
}

int run_plan(Session& session, const Arguments& arguments) {
  QuantizeArguments shared = arguments;
  shared.output = arguments.output.empty() ? "out" : arguments.output;
  const QuantizeOptions options = quantize_options(session, shared);
  if (!arguments.output.empty()) {
    prepare_side_output(arguments.output, "-o", {}, is_plan_file);
  }
  const PreparedRun run = prepare_quantize(session.context(), options);
  if (!arguments.explain.empty()) {
    const PlannedLinear& linear = named_linear(run.plan, arguments.explain);
    session.print_text(explain(linear));
    session.print_json({{"schema", kPlanSchema}, {"linear", linear_json(run.plan, linear)}});
    return 0;
  }
  const Json document = {
      {"schema", kPlanSchema},
      {"model", arguments.model},
      {"budget", run.planning.budget},
      {"predicted", predicted_json(run)},
      {"transform", run.plan.transform},
      {"constraints", run.planning.constraints},
      {"additivity",
       run.planning.additivity ? additivity_json(*run.planning.additivity) : Json(nullptr)},
      {"seconds", run.planning.seconds},
      {"linears", plan_linears_json(run.plan)}};
  session.context().log.info(describe_plan(run, options));
  log_check(session, run.planning);
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
  auto arguments = std::make_shared<Arguments>();
  add_quantize_options(app, *arguments);
  app.add_option("--explain", arguments->explain, "say why this linear is to become what it is");
  app.add_option(
      "-o,--output", arguments->output, "plan file to write; quern quantize --plan obeys it");
  add_footer(
      app,
      "  quern plan ./model --linear-bpw 3.5 -o plan.json\n"
      "  quern plan ./model --plan plan.json --explain layers.0.mlp.down_proj\n"
      "  quern plan ./model --bits 3\n");
  return [arguments](Session& session) { return run_plan(session, *arguments); };
}

}  // namespace quern
