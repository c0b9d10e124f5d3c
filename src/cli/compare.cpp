// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "base/file.h"
#include "base/process.h"
#include "calib/calibration_set.h"
#include "cli/eval_models.h"
#include "cli/verb.h"
#include "eval/perplexity.h"
#include "format/checkpoint.h"
#include "format/gguf_tokenizer.h"
#include "pipeline/difference.h"
#include "tokenizer/tokenizer.h"

#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <utility>

namespace quern {
namespace {

struct CompareArguments {
  std::string a;
  std::string b;
  std::string text;
  std::int64_t context = 512;
  std::int64_t windows = 8;
  bool weights_only = false;
};

// The text to run both through, as ids.
std::vector<std::int32_t> text_ids(const CompareArguments& arguments, const Tokenizer& tokenizer) {
  std::string text;
  if (!arguments.text.empty()) {
    text = read_file(arguments.text);
  } else {
    for (const std::string& document :
         parse_calibration_jsonl(default_calibration_jsonl(), "default mix")) {
      text += (text.empty() ? "" : "\n\n") + document;
    }
  }
  EncodeOptions options;
  options.add_special_tokens = true;
  return tokenizer.encode(text, options);
}

// B on the text of A, as `eval --reference A` measures it.
Json end_to_end(
    const Context& ctx,
    const CompareArguments& arguments,
    const std::filesystem::path& a,
    const std::filesystem::path& b) {
  std::unique_ptr<Checkpoint> reference = open_checkpoint(a);
  const std::vector<std::int32_t> ids = text_ids(arguments, open_tokenizer(*reference));
  PerplexityOptions options;
  options.context = arguments.context;
  options.max_windows = arguments.windows;
  EvalModels models(
      ctx,
      open_checkpoint(b),
      std::move(reference),
      window_count(ids.size(), options),
      options.context);
  const TextResult result = evaluate_text(
      ctx,
      models.model(),
      models.reference(),
      ids,
      options,
      [&](std::int64_t done, std::int64_t total) {
        ctx.log.progress(fmt::format("end to end  window {}/{}", done, total));
      });
  ctx.log.progress("");
  Json document = divergence_json(*result.divergence);
  document["text"] = arguments.text.empty()
                         ? "default mix"
                         : std::filesystem::path(arguments.text).filename().string();
  document["windows"] = result.model.windows;
  document["context"] = result.model.context;
  document["ppl_a"] = result.reference->ppl;
  document["ppl_b"] = result.model.ppl;
  return document;
}

std::string weights_text(const Json& document) {
  constexpr std::size_t kRows = 10;
  const Json& summary = document["summary"];
  std::vector<Json> rows(document["linears"].begin(), document["linears"].end());
  std::stable_sort(rows.begin(), rows.end(), [](const Json& x, const Json& y) {
    return x["relative_difference"] > y["relative_difference"];
  });
  rows.resize(std::min(rows.size(), kRows));
  std::string text = fmt::format(
      "{} of {} linears are equal; relative difference {:.3e} in the mean square, {:.3e} at most\n"
      "{} of {} norms and biases are equal\n\n{:<44} {:>10} {:>10}  A -> B\n",
      summary["equal_linears"].get<std::int64_t>(),
      summary["linears"].get<std::int64_t>(),
      summary["rms_relative_difference"].get<double>(),
      summary["worst_relative_difference"].get<double>(),
      summary["equal_tensors"].get<std::int64_t>(),
      summary["equal_tensors"].get<std::int64_t>() +
          summary["different_tensors"].get<std::int64_t>(),
      "largest differences",
      "relative",
      "absolute");
  for (const Json& row : rows) {
    text += fmt::format(
        "{:<44} {:>10.3e} {:>10.3e}  {} -> {}\n",
        row["name"].get<std::string>(),
        row["relative_difference"].get<double>(),
        row["largest_difference"].get<double>(),
        row["a"].get<std::string>(),
        row["b"].get<std::string>());
  }
  return text;
}

int run_compare(Session& session, const CompareArguments& arguments) {
  const double started = steady_seconds();
  const Context& ctx = session.context();
  const auto a = open_checkpoint(resolve_model(arguments.a));
  const auto b = open_checkpoint(resolve_model(arguments.b));
  Json document = {
      {"schema", "quern.compare/1"},
      {"a", {{"model", arguments.a}, {"format", a->format()}}},
      {"b", {{"model", arguments.b}, {"format", b->format()}}}};
  document.update(difference_json(compare_checkpoints(ctx, *a, *b)));
  std::string text = weights_text(document);
  if (!arguments.weights_only) {
    const Json& result = document["end_to_end"] =
        end_to_end(ctx, arguments, resolve_model(arguments.a), resolve_model(arguments.b));
    text += fmt::format(
        "\n{} windows of {}: KL(A || B) {:.6f} ± {:.6f} nats, top-1 agreement {:.2f} %, perplexity "
        "{:.4f} -> {:.4f}\n",
        result["windows"].get<std::int64_t>(),
        result["context"].get<std::int64_t>(),
        result["kl_mean"].get<double>(),
        result["kl_stderr"].get<double>(),
        100 * result["top1_agreement"].get<double>(),
        result["ppl_a"].get<double>(),
        result["ppl_b"].get<double>());
  }
  document["seconds"] = steady_seconds() - started;
  session.print_json(document);
  session.print_text(text);
  return 0;
}

}  // namespace

std::function<int(Session&)> configure_compare(CLI::App& app) {
  auto arguments = std::make_shared<CompareArguments>();
  app.add_option("A", arguments->a, "checkpoint directory or .gguf file, the reference")
      ->required();
  app.add_option("B", arguments->b, "another of the same model, in any format")->required();
  app.add_option(
      "--text", arguments->text, "text that both see, end to end (default: the bundled mix)");
  app.add_option("--context", arguments->context, "tokens of a window (default: 512)")
      ->check(CLI::Range(2, 1 << 24));
  app.add_option("--windows", arguments->windows, "windows; 0: all (default: 8)")
      ->check(CLI::NonNegativeNumber);
  app.add_flag("--weights-only", arguments->weights_only, "tensor by tensor only, nothing is run");
  add_footer(
      app,
      "  quern compare ./model ./model-4bit\n  quern compare ./model-gptq ./model-awq "
      "--weights-only --json\n");
  return [arguments](Session& session) { return run_compare(session, *arguments); };
}

}  // namespace quern
