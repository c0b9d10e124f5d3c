// SPDX-License-Identifier: Apache-2.0
#include "report/report.h"

#include "report/charts.h"
#include "report/comparison.h"
#include "report/html_writer.h"
#include "report/yaml.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cmath>
#include <sstream>
#include <string>
#include <vector>

namespace quern {
namespace {

// A run of `layers` layers as quantize records it.
Json make_manifest(int layers) {
  Json linears = Json::array();
  const std::array<const char*, 7> roles = {"q", "k", "v", "o", "gate", "up", "down"};
  const std::array<int, 7> outs = {2048, 256, 256, 2048, 6144, 6144, 2048};
  for (int layer = 0; layer < layers; ++layer) {
    for (std::size_t i = 0; i < roles.size(); ++i) {
      const char* block = i < 4 ? "self_attn" : "mlp";
      const int in = i == 6 ? 6144 : 2048;
      const double rounding = 1e-3 * (1 + 0.7 * static_cast<double>(i)) * (1 + 0.11 * layer);
      const bool fell_back = layer == 3 && i == 6;
      const double error = fell_back ? rounding : rounding * (0.3 + 0.02 * ((layer * 7 + 5) % 19));
      linears.push_back(
          {{"name", fmt::format("model.layers.{}.{}.{}_proj", layer, block, roles.at(i))},
           {"layer", layer},
           {"role", roles.at(i)},
           {"shape", {outs.at(i), in}},
           {"method", fell_back ? "rtn" : "gptq"},
           {"bits", 4},
           {"group_size", 128},
           {"symmetric", true},
           {"order", "group-aware"},
           {"tokens", 65536},
           {"relative_error", error},
           {"holdout_error", error * 1.08},
           {"rtn_error", rounding},
           {"damping", 0.01},
           {"dead_columns", 0},
           {"fallback", nullptr},
           {"rule", nullptr},
           {"seconds", 1.5},
           {"bytes", outs.at(i) * in * 0.53125}});
      if (fell_back) {
        linears.back()["fallback"] = "the second moment matrix is not positive definite";
      }
    }
  }
  double bytes = 0;
  for (const Json& linear : linears) {
    bytes += linear["bytes"].get<double>();
  }
  Json kept = Json::array();
  kept.push_back(
      {{"name", "model.embed_tokens.weight"},
       {"dtype", "BF16"},
       {"bytes", 151936 * 2048 * 2},
       {"reason", "embedding"}});
  for (int layer = 0; layer < layers; ++layer) {
    kept.push_back(
        {{"name", fmt::format("model.layers.{}.input_layernorm.weight", layer)},
         {"dtype", "BF16"},
         {"bytes", 4096},
         {"reason", "not a linear"}});
  }
  const double total = bytes + 151936.0 * 2048 * 2 + 4096.0 * layers + 90000;
  return {
      {"schema", "quern.quantize/1"},
      {"program", {{"version", "0.1.0"}, {"commit", "580adff0c0de"}, {"isa", "avx2"}}},
      {"output", "out"},
      {"source",
       {{"id", "Qwen/Qwen3-1.7B"},
        {"bytes", 3441000000},
        {"parameters", 1720000000},
        {"bits_per_weight", 16.005},
        {"files",
         {{{"name", "model.safetensors"},
           {"size", 3441000000},
           {"sha256", std::string(64, 'a')}}}}}},
      {"format", "gptq"},
      {"method", "gptq"},
      {"bits_per_weight", 8 * total / 1720000000},
      {"bytes", total},
      {"parameters", 1720000000},
      {"seconds", 1843.2},
      {"cpu_seconds", 27000.5},
      {"peak_rss_bytes", 5200000000},
      {"peak_anonymous_bytes", 2100000000},
      {"seed", 0},
      {"options",
       {{"bits", 4}, {"group_size", 128}, {"symmetric", true}, {"order", "group-aware"}}},
      {"calibration",
       {{"samples", 128},
        {"tokens", 65536},
        {"length", 512},
        {"sha256", std::string(64, 'b')},
        {"sources", {"default.jsonl"}}}},
      {"linears", linears},
      {"kept", kept},
      {"census", {{"in", 311}, {"out", 703}, {"skipped", Json::array()}}},
      {"predicted",
       {{"bytes", total}, {"peak_rss_bytes", 5600000000}, {"seconds", 1700}, {"kl", nullptr}}},
      {"command", "quern quantize Qwen/Qwen3-1.7B -o out --bits 4"}};
}

Json make_eval(double perplexity, bool with_divergence) {
  Json eval = {
      {"schema", "quern.eval/1"},
      {"model", "m"},
      {"perplexity",
       {{"wiki.test.raw",
         {{"ppl", perplexity},
          {"nll_mean", std::log(perplexity)},
          {"nll_stderr", 0.004},
          {"tokens", 299008},
          {"windows", 146},
          {"context", 2048},
          {"protocol", "gptq"}}}}},
      {"tasks", {{"piqa", {{"n", 1838}, {"acc", 0.72}, {"acc_stderr", 0.01}, {"shots", 0}}}}},
      {"seconds", 812.5},
      {"tokens_per_second", 368},
      {"peak_rss_bytes", 4100000000}};
  if (with_divergence) {
    eval["divergence"]["wiki.test.raw"] = {
        {"kl_mean", 0.0312},
        {"kl_stderr", 0.0004},
        {"kl_median", 0.011},
        {"kl_p99", 0.31},
        {"top1_agreement", 0.921},
        {"ppl_ratio", 1.014},
        {"tokens", 298862}};
  }
  return eval;
}

ReportData make_data(int layers) {
  return {make_manifest(layers), make_eval(16.71, false), make_eval(16.94, true)};
}

// The first fault of the markup as XML sees it (but for the doctype and the raw text of <style> and
// <script>), or nothing. An element or attribute that text broke open shows up here.
std::string fault_of(const std::string& html) {
  std::vector<std::string> open;
  std::size_t at = html.find('>') + 1;
  while (at < html.size()) {
    if (html[at] == '&') {
      const std::size_t end = html.find(';', at);
      const std::string name = html.substr(at, end == std::string::npos ? 12 : end - at + 1);
      const std::array<const char*, 5> known = {"&amp;", "&lt;", "&gt;", "&quot;", "&#39;"};
      if (std::find(known.begin(), known.end(), name) == known.end()) {
        return "entity " + name;
      }
    }
    if (html[at] == '>') {
      return "stray > near " + html.substr(at - std::min<std::size_t>(at, 20), 40);
    }
    if (html[at] != '<') {
      ++at;
      continue;
    }
    const std::size_t end = html.find('>', at);
    if (end == std::string::npos) {
      return "a tag without an end";
    }
    const std::string tag = html.substr(at + 1, end - at - 1);
    at = end + 1;
    if (tag.front() == '/') {
      if (open.empty() || open.back() != tag.substr(1)) {
        return "unexpected <" + tag + ">";
      }
      open.pop_back();
      continue;
    }
    if (tag.find('<') != std::string::npos || std::count(tag.begin(), tag.end(), '"') % 2 != 0) {
      return "broken tag " + tag;
    }
    const std::string name = tag.substr(0, tag.find_first_of(" /"));
    if (!std::all_of(
            name.begin(), name.end(), [](unsigned char c) { return std::isalnum(c) != 0; })) {
      return "tag name " + name;
    }
    if (tag.back() == '/') {
      continue;
    }
    open.push_back(name);
    if (name == "style" || name == "script") {
      at = html.find("</" + name, at);
    }
  }
  return open.empty() ? "" : "open at the end: " + open.back();
}

std::string embedded_json(const std::string& html) {
  const std::string begin = "<script type=\"application/json\" id=\"quern-report\">";
  const std::size_t from = html.find(begin) + begin.size();
  return html.substr(from, html.find("</script>", from) - from);
}

void expect_self_contained(const std::string& html) {
  for (const char* reference :
       {"http://", "https://", " src=", " href=", "url(", "@import", "<link", "<img", "<iframe"}) {
    EXPECT_EQ(html.find(reference), std::string::npos) << reference;
  }
  // One script block, which is data.
  EXPECT_EQ(html.find("<script"), html.rfind("<script"));
  EXPECT_NE(html.find("<script type=\"application/json\""), std::string::npos);
}

TEST(HtmlEscaping, LeavesNothingThatActs) {
  EXPECT_EQ(escape_html("<script>&\"'"), "&lt;script&gt;&amp;&quot;&#39;");
  EXPECT_EQ(escape_html(std::string_view("a\0b", 3)), "a\\u{0}b");
  EXPECT_EQ(escape_html("a\x1b[31m"), "a\\u{1b}[31m");
  EXPECT_EQ(escape_html("\xff\xc3"), "\\xff\\xc3");  // not UTF-8, and cut short
  EXPECT_EQ(escape_html("\xe2\x80\xae"), "\\u{202e}");  // right-to-left override
  EXPECT_EQ(escape_html("层 ±\n\t"), "层 ±\n\t");
}

TEST(HtmlEscaping, EmbeddedJsonCannotEndItsBlock) {
  const Json value = {{"</script><!--", "]]>&\xff"}};
  const std::string text = script_json(value);
  EXPECT_EQ(text.find('<'), std::string::npos);
  EXPECT_EQ(text.find('>'), std::string::npos);
  EXPECT_EQ(parse_json(text, "embedded").begin().key(), "</script><!--");
}

TEST(HtmlWriter, RefusesUnbalancedMarkup) {
  HtmlWriter html;
  EXPECT_THROW(html.close(), std::logic_error);
  html.open("p");
  EXPECT_THROW(static_cast<void>(html.take()), std::logic_error);
  html.close();
  EXPECT_EQ(html.take(), "<p></p>");
}

TEST(HtmlReport, IsWellFormedSelfContainedAndSmall) {
  for (const int layers : {1, 28, 100}) {
    const std::string html = render_html_report(make_data(layers));
    EXPECT_EQ(fault_of(html), "") << layers;
    expect_self_contained(html);
    EXPECT_LT(html.size(), 1'500'000U) << layers;
  }
}

TEST(HtmlReport, SaysWhatTheRunSays) {
  const std::string html = render_html_report(make_data(28));
  for (const char* text :
       {"Qwen/Qwen3-1.7B",
        "gptq, 4 bit, groups of 128",
        "mean KL 0.03120 nats a token on wiki.test.raw, below 0.05",
        "16.940 ± 0.068",
        "92.10 ± 0.05 %",
        "the second moment matrix is not positive definite",
        "model.embed_tokens.weight",
        "28 norms",
        "quern quantize Qwen/Qwen3-1.7B -o out --bits 4",
        "aaaaaaaaaaaaaaaa",
        "layers 0 to 13",
        "layers 14 to 27"}) {
    EXPECT_NE(html.find(text), std::string::npos) << text;
  }
}

TEST(HtmlReport, CarriesItsDataForReadingBack) {
  const ReportData data = make_data(28);
  const Json back = parse_json(embedded_json(render_html_report(data)), "embedded");
  EXPECT_EQ(back["schema"], "quern.report/1");
  EXPECT_EQ(back["manifest"], data.manifest);
  EXPECT_EQ(back["original_eval"], *data.original_eval);
  EXPECT_EQ(back["result_eval"], *data.result_eval);
}

TEST(HtmlReport, HostileNamesStayText) {
  ReportData data = make_data(2);
  const std::string hostile =
      "x\"><script>alert(1)</script><img onerror='y'>\x01\x7f]]>--></style>&lt;\xff";
  Json& manifest = data.manifest;
  for (const char* key : {"name", "role", "fallback", "rule", "method"}) {
    manifest["linears"][0][key] = hostile;
  }
  for (const char* key : {"name", "dtype", "reason"}) {
    manifest["kept"][0][key] = hostile;
  }
  manifest["source"]["id"] = hostile;
  manifest["source"]["files"][0]["name"] = hostile;
  manifest["format"] = hostile;
  manifest["command"] = hostile;
  manifest["options"][hostile] = hostile;
  manifest["program"]["isa"] = hostile;
  manifest["census"]["skipped"].push_back({{"name", hostile}, {"reason", hostile}});
  (*data.result_eval)["perplexity"][hostile] = (*data.result_eval)["perplexity"]["wiki.test.raw"];
  (*data.result_eval)["divergence"][hostile] = (*data.result_eval)["divergence"]["wiki.test.raw"];
  (*data.result_eval)["tasks"][hostile] = (*data.result_eval)["tasks"]["piqa"];

  const std::string html = render_html_report(data);
  EXPECT_EQ(fault_of(html), "");
  EXPECT_EQ(html.find("<script>"), std::string::npos);
  EXPECT_EQ(html.find("<img"), std::string::npos);
  EXPECT_TRUE(std::none_of(html.begin(), html.end(), [](unsigned char c) {
    return (c < 0x20 && c != '\n' && c != '\t') || c == 0x7f;
  }));
  EXPECT_FALSE(render_text_summary(data).empty());

  const std::string card = render_model_card(manifest, {}, data.original_eval, data.result_eval);
  const std::size_t begin = card.find("\n---\n");
  const std::string prose = card.substr(begin, card.find("## Command") - begin);
  EXPECT_EQ(prose.find("<script>"), std::string::npos);
}

TEST(HtmlReport, EmptyAndOddManifestsAreRendered) {
  ReportData data{make_manifest(2), std::nullopt, std::nullopt};
  EXPECT_NE(
      render_html_report(data).find("Neither model was evaluated in this run."), std::string::npos);

  data.manifest["linears"] = Json::array();
  std::string html = render_html_report(data);
  EXPECT_EQ(fault_of(html), "");
  EXPECT_NE(html.find("No linear was quantized."), std::string::npos);

  for (
      const char* text :
      {"{}",
       "[]",
       "null",
       "3",
       R"({"linears": 7, "kept": "x", "source": [], "bytes": "many", "options": 1})",
       R"({"linears": [null, 3, {"layer": -1, "bits": "x", "shape": ["a", null], "relative_error": 0},
            {"layer": 1e300, "relative_error": -1, "rtn_error": 0, "group_size": -1}]})",
       R"({"linears": [{"layer": 900000, "role": "q", "relative_error": 0.1, "rtn_error": 1e-30}],
            "evaluation": {"divergence": {"f": 3, "g": {"kl_mean": 0.5}}, "perplexity": []}})"}) {
    const ReportData odd{parse_json(text, "odd"), Json(3), std::nullopt};
    html = render_html_report(odd);
    EXPECT_EQ(fault_of(html), "") << text;
    EXPECT_LT(html.size(), 100'000U) << text;
    EXPECT_FALSE(render_model_card(odd.manifest).empty());
  }
}

