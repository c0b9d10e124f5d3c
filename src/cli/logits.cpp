// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "base/file.h"
#include "cli/verb.h"
#include "format/checkpoint.h"
#include "format/safetensors_writer.h"
#include "nn/mtp.h"
#include "pipeline/calibration_input.h"

#include <fmt/format.h>

#include <memory>
#include <optional>
#include <utility>

namespace quern {
namespace {

struct LogitsArguments {
  std::string model;
  std::string ids;
  std::string output;
  bool hidden = false;
  bool mtp = false;
};

std::vector<std::vector<std::int32_t>> read_ids(const std::filesystem::path& path) {
  if (path.extension() == ".safetensors") {
    return read_input_ids(path);
  }
  const Json json = read_json(path);
  const auto refuse = [&](const std::string& found) {
    return ParseError(
        "not a list of lists of token ids",
        path.string(),
        found,
        "write it like [[1, 2, 3], [4, 5]]");
  };
  if (!json.is_array() || json.empty()) {
    throw refuse("expected a JSON list that is not empty");
  }
  std::vector<std::vector<std::int32_t>> rows;
  for (const Json& row : json) {
    if (!row.is_array() || row.empty()) {
      throw refuse("a row is no list, or empty");
    }
    std::vector<std::int32_t>& ids = rows.emplace_back();
    for (const Json& id : row) {
      if (!id.is_number_integer() || id.get<std::int64_t>() < 0 ||
          id.get<std::int64_t>() > INT32_MAX) {
        throw refuse("found " + printable(id.dump(), 40));
      }
      ids.push_back(id.get<std::int32_t>());
    }
  }
  return rows;
}

int run_logits(Session& session, const LogitsArguments& arguments) {
  const Context& ctx = session.context();
  const auto rows = read_ids(arguments.ids);
  const Model model = load_model(open_checkpoint(resolve_model(arguments.model)));
  const ModelConfig& config = model.graph.config;
  std::optional<Drafter> drafter;
  if (arguments.mtp) {
    drafter.emplace(ctx, model);
  }
  std::vector<TensorDeclaration> declarations;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const auto length = static_cast<std::int64_t>(rows[i].size());
    declarations.push_back({fmt::format("logits.{}", i), DType::kF32, {length, config.vocab_size}});
    for (std::int64_t layer = 0; arguments.hidden && layer <= config.layers; ++layer) {
      declarations.push_back(
          {fmt::format("hidden.{}.{}", i, layer), DType::kF32, {length, config.hidden_size}});
    }
    if (arguments.mtp && length > 1) {
      declarations.push_back(
          {fmt::format("draft_logits.{}", i), DType::kF32, {length - 1, config.vocab_size}});
    }
  }
  SafetensorsOptions options;
  options.max_file_bytes = UINT64_MAX;
  const SafetensorsLayout layout = plan_safetensors(declarations, options);
  AtomicFile file(arguments.output);
  file.write(layout.files.front().header);
  Decoder decoder(ctx, model);
  const auto put_logits = [&](const std::string& name, std::span<const float> hidden) {
    std::uint64_t offset = layout.slots.at(name).offset;
    decoder.for_logits(hidden, [&](std::int64_t, std::int64_t n, const float* logits) {
      const std::span values(logits, static_cast<std::size_t>(n * config.vocab_size));
      file.write_at(offset, std::as_bytes(values));
      offset += values.size_bytes();
    });
  };
  Json ties = Json::array();
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const auto put_hidden = [&](std::int64_t layer, std::span<const float> x) {
      file.write_at(
          layout.slots.at(fmt::format("hidden.{}.{}", i, layer)).offset, std::as_bytes(x));
    };
    Decoder::HiddenObserver observer;
    if (arguments.hidden) {
      // As transformers does: the last entry is after the final norm.
      observer = [&](int layer, std::span<const float> x) {
        if (layer < config.layers) {
          put_hidden(layer, x);
        }
      };
    }
    const std::vector<float> hidden = decoder.forward(rows[i], observer);
    if (arguments.hidden) {
      put_hidden(config.layers, hidden);
    }
    put_logits(fmt::format("logits.{}", i), hidden);
    for (const RouterTie& tie : decoder.router_ties()) {
      ties.push_back({{"row", i}, {"position", tie.position}, {"layer", tie.layer}});
    }
    if (arguments.mtp && rows[i].size() > 1) {
      LayerCache cache;
      const std::vector<float> drafts = drafter->forward(
          std::span(hidden).first(hidden.size() - static_cast<std::size_t>(config.hidden_size)),
          std::span(rows[i]).subspan(1),
          cache);
      put_logits(fmt::format("draft_logits.{}", i), drafts);
      for (const std::int64_t position : cache.router_ties) {
        ties.push_back({{"row", i}, {"position", position}, {"layer", config.layers}});
      }
    }
  }
  file.commit();
  session.print_json(
      {{"schema", "quern.logits/1"},
       {"output", arguments.output},
       {"rows", rows.size()},
       {"router_ties", std::move(ties)}});
  ctx.log.info(fmt::format("{}: logits of {} rows", arguments.output, rows.size()));
  return 0;
}

}  // namespace

std::function<int(Session&)> configure_logits(CLI::App& app) {
  auto arguments = std::make_shared<LogitsArguments>();
  app.add_option("MODEL", arguments->model, "checkpoint directory, or a .gguf file")->required();
  app.add_option(
         "--ids",
         arguments->ids,
         "JSON list of lists of token ids, or a .safetensors file with input_ids")
      ->required();
  app.add_option(
         "-o,--output", arguments->output, "file to write: logits.0 … float32 [length, vocab]")
      ->required();
  app.add_flag("--hidden", arguments->hidden, "also the residual stream hidden.i.j before layer j");
  app.add_flag(
      "--mtp",
      arguments->mtp,
      "also the draft layer's draft_logits.i [length - 1, vocab]: row t sees tokens 0 to t + 1, "
      "for "
      "token t + 2");
  add_footer(app, "  quern logits ./model --ids ids.json -o logits.safetensors\n");
  return [arguments](Session& session) { return run_logits(session, *arguments); };
}

}  // namespace quern
