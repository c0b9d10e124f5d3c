// SPDX-License-Identifier: Apache-2.0
#include "pipeline/manifest.h"

#include "base/file.h"
#include "kernels/blas.h"
#include "kernels/kernels.h"
#include "quern/version.h"

#include <algorithm>
#include <map>
#include <set>
#include <string_view>
#include <utility>

namespace quern {
namespace {

namespace fs = std::filesystem;

}  // namespace

std::string model_name(const fs::path& directory) {
  const fs::path path = fs::weakly_canonical(fs::absolute(directory));
  const std::string folder = path.parent_path().parent_path().filename().string();
  constexpr std::string_view kCached = "models--";
  const std::size_t split = folder.find("--", kCached.size());
  if (path.parent_path().filename() == "snapshots" && folder.starts_with(kCached) &&
      split != std::string::npos) {
    return folder.substr(kCached.size(), split - kCached.size()) + "/" + folder.substr(split + 2);
  }
  return path.has_filename() ? path.filename().string() : path.parent_path().filename().string();
}

std::int64_t parameters_of(const Checkpoint& source) {
  std::int64_t total = 0;
  for (const auto& [name, view] : source.tensors().tensors()) {
    total += view.count();
  }
  return total;
}

std::int64_t parameters_of(const ModelGraph& graph) {
  std::int64_t total = graph.linear_parameters() + graph.embedding.parameters() +
                       (graph.head_tied ? 0 : graph.head.parameters()) + graph.final_norm.size;
  for (const Block& block : graph.blocks) {
    total +=
        block.attention_norm.size + block.mlp_norm.size + block.q_norm.size + block.k_norm.size;
    for (const Linear& linear : block.linears) {
      total += linear.has_bias ? linear.out_features : 0;
    }
  }
  return total;
}

std::uint64_t tensor_bytes(const Checkpoint& checkpoint) {
  std::uint64_t total = 0;
  for (const auto& [name, view] : checkpoint.tensors().tensors()) {
    total += static_cast<std::uint64_t>(view.count()) * dtype_size(view.dtype);
  }
  return total;
}

double bits_per_weight(std::uint64_t bytes, std::int64_t parameters) {
  return parameters == 0 ? 0.0 : 8.0 * static_cast<double>(bytes) / static_cast<double>(parameters);
}

std::vector<fs::path> weight_files(const fs::path& directory) {
  std::vector<fs::path> files;
  for (const auto& entry : fs::directory_iterator(directory)) {
    const std::filesystem::path extension = entry.path().extension();
    if ((extension == ".safetensors" || extension == ".gguf") && entry.is_regular_file()) {
      files.push_back(entry.path());
    }
  }
  std::sort(files.begin(), files.end());
  return files;
}

Json program_json(const Context& ctx) {
  return {
      {"version", kVersion},
      {"commit", kCommit},
      {"isa", ctx.kernels.isa},
      {"blas", ctx.blas.description()}};
}

Json source_json(const Checkpoint& source, std::int64_t parameters) {
  return {
      {"id", model_name(source.directory())},
      {"bytes", tensor_bytes(source)},
      {"parameters", parameters},
      {"bits_per_weight", bits_per_weight(tensor_bytes(source), parameters)},
      {"files", files_json(source.directory())}};
}

Json files_json(const fs::path& directory) {
  Json files = Json::array();
  for (const fs::path& path : weight_files(directory)) {
    files.push_back(
        {{"name", path.filename().string()},
         {"size", fs::file_size(path)},
         {"sha256", sha256_of_file(path)}});
  }
  return files;
}

Json side_files_json(const SideFiles& files) {
  Json skipped = Json::array();
  for (const auto& file : files.skipped) {
    skipped.push_back({{"name", file.name}, {"reason", file.reason}});
  }
  return {{"copied", files.copied}, {"skipped", std::move(skipped)}};
}

namespace {

Json parts_json(const std::map<std::string, std::int64_t>& tensors) {
  Json list = Json::array();
  for (const auto& [name, parts] : tensors) {
    list.push_back({{"name", name}, {"parts", parts}});
  }
  return list;
}

}  // namespace

Json census_json(const Census& census) {
  Json skipped = Json::array();
  for (const CensusEntry& entry : census.skipped) {
    skipped.push_back({{"name", entry.name}, {"reason", entry.reason}});
  }
  return {
      {"in", census.in},
      {"out", census.out},
      {"divided", parts_json(census.divided)},
      {"merged", parts_json(census.merged)},
      {"skipped", std::move(skipped)}};
}

std::uint64_t total_size(const Json& files) {
  std::uint64_t bytes = 0;
  for (const Json& file : files) {
    bytes += file["size"].get<std::uint64_t>();
  }
  return bytes;
}

Json coverage_json(const ModelGraph& graph, const Json& linears) {
  std::map<std::string, const Json*> reports;
  for (const Json& report : linears) {
    reports.emplace(report["name"].get<std::string>(), &report);
  }
  Json rows = Json::array();
  for (const Block& block : graph.blocks) {
    std::vector<std::int64_t> tokens;
    std::int64_t rare = 0;
    std::int64_t plain = 0;
    for (int expert = 0; block.mixture && expert < block.mixture->experts; ++expert) {
      const auto gate = static_cast<std::size_t>(block.mixture->expert(expert));
      const auto found = reports.find(block.linears[gate].module);
      if (found == reports.end()) {
        continue;
      }
      const Json& report = *found->second;
      tokens.push_back(report["tokens"].get<std::int64_t>());
      rare += report["borrowed_tokens"] != 0 ? 1 : 0;
      plain += report["fallback"].is_null() ? 0 : 1;
    }
    if (tokens.empty()) {
      continue;
    }
    std::sort(tokens.begin(), tokens.end());
    rows.push_back(
        {{"layer", block.index},
         {"experts", tokens.size()},
         {"tokens_least", tokens.front()},
         {"tokens_median", tokens[tokens.size() / 2]},
         {"tokens_most", tokens.back()},
         {"unreached", std::count(tokens.begin(), tokens.end(), 0)},
         {"pooled", rare},
         {"plain", plain}});
  }
  return rows;
}

Json timing_json(const PartTimes& times, double rate_per_core) {
  const auto part = [&](const PartTime& time) -> Json {
    const double rate = time.cpu_seconds > 0 ? time.work / time.cpu_seconds : 0;
    return {
        {"seconds", time.seconds},
        {"cpu_seconds", time.cpu_seconds},
        {"gflops_per_cpu_second", 2e-9 * rate},
        {"share_of_gemm_rate", rate_per_core > 0 ? rate / rate_per_core : 0}};
  };
  return {
      {"gemm_gflops_per_core", 2e-9 * rate_per_core},
      {"second_moments", part(times.gather)},
      {"rounding", part(times.round)},
      {"forward", part(times.apply)}};
}

Json kept_json(const PreparedRun& run) {
  std::set<std::string> replaced;
  for (const PlannedLinear& linear : run.plan.linears) {
    if (!linear.keep()) {
      replaced.insert(linear.name + ".weight");
    }
  }
  Json kept = Json::array();
  for (const auto& [name, view] : run.source->tensors().tensors()) {
    if (replaced.contains(name) || is_dropped(run, name)) {
      continue;
    }
    std::string reason = "norm or bias";
    if (name == run.graph.embedding.weight()) {
      reason = run.graph.head_tied ? "embedding, tied with the head" : "embedding";
    } else if (name == run.graph.head.module + ".weight") {
      reason = "head";
    } else if (
        run.plan.find(name.substr(0, name.rfind('.'))) != nullptr && name.ends_with(".weight")) {
      reason = "the plan keeps it";
    }
    kept.push_back(
        {{"name", name},
         {"dtype", dtype_name(view.dtype)},
         {"bytes", view.bytes.size()},
         {"reason", reason}});
  }
  return kept;
}

Json calibration_json(const CalibrationSet& calibration) {
  return {
      {"samples", calibration.sequences.size()},
      {"tokens", calibration.tokens()},
      {"length", calibration.sequences.empty() ? 0 : calibration.sequences.front().size()},
      {"sha256", calibration.sha256},
      {"sources", calibration.sources}};
}

Json planning_json(const PlanRecord& planning) {
  if (planning.budget.is_null()) {
    return nullptr;
  }
  return {
      {"budget", planning.budget},
      {"constraints", planning.constraints},
      {"additivity", planning.additivity ? additivity_json(*planning.additivity) : Json(nullptr)},
      {"seconds", planning.seconds}};
}

}  // namespace quern
