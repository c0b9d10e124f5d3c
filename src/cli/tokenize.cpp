// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "base/file.h"
#include "cli/verb.h"
#include "format/gguf_tokenizer.h"
#include "tokenizer/tokenizer.h"

#include <fmt/format.h>

#include <cstdio>
#include <memory>
#include <optional>
#include <string>

namespace quern {
namespace {

struct TokenizeArguments {
  std::string model;
  std::optional<std::string> text;
  std::optional<std::string> file;
  bool special = false;
};

Json ids_json(const std::vector<std::int32_t>& ids) {
  return Json(ids);
}

// {"text": …} lines to {"ids": […]} lines on stdout, in order; with --json one document.
int tokenize_file(
    Session& session,
    const Tokenizer& tokenizer,
    const TokenizeArguments& arguments,
    const EncodeOptions& options) {
  const std::string text = read_file(*arguments.file);
  Json rows = Json::array();
  std::size_t number = 0;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = std::min(text.find('\n', at), text.size());
    const std::string_view line = std::string_view(text).substr(at, end - at);
    at = end + 1;
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) {
      continue;
    }
    const std::string place = fmt::format("{}: line {}", *arguments.file, number);
    const Json json = parse_json(line, place);
    const Json row = {
        {"ids", ids_json(tokenizer.encode(JsonReader(json, place).get_string("text"), options))}};
    if (session.options().json) {
      rows.push_back(row);
    } else {
      session.print_text(row.dump() + "\n");
    }
  }
  session.print_json({{"schema", "quern.tokenize/1"}, {"rows", std::move(rows)}});
  return 0;
}

int run_tokenize(Session& session, const TokenizeArguments& arguments) {
  if (arguments.text.has_value() == arguments.file.has_value()) {
    throw UsageError(
        arguments.text ? "two texts to tokenize" : "nothing to tokenize",
        "quern tokenize",
        "exactly one of --text and --file is expected",
        "quern tokenize DIR --text Hello");
  }
  const Tokenizer tokenizer = open_tokenizer(resolve_model(arguments.model));
  EncodeOptions options;
  options.add_special_tokens = arguments.special;
  if (arguments.file) {
    return tokenize_file(session, tokenizer, arguments, options);
  }
  const std::vector<std::int32_t> ids = tokenizer.encode(*arguments.text, options);
  session.print_json({{"schema", "quern.tokenize/1"}, {"ids", ids_json(ids)}});
  session.print_text(Json{{"ids", ids_json(ids)}}.dump() + "\n");
  return 0;
}

}  // namespace

std::function<int(Session&)> configure_tokenize(CLI::App& app) {
  auto arguments = std::make_shared<TokenizeArguments>();
  app.add_option(
         "MODEL",
         arguments->model,
         "directory that holds a tokenizer, or a .gguf file; no weights needed")
      ->required();
  app.add_option("--text", arguments->text, "text to tokenize");
  app.add_option(
      "--file",
      arguments->file,
      "JSON lines {\"text\": …}; one line {\"ids\": […]} comes out for each");
  app.add_flag(
      "--special",
      arguments->special,
      "add the tokens that the tokenizer puts around a text (BOS of Llama)");
  add_footer(
      app,
      "  quern tokenize ./model --text 'Hello world'\n  quern tokenize ./model --file texts.jsonl "
      "> ids.jsonl\n");
  return [arguments](Session& session) { return run_tokenize(session, *arguments); };
}

}  // namespace quern