TEST(HtmlReport, ManyExpertsShareACell) {
  ReportData data = make_data(2);
  const Json one = data.manifest["linears"][4];
  data.manifest["linears"] = Json::array();
  for (int expert = 0; expert < 6000; ++expert) {
    Json linear = one;
    linear["name"] = fmt::format("model.layers.0.mlp.experts.{}.gate_proj", expert);
    linear["relative_error"] = 1e-4 * (1 + expert % 7);
    linear["rtn_error"] = 2 * linear["relative_error"].get<double>();
    linear["fallback"] = "no token came by";
    data.manifest["linears"].push_back(linear);
  }
  const std::string html = render_html_report(data);
  EXPECT_NE(html.find("the largest of 6000, median 0.0004"), std::string::npos);
  EXPECT_NE(html.find("the median of 6000"), std::string::npos);
  EXPECT_NE(html.find("And 5800 more."), std::string::npos);
  EXPECT_LT(html.size(), 1'500'000U);
  EXPECT_EQ(parse_json(embedded_json(html), "embedded")["manifest"]["linears_omitted"], 6000);
}

TEST(Charts, TextIsReadableOnEveryColour) {
  for (int i = 0; i <= 100; ++i) {
    const std::string colour = palette(i / 100.0);
    EXPECT_EQ(colour.size(), 7U);
    EXPECT_TRUE(
        std::string(text_colour_on(colour)) == "#000000" ||
        std::string(text_colour_on(colour)) == "#ffffff");
  }
  EXPECT_STREQ(text_colour_on(palette(0)), "#ffffff");
  EXPECT_STREQ(text_colour_on(palette(1)), "#000000");
  EXPECT_EQ(palette(-3), palette(0));
}

