// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "base/file.h"
#include "cli/verb.h"
#include "format/checkpoint.h"
#include "format/safetensors_writer.h"
#include "nn/decoder.h"
#include "nn/mtp.h"
#include "nn/vision.h"
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
  std::string images;
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

using Paths = std::vector<std::filesystem::path>;

// One list of image files a row; a file that is not there is looked for beside `path`.
std::vector<Paths> read_image_lists(const std::filesystem::path& path, std::size_t rows) {
  const Json json = read_json(path);
  const auto refuse = [&](const std::string& found) {
    return ParseError(
        "not one list of image files for each row of ids",
        path.string(),
        found,
        R"(write it like [["cat.png"], [], ["a.jpg", "b.webp"]])");
  };
  if (!json.is_array() || json.size() != rows) {
    throw refuse(fmt::format("expected a JSON list of {} lists", rows));
  }
  std::vector<Paths> lists;
  for (const Json& row : json) {
    Paths& files = lists.emplace_back();
    if (!row.is_array()) {
      throw refuse("found " + printable(row.dump(), 40));
    }
    for (const Json& name : row) {
      if (!name.is_string()) {
        throw refuse("found " + printable(name.dump(), 40));
      }
      const std::filesystem::path file(name.get<std::string>());
      const bool is_here = file.is_absolute() || std::filesystem::exists(file);
      files.push_back(is_here ? file : path.parent_path() / file);
    }
  }
  return lists;
}

// A row of the ids with its images; without images the features are empty.
struct Row {
  std::vector<PreparedImage> images;
  ImagePrompt prompt;
};

std::vector<Row> read_rows(
    const LogitsArguments& arguments, const std::optional<VisionTower>& vision) {
  const auto ids = read_ids(arguments.ids);
  std::vector<Paths> files(ids.size());
  if (!arguments.images.empty()) {
    files = read_image_lists(arguments.images, ids.size());
  }
  std::vector<Row> rows(ids.size());
  for (std::size_t i = 0; i < rows.size(); ++i) {
    for (const std::filesystem::path& file : files[i]) {
      rows[i].images.push_back(vision->prepare(file));
    }
    if (rows[i].images.empty()) {
      rows[i].prompt.ids = ids[i];
    } else {
      rows[i].prompt =
          vision->plan(ids[i], rows[i].images, fmt::format("{}: row {}", arguments.ids, i));
    }
  }
  return rows;
}

std::vector<TensorDeclaration> declare(
    const std::vector<Row>& rows,
    const ModelConfig& config,
    const std::optional<VisionTower>& vision,
    const LogitsArguments& arguments) {
  std::vector<TensorDeclaration> declarations;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const auto length = static_cast<std::int64_t>(rows[i].prompt.ids.size());
    declarations.push_back({fmt::format("logits.{}", i), DType::kF32, {length, config.vocab_size}});
    for (std::int64_t layer = 0; arguments.hidden && layer <= config.layers; ++layer) {
      declarations.push_back(
          {fmt::format("hidden.{}.{}", i, layer), DType::kF32, {length, config.hidden_size}});
    }
    std::int64_t patches = 0;
    for (const PreparedImage& image : rows[i].images) {
      patches += image.patches();
    }
    if (patches > 0) {
      const VisionConfig& tower = vision->config();
      declarations.push_back(
          {fmt::format("pixel_values.{}", i), DType::kF32, {patches, tower.patch_values()}});
      declarations.push_back(
          {fmt::format("image_features.{}", i),
           DType::kF32,
           {patches / tower.merged_patches(), tower.out_size}});
    }
    if (arguments.mtp && length > 1) {
      declarations.push_back(
          {fmt::format("draft_logits.{}", i), DType::kF32, {length - 1, config.vocab_size}});
    }
  }
  return declarations;
}

// Runs the images of row `i` through the tower; writes what goes in and what comes out.
void add_features(
    std::size_t i,
    const std::vector<PreparedImage>& images,
    const SafetensorsLayout& layout,
    VisionTower& vision,
    AtomicFile& file,
    ImagePrompt& prompt) {
  std::uint64_t pixels_at = layout.slots.at(fmt::format("pixel_values.{}", i)).offset;
  for (const PreparedImage& image : images) {
    const std::vector<float> patches = vision.patches(image);
    file.write_at(pixels_at, std::as_bytes(std::span(patches)));
    pixels_at += patches.size() * sizeof(float);
    const std::vector<float> features = vision.features(image, patches);
    prompt.features.insert(prompt.features.end(), features.begin(), features.end());
  }
  file.write_at(
      layout.slots.at(fmt::format("image_features.{}", i)).offset,
      std::as_bytes(std::span(prompt.features)));
}

int run_logits(Session& session, const LogitsArguments& arguments) {
  const Context& ctx = session.context();
  const Model model = load_model(open_checkpoint(resolve_model(arguments.model)));
  const ModelConfig& config = model.graph.config;
  if (arguments.mtp && !arguments.images.empty()) {
    throw UnsupportedError(
        "no drafts after images",
        "--mtp --images",
        "the draft layer reads embeddings of tokens only",
        "leave one of them out");
  }
  std::optional<VisionTower> vision;
  std::optional<Drafter> drafter;
  if (!arguments.images.empty()) {
    vision.emplace(ctx, model);
  }
  if (arguments.mtp) {
    drafter.emplace(ctx, model);
  }
  std::vector<Row> rows = read_rows(arguments, vision);
  SafetensorsOptions options;
  options.max_file_bytes = UINT64_MAX;
  const SafetensorsLayout layout =
      plan_safetensors(declare(rows, config, vision, arguments), options);
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
    std::vector<float> hidden;
    if (rows[i].images.empty()) {
      hidden = decoder.forward(rows[i].prompt.ids, observer);
    } else {
      add_features(i, rows[i].images, layout, *vision, file, rows[i].prompt);
      Sequence sequence;
      sequence.images = std::make_shared<const ImagePrompt>(std::move(rows[i].prompt));
      hidden = decoder.forward(sequence.images->ids, sequence, observer);
      rows[i] = {};
    }
    if (arguments.hidden) {
      put_hidden(config.layers, hidden);
    }
    put_logits(fmt::format("logits.{}", i), hidden);
    for (const RouterTie& tie : decoder.router_ties()) {
      ties.push_back({{"row", i}, {"position", tie.position}, {"layer", tie.layer}});
    }
    const std::vector<std::int32_t>& ids = rows[i].prompt.ids;
    if (arguments.mtp && ids.size() > 1) {
      LayerCache cache;
      const std::vector<float> drafts = drafter->forward(
          std::span(hidden).first(hidden.size() - static_cast<std::size_t>(config.hidden_size)),
          std::span(ids).subspan(1),
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
  app.add_option(
      "--images",
      arguments->images,
      "JSON list with one list of image files a row (PNG, JPEG, WebP); also writes pixel_values.i "
      "and image_features.i");
  app.add_flag("--hidden", arguments->hidden, "also the residual stream hidden.i.j before layer j");
  app.add_flag(
      "--mtp",
      arguments->mtp,
      "also the draft layer's draft_logits.i [length - 1, vocab]: row t sees tokens 0 to t + 1, "
      "for "
      "token t + 2");
  add_footer(
      app,
      "  quern logits ./model --ids ids.json -o logits.safetensors\n  quern logits ./model --ids "
      "ids.json "
      "--images images.json -o logits.safetensors\n");
  return [arguments](Session& session) { return run_logits(session, *arguments); };
}

}  // namespace quern
