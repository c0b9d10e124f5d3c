// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "base/file.h"
#include "base/process.h"
#include "base/units.h"
#include "cli/eval_models.h"
#include "cli/verb.h"
#include "eval/perplexity.h"
#include "format/checkpoint.h"
#include "format/gguf_tokenizer.h"
#include "tokenizer/tokenizer.h"

#include <fmt/format.h>

#include <algorithm>
#include <memory>

namespace quern {
namespace {

struct EvalArguments {
  std::string model;
  std::vector<std::string> texts;
  std::int64_t context = 0;  // 0: the protocol's own
  std::string protocol = "gptq";
  std::int64_t windows = 0;
  bool rows = false;
  std::string reference;
  std::string stream = "auto";
  std::string work_directory;
};

// The rows of a wikitext .raw file, as the data set on the hub has them, joined by two line ends:
// each line with its line end is a row, a blank line is an empty row (evaluation.md, P1).
std::string joined_rows(const std::string& text) {
  std::string joined;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = std::min(text.find('\n', at), text.size());
    const std::string_view line = std::string_view(text).substr(at, end - at);
    if (at > 0) {
      joined += "\n\n";
    }
    if (line.find_first_not_of(' ') != std::string_view::npos) {
      joined.append(line).append("\n");
    }
    at = end + 1;
  }
  return joined;
}

Json perplexity_json(const PerplexityResult& result, Protocol protocol) {
  return {
      {"ppl", result.ppl},
      {"nll_mean", result.nll_mean},
      {"nll_stderr", result.nll_stderr},
      {"tokens", result.tokens},
      {"windows", result.windows},
      {"context", result.context},
      {"protocol", protocol_name(protocol)}};
}

PerplexityOptions perplexity_options(const EvalArguments& arguments, const Tokenizer& tokenizer) {
  PerplexityOptions options;
  options.protocol = arguments.protocol == "gptq" ? Protocol::kGptq : Protocol::kLlamaCpp;
  const std::int64_t usual = options.protocol == Protocol::kGptq ? 2048 : 512;
  options.context = arguments.context > 0 ? arguments.context : usual;
  options.max_windows = arguments.windows;
  if (tokenizer.adds_bos()) {
    options.bos_id = tokenizer.bos_id();
  }
  return options;
}

std::uint64_t weight_bytes(const Checkpoint& checkpoint) {
  std::uint64_t bytes = 0;
  const std::vector<std::filesystem::path> files = checkpoint.self_contained_files();
  for (const std::filesystem::path& file : files) {
    bytes += std::filesystem::file_size(file);
  }
  if (!files.empty()) {
    return bytes;
  }
  for (const auto& entry : std::filesystem::directory_iterator(checkpoint.directory())) {
    bytes += entry.path().extension() == ".safetensors" ? entry.file_size() : 0;
  }
  return bytes;
}

std::string file_name(const std::string& path) {
  return std::filesystem::path(path).filename().string();
}

struct EvalText {
  std::string name;
  std::vector<std::int32_t> ids;
};

std::vector<EvalText> read_texts(const EvalArguments& arguments, const Tokenizer& tokenizer) {
  std::vector<EvalText> texts;
  for (const std::string& path : arguments.texts) {
    const std::string name = file_name(path);
    const bool is_taken = std::any_of(
        texts.begin(), texts.end(), [&](const EvalText& text) { return text.name == name; });
    const std::string content = read_file(path);
    EncodeOptions encode;
    encode.add_special_tokens = true;
    texts.push_back(
        {is_taken ? path : name,
         tokenizer.encode(arguments.rows ? joined_rows(content) : content, encode)});
  }
  return texts;
}

Streaming streaming_of(const EvalArguments& arguments) {
  if (arguments.stream == "auto") {
    return Streaming::kAuto;
  }
  return arguments.stream == "on" ? Streaming::kOn : Streaming::kOff;
}

Json memory_json(const EvalMemory& memory) {
  return {
      {"streamed", memory.streamed},
      {"windows_at_once", memory.streamed ? memory.group : 1},
      {"spilled_bytes", memory.spilled_bytes},
      {"estimated_peak_bytes", memory.peak}};
}

int run_eval(Session& session, const EvalArguments& arguments) {
  const double started = steady_seconds();
  const Context& ctx = session.context();
  std::unique_ptr<Checkpoint> checkpoint = open_checkpoint(resolve_model(arguments.model));
  std::unique_ptr<Checkpoint> reference;
  if (!arguments.reference.empty()) {
    reference = open_checkpoint(resolve_model(arguments.reference));
  }
  const std::string format = checkpoint->format();
  const std::uint64_t bytes = weight_bytes(*checkpoint);
  const Tokenizer tokenizer = open_tokenizer(*checkpoint);
  const PerplexityOptions options = perplexity_options(arguments, tokenizer);
  const std::vector<EvalText> texts = read_texts(arguments, tokenizer);
  std::int64_t windows = 0;
  for (const EvalText& each : texts) {
    windows = std::max(windows, window_count(each.ids.size(), options));
  }
  EvalModels models(
      ctx,
      std::move(checkpoint),
      std::move(reference),
      windows,
      options.context,
      streaming_of(arguments),
      arguments.work_directory);
  Json perplexity = Json::object();
  Json reference_perplexity = Json::object();
  Json divergence = Json::object();
  std::int64_t tokens = 0;
  std::string text;
  for (const auto& [name, ids] : texts) {
    const TextResult result = evaluate_text(
        ctx,
        models.model(),
        models.reference(),
        ids,
        options,
        [&, &name = name](std::int64_t done, std::int64_t total) {
          (void)process_usage();  // samples the peak
          ctx.log.progress(fmt::format(
              "{}  window {}/{}  eta {}",
              name,
              done,
              total,
              models.clock().remaining(
                  name, static_cast<double>(done), static_cast<double>(total))));
        });
    ctx.log.progress("");
    tokens += result.model.windows * result.model.context;
    perplexity[name] = perplexity_json(result.model, options.protocol);
    text += fmt::format(
        "{}: perplexity {:.4f}, nll {:.6f} ± {:.6f}, {} windows of {}\n",
        name,
        result.model.ppl,
        result.model.nll_mean,
        result.model.nll_stderr,
        result.model.windows,
        result.model.context);
    if (result.divergence) {
      reference_perplexity[name] = perplexity_json(*result.reference, options.protocol);
      divergence[name] = divergence_json(*result.divergence);
      text += fmt::format(
          "  against {}: KL {:.6f} ± {:.6f} nats, top-1 agreement {:.2f} %, perplexity ratio "
          "{:.4f}\n",
          file_name(arguments.reference),
          result.divergence->kl_mean,
          result.divergence->kl_stderr,
          100 * result.divergence->top1_agreement,
          result.divergence->ppl_ratio);
    }
  }
  const double seconds = steady_seconds() - started;
  const ProcessUsage usage = process_usage();
  Json document = {
      {"schema", "quern.eval/1"},
      {"model", arguments.model},
      {"format", format},
      {"bytes", bytes},
      {"backend",
       {{"isa", ctx.kernels.isa}, {"dtype", "float32"}, {"blas", ctx.blas.description()}}},
      {"perplexity", std::move(perplexity)},
      {"tasks", Json::object()},
      {"divergence", std::move(divergence)},
      {"seconds", seconds},
      {"cpu_seconds", usage.cpu_seconds},
      {"tokens_per_second", static_cast<double>(tokens) / seconds},
      {"memory", memory_json(models.memory())},
      {"peak_rss_bytes", usage.peak_rss_bytes},
      {"peak_anonymous_bytes", usage.peak_anonymous_bytes}};
  if (models.reference() != nullptr) {
    document["reference"] = {
        {"model", arguments.reference}, {"perplexity", std::move(reference_perplexity)}};
  }
  session.print_json(document);
  session.print_text(text);
  return 0;
}

}  // namespace

