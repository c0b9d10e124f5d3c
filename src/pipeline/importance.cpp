// SPDX-License-Identifier: Apache-2.0
#include "pipeline/importance.h"

#include "base/error.h"
#include "base/file.h"
#include "format/gguf_names.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <span>

namespace quern {
namespace {

namespace fs = std::filesystem;

// What an importance matrix says of a linear: a matrix of an entry, all of them for dense linears.
struct Importance {
  std::span<const float> sums;  // [in] of squares; of another length when it is another model's
  float count = 0;  // tokens
};

// GGUF files of Qwen3.5 have the columns of DeltaNet's output in another order, and an importance
// matrix does not say whose it is.
bool has_moved_columns(const std::string& weight) {
  return weight.ends_with(kDeltaOutput);
}

std::optional<Importance> find_importance(const Imatrix& imatrix, const Linear& linear) {
  if (has_moved_columns(linear.weight())) {
    return std::nullopt;
  }
  const std::optional<GgufSlice> slice = gguf_slice(linear.weight());
  const auto name = slice ? slice->stack : gguf_tensor_name(linear.weight());
  const auto found = name ? imatrix.entries.find(*name) : imatrix.entries.end();
  if (found == imatrix.entries.end()) {
    return std::nullopt;
  }
  const ImatrixEntry& entry = found->second;
  const std::span<const float> sums = entry.sums;
  if (!slice) {
    return Importance{sums, entry.counts.front()};
  }
  const auto width = static_cast<std::size_t>(linear.in_features);
  const auto expert = static_cast<std::size_t>(slice->expert);
  if (sums.size() % width != 0 || expert >= sums.size() / width) {
    return Importance{sums, 0};
  }
  // The legacy form has one count for all experts.
  const float count =
      entry.counts.size() == sums.size() / width ? entry.counts[expert] : entry.counts.front();
  return Importance{sums.subspan(expert * width, width), count};
}

}  // namespace

CalibrationSet calibration_of(const Imatrix& imatrix, const fs::path& path) {
  CalibrationSet set;
  set.sha256 = sha256_of_file(path);
  set.sources = imatrix.datasets;
  set.sources.push_back(path.filename().string());
  return set;
}

void check_imatrix(const Imatrix& imatrix, const ModelGraph& graph, const fs::path& path) {
  int known = 0;
  for (const Block& block : graph.blocks) {
    for (const Linear& linear : block.linears) {
      const std::optional<Importance> found = find_importance(imatrix, linear);
      if (!found) {
        continue;
      }
      ++known;
      const std::size_t width = found->sums.size();
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
      const std::string weight = inputs.name + ".weight";
      const auto count = static_cast<float>(inputs.rows);
      if (has_moved_columns(weight)) {
        continue;
      }
      if (const auto slice = gguf_slice(weight); slice && graph.config.mixture) {
        ImatrixEntry& entry = imatrix.entries[slice->stack];
        const auto experts = static_cast<std::size_t>(graph.config.mixture->experts);
        const auto expert = static_cast<std::size_t>(slice->expert);
        entry.counts.resize(experts);
        entry.sums.resize(experts * inputs.sums.size());
        entry.counts[expert] = count;
        std::copy(
            inputs.sums.begin(),
            inputs.sums.end(),
            entry.sums.begin() + static_cast<std::ptrdiff_t>(expert * inputs.sums.size()));
      } else if (const auto name = gguf_tensor_name(weight)) {
        imatrix.entries[*name] = {inputs.sums, {count}};
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
  const std::optional<Importance> found = find_importance(imatrix, linear);
  if (!found || (found->count <= 0 && gguf_slice(linear.weight()))) {
    return std::nullopt;
  }
  const auto width = static_cast<std::size_t>(linear.in_features);
  constexpr float kMostRows = 1e15F;  // counts are floats of a file
  SiteStats stats;
  stats.width = linear.in_features;
  stats.rows = std::llround(std::min(found->count, kMostRows));
  stats.H.resize(width * width);
  for (std::size_t j = 0; j < width; ++j) {
    stats.H[j * (width + 1)] = found->count > 0 ? found->sums[j] / found->count : 1.0F;
  }
  return stats;
}

}  // namespace quern
