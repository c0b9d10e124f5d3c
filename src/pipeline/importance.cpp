// SPDX-License-Identifier: Apache-2.0
#include "pipeline/importance.h"

#include "base/error.h"
#include "base/file.h"
#include "format/gguf_names.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace quern {
namespace {

namespace fs = std::filesystem;

const ImatrixEntry* find_entry(const Imatrix& imatrix, const Linear& linear) {
  const auto name = gguf_tensor_name(linear.weight());
  const auto found = name ? imatrix.entries.find(*name) : imatrix.entries.end();
  return found == imatrix.entries.end() ? nullptr : &found->second;
}

}  // namespace

CalibrationSet calibration_of(const Imatrix& imatrix, const fs::path& path) {
  CalibrationSet set;
  set.sha256 = sha256_of_file(path);
  set.sources = imatrix.datasets;
  set.sources.push_back(path.filename().string());
  return set;
}

void check_importance_names(const ModelGraph& graph) {
  for (const Block& block : graph.blocks) {
    for (const Linear& linear : block.linears) {
      if (!gguf_tensor_name(linear.weight())) {
        throw UnsupportedError(
            "importance files are for dense models",
            linear.module,
            graph.config.family + " has linears that quern has no name for in them",
            "leave out --imatrix and --imatrix-out");
      }
    }
  }
}

void check_imatrix(const Imatrix& imatrix, const ModelGraph& graph, const fs::path& path) {
  int known = 0;
  for (const Block& block : graph.blocks) {
    for (const Linear& linear : block.linears) {
      const ImatrixEntry* entry = find_entry(imatrix, linear);
      if (entry == nullptr) {
        continue;
      }
      ++known;
      const std::size_t width = entry->sums.size();
      if (width != static_cast<std::size_t>(linear.in_features)) {
        throw UsageError(
            "an importance matrix of another model",
            "--imatrix " + path.string() + ", " + linear.module,
            fmt::format("expected {} columns, found {}", linear.in_features, width),
            "make one of this model with quern quantize --imatrix-out, or with llama.cpp");
      }
    }
  }
  if (known == 0) {
    throw UsageError(
        "an importance matrix of another model",
        "--imatrix " + path.string(),
        "it names none of the linears",
        "make one of this model with quern quantize --imatrix-out, or with llama.cpp");
  }
}

bool is_imatrix_file(const fs::path& file) {
  try {
    (void)read_imatrix(file);
    return true;
  } catch (const Error&) {
    return false;
  }
}

void write_imatrix_of(
    const PartSource& parts,
    const ModelGraph& graph,
    const CalibrationSet& calibration,
    const fs::path& path) {
  Imatrix imatrix;
  for (const std::string& part : all_parts(graph)) {
    for (const InputSquares& inputs : parts(part).inputs) {
      if (const auto name = gguf_tensor_name(inputs.name + ".weight")) {
        imatrix.entries[*name] = {inputs.sums, {static_cast<float>(inputs.rows)}};
      }
    }
  }
  if (imatrix.entries.empty()) {
    throw UsageError(
        "no inputs were seen",
        "--imatrix-out " + path.string(),
        "the plan rounds no linear of a block, so the text went no further than the embedding",
        "leave out --imatrix-out");
  }
  imatrix.datasets = calibration.sources;
  imatrix.chunks = static_cast<std::int64_t>(calibration.sequences.size());
  imatrix.chunk_size = static_cast<std::int64_t>(calibration.sequences.front().size());
  write_imatrix(path, imatrix);
}

std::optional<SiteStats> diagonal_stats(const Imatrix& imatrix, const Linear& linear) {
  const ImatrixEntry* entry = find_entry(imatrix, linear);
  if (entry == nullptr) {
    return std::nullopt;
  }
  const std::vector<float> importance = entry->importance();
  const auto width = static_cast<std::size_t>(linear.in_features);
  constexpr float kMostRows = 1e15F;  // counts are floats of a file
  SiteStats stats;
  stats.width = linear.in_features;
  stats.rows = std::llround(std::min(entry->counts.front(), kMostRows));
  stats.H.resize(width * width);
  for (std::size_t j = 0; j < width; ++j) {
    stats.H[j * (width + 1)] = importance[j];
  }
  return stats;
}

}  // namespace quern