TEST(Verdict, FollowsItsThresholds) {
  ReportData data = make_data(1);
  Json& entry = (*data.result_eval)["divergence"]["wiki.test.raw"];
  EXPECT_EQ(judge(data).kind, VerdictKind::kPass);
  entry["kl_mean"] = kPassBelow;
  EXPECT_EQ(judge(data).kind, VerdictKind::kWarn);
  entry["kl_mean"] = kWarnBelow;
  EXPECT_EQ(judge(data).kind, VerdictKind::kFail);
  // The text on which it is worst decides.
  entry["kl_mean"] = 0.001;
  (*data.result_eval)["divergence"]["code.txt"] = {{"kl_mean", 0.1}};
  EXPECT_EQ(judge(data).kind, VerdictKind::kWarn);
  EXPECT_NE(judge(data).reason.find("code.txt"), std::string::npos);
  data.result_eval.reset();
  EXPECT_EQ(judge(data).kind, VerdictKind::kUnmeasured);
}

// Columns of a character terminal; everything in these tables is one column wide.
std::size_t columns_of(const std::string& line) {
  return static_cast<std::size_t>(std::count_if(
      line.begin(), line.end(), [](unsigned char c) { return (c & 0xc0U) != 0x80U; }));
}

TEST(TextSummary, ColumnsAreAligned) {
  std::istringstream text(render_text_summary(make_data(28)));
  std::string line;
  std::vector<std::string> lines;
  while (std::getline(text, line)) {
    EXPECT_NE(line.back(), ' ');
    lines.push_back(line);
  }
  ASSERT_EQ(lines.size(), 9U);  // heading, 7 rows, verdict
  EXPECT_NE(lines.back().find("pass: mean KL"), std::string::npos);
  for (std::size_t i = 0; i + 1 < lines.size(); ++i) {
    EXPECT_EQ(columns_of(lines[i]), columns_of(lines.front())) << lines[i];
    EXPECT_LE(columns_of(lines[i]), 100U) << lines[i];
  }
  EXPECT_NE(lines[3].find("16.710 ± 0.067     16.940 ± 0.068  1.014 x"), std::string::npos)
      << lines[3];
}

