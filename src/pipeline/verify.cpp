// SPDX-License-Identifier: Apache-2.0
#include "pipeline/verify.h"

#include "base/error.h"
#include "base/file.h"
#include "model/graph.h"
#include "quant/quantized_matrix.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <vector>

namespace quern {
namespace {

struct Comparison {
  std::int64_t unchanged = 0;
  std::int64_t quantized = 0;
  double worst_error = 0;  // |W - Q| / |W| of the worst linear
  std::string worst_linear;
};

// Hashes of the manifest against the files.
std::int64_t check_hashes(const Checkpoint& checkpoint, Json& problems) {
  const std::filesystem::path path = checkpoint.directory() / "quantization_manifest.json";
  if (!std::filesystem::exists(path)) {
    return 0;
  }
  const Json manifest = read_json(path);
  std::int64_t checked = 0;
  for (const Json& entry : JsonReader(manifest, path.string()).get_array("files")) {
    const JsonReader file(entry, path.string());
    const std::filesystem::path name = std::filesystem::path(file.get_string("name")).filename();
    std::error_code code;
    const auto size = std::filesystem::file_size(checkpoint.directory() / name, code);
    if (code || size != static_cast<std::uint64_t>(file.get_int("size"))) {
      problems.push_back(fmt::format(
          "{}: {} bytes expected, found {}",
          name.string(),
          file.get_int("size"),
          code ? "none" : std::to_string(size)));
    } else if (sha256_of_file(checkpoint.directory() / name) != file.get_string("sha256")) {
      problems.push_back(
          fmt::format("{}: its SHA-256 is not the one of the manifest", name.string()));
    } else {
      ++checked;
    }
  }
  return checked;
}

// |W - Q| / |W| in the Frobenius norm, row by row on the pool; -1 when a value is not finite.
double relative_difference(
    const Context& ctx, const TensorView& dense, const QuantizedMatrix& packed) {
  const std::int64_t rows = packed.out_features;
  const auto width = static_cast<std::size_t>(packed.in_features);
  std::vector<double> difference(static_cast<std::size_t>(rows));
  std::vector<double> norm(static_cast<std::size_t>(rows));
  ctx.pool.for_chunks(rows, 16, [&](std::int64_t begin, std::int64_t end, int) {
    std::vector<std::uint8_t> scratch(width);
    std::vector<float> q(width);
    std::vector<float> w(width);
    for (std::int64_t r = begin; r < end; ++r) {
      packed.dequantize_row(ctx.kernels, r, scratch, q);
      to_float(dense.rows(r, r + 1), w);
      for (std::size_t i = 0; i < width; ++i) {
        const double d = static_cast<double>(w[i]) - q[i];
        difference[static_cast<std::size_t>(r)] += d * d;
        norm[static_cast<std::size_t>(r)] += static_cast<double>(w[i]) * w[i];
      }
    }
  });
  double total_difference = 0;
  double total_norm = 0;
  for (std::size_t r = 0; r < difference.size(); ++r) {
    total_difference += difference[r];
    total_norm += norm[r];
  }
  if (!std::isfinite(total_difference)) {
    return -1;
  }
  return total_norm > 0 ? std::sqrt(total_difference / total_norm) : std::sqrt(total_difference);
}

void compare_linear(
    const Context& ctx,
    const Checkpoint& checkpoint,
    const std::string& module,
    const TensorView& original,
    Comparison& comparison,
    Json& problems) {
  const StoredLinear stored =
      checkpoint.load_linear(module, original.shape.at(0), original.shape.at(1));
  const double difference = relative_difference(ctx, original, *stored.quantized);
  ++comparison.quantized;
  if (difference < 0) {
    problems.push_back(module + ": dequantizes to values that are not finite");
  } else if (difference > comparison.worst_error) {
    comparison.worst_error = difference;
    comparison.worst_linear = module;
  }
  // Even 2-bit rounding stays below the norm of the weights; more is another matrix.
  if (difference > 1) {
    problems.push_back(
        fmt::format("{}: differs from the original by {:.2f} times its norm", module, difference));
  }
}

Comparison compare(
    const Context& ctx, const Checkpoint& checkpoint, const Checkpoint& source, Json& problems) {
  Comparison comparison;
  const TensorStore& written = checkpoint.tensors();
  for (const auto& [name, view] : source.tensors().tensors()) {
    const TensorView* copy = written.find(name);
    const std::string module = name.substr(0, name.rfind('.'));
    if (copy != nullptr) {
      if (copy->dtype != view.dtype || copy->shape != view.shape ||
          !std::equal(
              copy->bytes.begin(), copy->bytes.end(), view.bytes.begin(), view.bytes.end())) {
        problems.push_back(name + ": differs from the original");
      }
      ++comparison.unchanged;
      written.release(*copy);
    } else if (
        name.ends_with(".weight") && view.shape.size() == 2 && checkpoint.is_quantized(module)) {
      compare_linear(ctx, checkpoint, module, view, comparison, problems);
    } else {
      problems.push_back(name + ": is in the original and not here");
    }
    source.tensors().release(view);
  }
  return comparison;
}

}  // namespace

Json verify_checkpoint(const Context& ctx, const Checkpoint& checkpoint, const Checkpoint* source) {
  Json problems = Json::array();
  const ModelGraph graph = build_graph(checkpoint.config(), checkpoint.config_place());
  check_tensors(graph, checkpoint);
  std::int64_t quantized = 0;
  for (const Block& block : graph.blocks) {
    for (const Linear& linear : block.linears) {
      quantized += checkpoint.is_quantized(linear.module) ? 1 : 0;
    }
  }
  for (const auto& [name, view] : checkpoint.tensors().tensors()) {
    if (is_16_or_32_bit_float(view.dtype)) {
      const std::vector<float> values = to_float(view);
      if (!std::all_of(
              values.begin(), values.end(), [](float value) { return std::isfinite(value); })) {
        problems.push_back(name + ": holds values that are not finite");
      }
      checkpoint.tensors().release(view);
    }
  }
  const std::int64_t hashes = check_hashes(checkpoint, problems);
  Json document = {
      {"schema", "quern.verify/1"},
      {"model", checkpoint.directory().string()},
      {"format", checkpoint.format()},
      {"tensors", checkpoint.tensors().tensors().size()},
      {"quantized_linears", quantized},
      {"hashes_checked", hashes}};
  if (source != nullptr) {
    const Comparison comparison = compare(ctx, checkpoint, *source, problems);
    document["against"] = {
        {"model", source->directory().string()},
        {"unchanged_tensors", comparison.unchanged},
        {"quantized_linears", comparison.quantized},
        {"largest_relative_difference", comparison.worst_error},
        {"largest_in", comparison.worst_linear}};
  }
  document["problems"] = std::move(problems);
  return document;
}

}  // namespace quern