std::function<int(Session&)> configure_eval(CLI::App& app) {
  auto arguments = std::make_shared<EvalArguments>();
  app.add_option("MODEL", arguments->model, "checkpoint directory, or a .gguf file")->required();
  app.add_option("--perplexity", arguments->texts, "text file to score (repeatable)")->required();
  app.add_option(
         "--context", arguments->context, "tokens of a window (default: 2048, for llama.cpp 512)")
      ->check(CLI::Range(2, 1 << 24));
  app.add_option(
         "--protocol",
         arguments->protocol,
         "gptq: all predictions of a window; llama.cpp: the second half (default: gptq)")
      ->check(CLI::IsMember({"gptq", "llama.cpp"}));
  app.add_option("--windows", arguments->windows, "the first N windows only (default: all)")
      ->check(CLI::NonNegativeNumber);
  app.add_flag(
      "--rows",
      arguments->rows,
      "read the file as wikitext rows, joined by two line ends, as GPTQ's script does");
  app.add_option(
      "--reference",
      arguments->reference,
      "KL divergence from this model and top-1 agreement, on the same tokens");
  app.add_option(
         "--stream",
         arguments->stream,
         "read the model block by block instead of as a whole, to the same result: auto (default) "
         "does when it exceeds --memory, on, off")
      ->check(CLI::IsMember({"auto", "on", "off"}));
  app.add_option(
      "--work-dir",
      arguments->work_directory,
      "where what exceeds --memory waits meanwhile, in a file without a name (default: the "
      "system's temporary directory)");
  add_footer(
      app,
      "  quern eval ./model --perplexity wiki.test.raw\n  quern eval ./model-4bit --reference "
      "./model --perplexity wiki.test.raw --windows 40\n  quern eval ./model --perplexity "
      "wiki.test.raw --protocol llama.cpp --json\n");
  return [arguments](Session& session) { return run_eval(session, *arguments); };
}

}  // namespace quern
