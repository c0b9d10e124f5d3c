// SPDX-License-Identifier: Apache-2.0
#include "nn/generate.h"

#include "base/error.h"
#include "cli/verb.h"
#include "format/checkpoint.h"
#include "format/gguf_tokenizer.h"
#include "nn/vision.h"
#include "tokenizer/tokenizer.h"

#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>

namespace quern {
namespace {

struct GenerateArguments {
  std::string model;
  std::string prompt;
  std::vector<std::string> images;
  std::int64_t max_tokens = 128;
  SamplingOptions sampling;
  bool ignore_stop = false;
  std::string speculative = "off";
  std::int64_t draft_tokens = kDefaultDraftTokens;
};

double rate(std::size_t tokens, double seconds) {
  return seconds > 0 ? static_cast<double>(tokens) / seconds : 0;
}

// The ids of a prompt with images: where it marks no places for them, they come before the text.
std::shared_ptr<const ImagePrompt> read_images(
    const Context& ctx,
    const Model& model,
    const std::vector<std::string>& files,
    std::vector<std::int32_t> text) {
  VisionTower vision(ctx, model);
  const VisionConfig& config = vision.config();
  std::vector<std::int32_t> ids;
  if (std::find(text.begin(), text.end(), config.image_token) == text.end()) {
    for (std::size_t i = 0; i < files.size(); ++i) {
      ids.insert(ids.end(), {config.start_token, config.image_token, config.end_token});
    }
  }
  ids.insert(ids.end(), text.begin(), text.end());
  std::vector<PreparedImage> images;
  for (const std::string& file : files) {
    images.push_back(vision.prepare(file));
  }
  auto prompt = std::make_shared<ImagePrompt>(vision.plan(ids, images, "--prompt"));
  for (const PreparedImage& image : images) {
    const std::vector<float> features = vision.features(image, vision.patches(image));
    prompt->features.insert(prompt->features.end(), features.begin(), features.end());
  }
  return prompt;
}

int run_generate(Session& session, const GenerateArguments& arguments) {
  const Context& ctx = session.context();
  const Model model = load_model(open_checkpoint(resolve_model(arguments.model)));
  const Tokenizer tokenizer = open_tokenizer(*model.checkpoint);
  EncodeOptions encode;
  encode.add_special_tokens = true;
  std::vector<std::int32_t> prompt = tokenizer.encode(arguments.prompt, encode);
  GenerateOptions options;
  if (!arguments.images.empty()) {
    options.images = read_images(ctx, model, arguments.images, std::move(prompt));
    prompt = options.images->ids;
  }
  options.max_tokens = arguments.max_tokens;
  options.drawable = tokenizer.vocab_size();
  if (!arguments.ignore_stop) {
    options.stop_ids = tokenizer.eos_ids();
    options.stop_ids.insert(
        options.stop_ids.end(),
        model.graph.config.eos_ids.begin(),
        model.graph.config.eos_ids.end());
  }
  std::optional<Drafter> drafter;
  if (arguments.speculative == "mtp" && options.images != nullptr) {
    throw UnsupportedError(
        "no drafts after images",
        "--speculative mtp --image",
        "the draft layer reads embeddings of tokens only",
        "--speculative off");
  }
  if (arguments.speculative == "mtp") {
    options.drafter = &drafter.emplace(ctx, model);
    options.draft_tokens = arguments.draft_tokens;
  }
  Decoder decoder(ctx, model);
  Sampler sampler(arguments.sampling, ctx.seed);
  StreamDecoder stream(tokenizer);
  const GenerateResult result =
      generate(ctx, decoder, prompt, sampler, options, [&](std::int32_t id) {
        session.print_text(stream.push(id));
        return true;
      });
  session.print_text(stream.finish() + "\n");
  DecodeOptions decode;
  decode.replace_invalid = true;
  session.print_json(
      {{"schema", "quern.generate/1"},
       {"prompt_ids", prompt},
       {"ids", result.ids},
       {"text", tokenizer.decode(result.ids, decode)},
       {"finish_reason", result.finish_reason},
       {"prompt_tokens_per_second", rate(prompt.size(), result.prompt_seconds)},
       {"tokens_per_second", rate(result.ids.size(), result.decode_seconds)},
       {"accepted_draft_tokens", result.accepted_draft_tokens},
       {"drafted_tokens", result.drafted_tokens}});
  ctx.log.info(fmt::format(
      "{} tokens, {}; prompt {:.1f} tokens/s, decoding {:.1f} tokens/s",
      result.ids.size(),
      result.finish_reason,
      rate(prompt.size(), result.prompt_seconds),
      rate(result.ids.size(), result.decode_seconds)));
  if (result.drafted_tokens > 0) {
    ctx.log.info(fmt::format(
        "{} of {} drafted tokens accepted", result.accepted_draft_tokens, result.drafted_tokens));
  }
  return result.finish_reason == "interrupted" ? exit_code(ErrorKind::kInterrupted) : 0;
}

}  // namespace

std::function<int(Session&)> configure_generate(CLI::App& app) {
  auto arguments = std::make_shared<GenerateArguments>();
  SamplingOptions& sampling = arguments->sampling;
  app.add_option("MODEL", arguments->model, "checkpoint directory, or a .gguf file")->required();
  app.add_option("--prompt", arguments->prompt, "text to go on from")->required();
  app.add_option(
      "--image",
      arguments->images,
      "PNG, JPEG or WebP file; may be given several times. Images come before the text, or in the "
      "places that it marks with <|vision_start|><|image_pad|><|vision_end|>");
  app.add_option("--max-tokens", arguments->max_tokens, "new tokens at most (default: 128)")
      ->check(CLI::Range(1, 1 << 24));
  app.add_option(
         "--temperature", sampling.temperature, "0 takes the most likely token (default: 0)")
      ->check(number_within(0, 100));
  app.add_option(
         "--top-p", sampling.top_p, "smallest set of likeliest tokens with this share (default: 1)")
      ->check(number_within(0, 1));
  app.add_option("--top-k", sampling.top_k, "the k likeliest (default: all)")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--min-p", sampling.min_p, "at least this share of the likeliest (default: 0)")
      ->check(number_within(0, 1));
  app.add_flag("--ignore-stop", arguments->ignore_stop, "go on after stop tokens");
  CLI::Option* speculative =
      app.add_option(
             "--speculative",
             arguments->speculative,
             "off, or mtp: the model's draft layer proposes tokens, which changes none of them "
             "(default: off)")
          ->check(CLI::IsMember({"off", "mtp"}));
  app.add_option(
         "--draft-tokens",
         arguments->draft_tokens,
         fmt::format("proposed at a time with mtp (default: {})", kDefaultDraftTokens))
      ->check(CLI::Range(1, 16))
      ->needs(speculative);
  add_footer(
      app,
      "  quern generate ./model --prompt 'Once upon a time'\n  quern generate ./model --prompt "
      "'Hello' --temperature 0.7 --top-p 0.8 --seed 1\n  quern generate ./model --image cat.png "
      "--prompt 'What is "
      "this?'\n");
  return [arguments](Session& session) { return run_generate(session, *arguments); };
}

}  // namespace quern