TEST(TextSummary, SaysWhatIsMissingAndStaysPrintable) {
  ReportData data{make_manifest(1), std::nullopt, std::nullopt};
  EXPECT_NE(render_text_summary(data).find("not measured:"), std::string::npos);
  data.result_eval = make_eval(9, true);
  (*data.result_eval)["perplexity"]["层\x1b[2J\n"] = {{"ppl", 1e9}};
  const std::string text = render_text_summary(data);
  EXPECT_EQ(text.find('\x1b'), std::string::npos);
  EXPECT_NE(text.find("1e+09"), std::string::npos);
}

TEST(Yaml, QuotesWhatWouldMeanSomethingElse) {
  EXPECT_EQ(yaml_scalar("apache-2.0"), "apache-2.0");
  EXPECT_EQ(yaml_scalar("Qwen/Qwen3-4B"), "Qwen/Qwen3-4B");
  for (const char* text :
       {"",     "no",       "Yes",  "null", "~",   "4-bit", "1e3", "2024-01-01", ".inf",
        "a: b", "a #b",     "- a",  "@x",   "[a]", "{a}",   "'",   "\"",         "a\nb",
        "\\",   "zh-Hans ", "!tag", "&a",   "*a",  "%",     "层"}) {
    const std::string scalar = yaml_scalar(text);
    EXPECT_EQ(scalar.front(), '"') << text;
    EXPECT_EQ(parse_json(scalar, "scalar"), Json(text));
    EXPECT_EQ(scalar.find('\n'), std::string::npos);
  }
}

