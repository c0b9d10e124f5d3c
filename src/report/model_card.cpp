// SPDX-License-Identifier: Apache-2.0
#include "base/file.h"
#include "base/units.h"
#include "report/comparison.h"
#include "report/facts.h"
#include "report/report.h"
#include "report/yaml.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <map>

namespace quern {
namespace {

constexpr std::string_view kSeal = "<!-- quern card, sha256 of the text above: ";
constexpr std::string_view kSealEnd = " -->\n";

// Text of a file inside Markdown prose or a table: nothing in it is markup, and it stays one line.
std::string escape_markdown(std::string_view text) {
  static constexpr std::string_view kMarkup = "\\`*_{}[]()#+!|~&$";
  std::string out;
  for (const char c : text) {
    if (c == '<' || c == '>') {
      out += c == '<' ? "&lt;" : "&gt;";
    } else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
      out += ' ';
    } else {
      if (kMarkup.find(c) != std::string_view::npos) {
        out += '\\';
      }
      out += c;
    }
  }
  return out;
}

// A fence longer than any run of backticks inside it.
std::string code_block(const std::string& text, const char* language) {
  std::size_t longest = 0;
  std::size_t run = 0;
  for (const char c : text) {
    run = c == '`' ? run + 1 : 0;
    longest = std::max(longest, run);
  }
  const std::string fence(std::max<std::size_t>(3, longest + 1), '`');
  return fmt::format("{}{}\n{}\n{}\n", fence, language, text, fence);
}

// "org/name" of "org/name@revision"; empty for what is not an id of a hub, such as a local folder.
std::string hub_id(const std::string& source) {
  const std::string id = source.substr(0, source.find('@'));
  const auto good = [](unsigned char c) {
    return std::isalnum(c) != 0 || c == '-' || c == '_' || c == '.' || c == '/';
  };
  const bool shaped = std::count(id.begin(), id.end(), '/') == 1 && id.front() != '/' &&
                      id.back() != '/' && id.front() != '.' &&
                      std::all_of(id.begin(), id.end(), good);
  return shaped ? id : std::string();
}

// The last part of an id or path, without a revision.
std::string base_name(const std::string& source) {
  const std::string id = hub_id(source).empty() ? source : hub_id(source);
  const auto slash = id.find_last_of('/');
  return slash == std::string::npos ? id : id.substr(slash + 1);
}

void append_key(std::string& out, const char* key, const std::string& value) {
  if (!value.empty()) {
    out += fmt::format("{}: {}\n", key, yaml_scalar(value));
  }
}

void append_list(std::string& out, const char* key, const std::vector<std::string>& values) {
  if (values.empty()) {
    return;
  }
  out += fmt::format("{}:\n", key);
  for (const std::string& value : values) {
    out += fmt::format("- {}\n", yaml_scalar(value));
  }
}

std::vector<std::string> tags_of(const Json& manifest) {
  std::vector<std::string> tags = {"quantized", "quern"};
  if (const auto bits = find_number(manifest, {"options", "bits"})) {
    tags.push_back(fmt::format("{:g}-bit", *bits));
  }
  for (const char* key : {"method", "format"}) {
    const std::string tag = find_text(manifest, {key});
    if (!tag.empty() && std::find(tags.begin(), tags.end(), tag) == tags.end()) {
      tags.push_back(tag);
    }
  }
  return tags;
}

std::string front_matter(const Json& manifest, const CardSource& source) {
  std::string out = "---\n";
  if (const std::string id = hub_id(find_text(manifest, {"source", "id"})); !id.empty()) {
    append_list(out, "base_model", {id});
  }
  out += "base_model_relation: quantized\n";
  append_key(out, "license", source.license);
  append_key(out, "license_name", source.license_name);
  append_key(out, "license_link", source.license_link);
  append_key(out, "library_name", source.library_name);
  append_key(out, "pipeline_tag", source.pipeline_tag);
  append_list(out, "language", source.languages);
  append_list(out, "tags", tags_of(manifest));
  return out + "---\n\n";
}

std::string introduction(const Json& manifest, const CardSource& source) {
  const std::string id = find_text(manifest, {"source", "id"});
  const std::string name = id.empty() ? "the source model" : base_name(id);
  std::string out = fmt::format("# {}, quantized\n\n", escape_markdown(name));
  out += fmt::format(
      "A quantized copy of {}", escape_markdown(hub_id(id).empty() ? name : hub_id(id)));
  if (const std::string target = target_of(manifest); !target.empty()) {
    out += " (" + escape_markdown(target) + ")";
  }
  if (const auto bytes = find_number(manifest, {"bytes"})) {
    out += ", " + human_bytes(*bytes);
  }
  if (const auto bits = find_number(manifest, {"bits_per_weight"})) {
    out += fmt::format(", {:.3f} bits per weight with everything counted", *bits);
  }
  out += ".\n\n";
  out += source.license.empty()
             ? "The source states no licence that could be copied; its own terms apply.\n\n"
             : fmt::format(
                   "The licence is that of the source: {}.\n\n", escape_markdown(source.license));
  out += "## How to run it\n\nIn this folder, with quern:\n\n";
  out += code_block(
      "quern generate . --prompt \"Once upon a time\"\nquern eval . --perplexity TEXT", "sh");
  return out + "\n";
}

// Time and memory belong to a machine and a day, not to the model.
bool is_of_the_run(const std::string& label) {
  return label == "evaluation time" || label == "peak memory";
}

std::string quality(const ReportData& data) {
  std::string rows;
  bool measured = false;
  for (const ComparisonRow& row : compare_runs(data)) {
    if (is_of_the_run(row.label)) {
      continue;
    }
    measured = measured || (row.label != "size" && row.label != "bits per weight");
    rows += fmt::format(
        "| {} | {} | {} | {} |\n", escape_markdown(row.label), row.original, row.result, row.ratio);
  }
  if (!measured) {
    return {};
  }
  const Verdict verdict = judge(data);
  return "## Quality\n\nMeasured by quern with the same engine on both models; ± is one standard "
         "error.\n\n| | original | result | ratio |\n| --- | ---: | ---: | ---: |\n" +
         rows +
         fmt::format(
             "\nVerdict: {} ({}). By mean KL in nats a token: pass below {}, warn below {}.\n\n",
             verdict.word,
             escape_markdown(verdict.reason),
             kPassBelow,
             kWarnBelow);
}

std::string kept_section(const Json& manifest) {
  std::map<std::array<std::string, 3>, std::pair<std::size_t, double>> rows;
  for (const KeptFacts& kept : kept_of(manifest)) {
    auto& [count, bytes] = rows[{kept.kind, kept.dtype, kept.reason}];
    ++count;
    bytes += kept.bytes;
  }
  if (rows.empty()) {
    return {};
  }
  std::string out =
      "## Kept unquantized\n\n| tensors | type | count | size | why |\n"
      "| --- | --- | ---: | ---: | --- |\n";
  for (const auto& [key, totals] : rows) {
    out += fmt::format(
        "| {} | {} | {} | {} | {} |\n",
        escape_markdown(key[0]),
        escape_markdown(key[1]),
        totals.first,
        human_bytes(totals.second),
        escape_markdown(key[2]));
  }
  return out + "\n";
}

std::string skipped_section(const Json& manifest) {
  const Json& skipped = find_list(manifest, {"census", "skipped"});
  if (skipped.empty()) {
    return {};
  }
  std::string out = "## Left out\n\nTensors of the source that this copy does not hold:\n\n";
  for (const Json& entry : skipped) {
    out += fmt::format(
        "- {}: {}\n",
        escape_markdown(find_text(entry, {"name"})),
        escape_markdown(find_text(entry, {"reason"})));
  }
  return out + "\n";
}

std::string recipe(const Json& manifest) {
  std::string out = "## Recipe\n\n";
  if (const Json* options = find_json(manifest, {"options"});
      options != nullptr && options->is_object() && !options->empty()) {
    out += "| setting | value |\n| --- | --- |\n";
    for (const auto& item : options->items()) {
      out += fmt::format(
          "| {} | {} |\n", escape_markdown(item.key()), escape_markdown(plain_value(item.value())));
    }
    out += "\n";
  }
  const std::vector<LinearFacts> linears = linears_of(manifest);
  const auto fallbacks = std::count_if(
      linears.begin(), linears.end(), [](const auto& linear) { return !linear.fallback.empty(); });
  out += fmt::format(
      "{} linears were quantized, {} of them by a fallback.", linears.size(), fallbacks);
  if (const auto seed = find_number(manifest, {"seed"})) {
    out += fmt::format(" Seed {:.0f}.", *seed);
  }
  const std::string version = find_text(manifest, {"program", "version"});
  if (!version.empty()) {
    const std::string commit = find_text(manifest, {"program", "commit"});
    out += fmt::format(
        " Made with quern {}{}.",
        escape_markdown(version),
        commit.empty() ? "" : " (" + escape_markdown(commit) + ")");
  }
  return out + "\n\n";
}

std::string calibration(const Json& manifest) {
  const auto tokens = find_number(manifest, {"calibration", "tokens"});
  if (!tokens) {
    return {};
  }
  std::string out = fmt::format("## Calibration\n\n{} tokens", with_thousands(*tokens));
  if (const auto samples = find_number(manifest, {"calibration", "samples"})) {
    out += fmt::format(" in {} samples", with_thousands(*samples));
  }
  out += ".";
  if (const std::string hash = find_text(manifest, {"calibration", "sha256"}); !hash.empty()) {
    out += fmt::format(" SHA-256 of the token ids: {}.", escape_markdown(hash));
  }
  out += "\n\n";
  for (const Json& entry : find_list(manifest, {"calibration", "sources"})) {
    out += fmt::format("- {}\n", escape_markdown(plain_value(entry)));
  }
  return find_list(manifest, {"calibration", "sources"}).empty() ? out : out + "\n";
}

std::string command_section(const Json& manifest) {
  const std::string command = find_text(manifest, {"command"});
  return command.empty() ? std::string() : "## Command\n\n" + code_block(command, "sh") + "\n";
}

std::string limits(const ReportData& data) {
  std::string out =
      "## Limits\n\n"
      "- Rounding changes the model's answers; rare knowledge, long reasoning and languages that "
      "the calibration data lacks suffer first.\n"
      "- Limits and biases of the source model remain.\n";
  if (judge(data).kind == VerdictKind::kUnmeasured) {
    out += "- The distance from the original was not measured for this copy.\n";
  }
  return out;
}

std::string seal_of(std::string_view text) {
  Sha256 hash;
  hash.update(text);
  return hash.hex();
}

}  // namespace

std::string render_model_card(
    const Json& manifest,
    const CardSource& source,
    const std::optional<Json>& original_eval,
    const std::optional<Json>& result_eval) {
  const ReportData data{manifest, original_eval, result_eval};
  const std::string text = front_matter(manifest, source) + introduction(manifest, source) +
                           quality(data) + kept_section(manifest) + skipped_section(manifest) +
                           recipe(manifest) + calibration(manifest) + command_section(manifest) +
                           limits(data) + "\n";
  return text + fmt::format("{}{}{}", kSeal, seal_of(text), kSealEnd);
}

bool is_unedited_card(std::string_view card) {
  const auto seal = card.rfind(kSeal);
  if (seal == std::string_view::npos) {
    return false;
  }
  return card.substr(seal) == fmt::format("{}{}{}", kSeal, seal_of(card.substr(0, seal)), kSealEnd);
}

}  // namespace quern
