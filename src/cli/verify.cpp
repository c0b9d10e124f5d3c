// SPDX-License-Identifier: Apache-2.0
#include "pipeline/verify.h"

#include "base/error.h"
#include "cli/verb.h"
#include "format/checkpoint.h"
#include "format/derived_checkpoint.h"

#include <fmt/format.h>

#include <memory>

namespace quern {
namespace {

struct VerifyArguments {
  std::string model;
  std::string against;
  std::string engine;
};

std::string engines_text(const Json& document) {
  std::string text;
  for (const Json& entry : document["engines"]) {
    const bool loads = entry["loads"].get<bool>();
    text += fmt::format(
        "{:<13} {:<24} {}\n",
        entry["engine"].get<std::string>(),
        entry["version"].get<std::string>(),
        loads ? "loads" : "does not load");
    for (const char* key : {"problems", "notes"}) {
      for (const Json& line : entry[key]) {
        text += "              " + line.get<std::string>() + "\n";
      }
    }
  }
  return text + fmt::format(
                    "largest tensor-parallel size: {}\n",
                    document["largest_tensor_parallel"].get<std::int64_t>());
}

int run_verify(Session& session, const VerifyArguments& arguments) {
  const auto checkpoint = open_checkpoint(resolve_model(arguments.model));
  std::unique_ptr<Checkpoint> source;
  if (!arguments.against.empty()) {
    source = with_plain_weights(open_checkpoint(resolve_model(arguments.against)));
  }
  Json document = verify_checkpoint(session.context(), *checkpoint, source.get(), arguments.engine);
  document["model"] = arguments.model;
  std::string text = fmt::format(
      "{}: {} tensors, {} quantized linears as {}, {} file hashes checked\n",
      arguments.model,
      document["tensors"].get<std::int64_t>(),
      document["quantized_linears"].get<std::int64_t>(),
      document["format"].get<std::string>(),
      document["hashes_checked"].get<std::int64_t>());
  if (document.contains("against")) {
    const Json& against = document["against"];
    text += fmt::format(
        "against {}: {} tensors unchanged, {} linears quantized, largest relative difference "
        "{:.4f} in {}\n",
        arguments.against,
        against["unchanged_tensors"].get<std::int64_t>(),
        against["quantized_linears"].get<std::int64_t>(),
        against["largest_relative_difference"].get<double>(),
        against["largest_in"].get<std::string>());
  }
  text += engines_text(document);
  for (const Json& problem : document["problems"]) {
    text += "problem: " + problem.get<std::string>() + "\n";
  }
  const bool good = document["problems"].empty();
  text += good ? "all is well\n" : "";
  session.print_json(document);
  session.print_text(text);
  if (!good) {
    const std::size_t count = document["problems"].size();
    throw Error(
        ErrorKind::kFailed,
        "the checkpoint did not pass",
        arguments.model,
        fmt::format(
            "{}{}",
            document["problems"].front().get<std::string>(),
            count > 1 ? fmt::format(", and {} more", count - 1) : ""),
        "quern verify without --json lists all");
  }
  return 0;
}

}  // namespace

std::function<int(Session&)> configure_verify(CLI::App& app) {
  auto arguments = std::make_shared<VerifyArguments>();
  app.add_option("MODEL", arguments->model, "checkpoint directory, or a .gguf file")->required();
  app.add_option(
      "--against",
      arguments->against,
      "the original: every tensor must be there, unchanged or quantized");
  app.add_option(
      "--engine",
      arguments->engine,
      "it must load in vllm, sglang, transformers or llama.cpp (default: says for each)");
  add_footer(
      app,
      "  quern verify ./model-4bit --engine vllm\n  quern verify ./model-4bit --against ./model "
      "--json\n");
  return [arguments](Session& session) { return run_verify(session, *arguments); };
}

}  // namespace quern