TEST(ModelCard, HasFrontMatterAndMeasuredValuesOnly) {
  const Json manifest = make_manifest(4);
  CardSource source;
  source.license = "apache-2.0";
  source.languages = {"en", "no"};
  source.pipeline_tag = "text-generation";
  const std::string bare = render_model_card(manifest, source);
  EXPECT_EQ(
      bare.substr(0, bare.find("\n---\n", 4)),
      "---\n"
      "base_model:\n- Qwen/Qwen3-1.7B\n"
      "base_model_relation: quantized\n"
      "license: apache-2.0\n"
      "pipeline_tag: text-generation\n"
      "language:\n- en\n- \"no\"\n"
      "tags:\n- quantized\n- quern\n- \"4-bit\"\n- gptq");
  EXPECT_EQ(bare.find("## Quality"), std::string::npos);
  EXPECT_NE(bare.find("was not measured"), std::string::npos);
  EXPECT_NE(bare.find("quern quantize Qwen/Qwen3-1.7B -o out --bits 4"), std::string::npos);

  const std::string measured =
      render_model_card(manifest, source, make_eval(16.71, false), make_eval(16.94, true));
  EXPECT_NE(measured.find("| perplexity, wiki.test.raw | 16.710 ± 0.067"), std::string::npos);
  EXPECT_EQ(measured.find("peak memory"), std::string::npos);
  EXPECT_EQ(measured.find("was not measured"), std::string::npos);
}

TEST(ModelCard, IsTheSameForTheSameRunOnAnotherDay) {
  Json manifest = make_manifest(4);
  const std::string first =
      render_model_card(manifest, {}, make_eval(16.71, false), make_eval(16.94, true));
  manifest["seconds"] = 1;
  manifest["cpu_seconds"] = 1;
  manifest["peak_rss_bytes"] = 1;
  manifest["predicted"]["seconds"] = 1;
  Json eval = make_eval(16.94, true);
  eval["seconds"] = 1;
  eval["peak_rss_bytes"] = 2;
  EXPECT_EQ(render_model_card(manifest, {}, make_eval(16.71, false), eval), first);
}

TEST(ModelCard, KnowsWhetherItWasEdited) {
  const std::string card = render_model_card(make_manifest(1));
  EXPECT_TRUE(is_unedited_card(card));
  std::string edited = card;
  edited.replace(edited.find("## Limits"), 9, "## limits");
  EXPECT_FALSE(is_unedited_card(edited));
  EXPECT_FALSE(is_unedited_card(card + "more\n"));
  EXPECT_FALSE(is_unedited_card(""));
}

TEST(ModelCard, LocalFoldersAndFencesStayInside) {
  Json manifest = make_manifest(1);
  manifest["source"]["id"] = "/home/someone/models/tiny|model";
  manifest["command"] = "quern quantize '````' -o x";
  const std::string card = render_model_card(manifest);
  EXPECT_EQ(card.find("base_model:"), std::string::npos);
  EXPECT_EQ(card.find("someone"), std::string::npos);
  EXPECT_NE(card.find("# tiny\\|model, quantized"), std::string::npos);
  EXPECT_NE(card.find("`````sh\nquern quantize '````' -o x\n`````"), std::string::npos);
}

}  // namespace
}  // namespace quern
