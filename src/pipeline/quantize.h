// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/context.h"
#include "base/json.h"
#include "format/output_format.h"
#include "model/graph.h"
#include "pipeline/additivity.h"
#include "pipeline/estimate.h"
#include "pipeline/gguf_plan.h"
#include "plan/planning_options.h"
#include "plan/quant_plan.h"
#include "quant/method.h"
#include "tensor/checkpoint.h"

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace quern {

struct CalibrationOptions {
  std::vector<std::pair<std::filesystem::path, double>>
      files;  // with weights; empty: the bundled mix
  std::int64_t samples = 128;
  std::int64_t length = 512;
};

struct QuantizeOptions {
  std::filesystem::path model;
  std::filesystem::path output;
  std::string recipe = "gptq";  // of plan/recipes.h, whose choices the rest holds
  std::string method = "gptq";  // of quant/method.h
  QuantScheme scheme;
  TableChoice tables;
  ActivationScheme activation;
  std::string transform;  // of quant/scaling.h; empty: none
  bool experts_only = false;  // all else keeps its floats
  MethodOptions method_options;
  std::string format = "gptq";
  // Formats that the caller exports the result to: scales and codes are chosen so that they hold
  // it.
  std::vector<std::string> also;
  std::filesystem::path plan_file;  // empty: planned by quern
  PlanningOptions planning;  // without a budget every linear alike
  CalibrationOptions calibration;
  std::filesystem::path imatrix;  // instead of calibration: how large the inputs are
  std::filesystem::path
      imatrix_output;  // where to put what calibration found of it; empty: nowhere
  std::filesystem::path work_directory;  // empty: beside the output
  bool resume = true;
  bool force = false;  // moves what stands at `output` aside
  std::uint64_t shard_bytes = 5'000'000'000;
  std::string command;  // as the person typed it, for the manifest and the card
};

// What was asked of a plan, and what it was held to.
struct PlanRecord {
  Json budget = nullptr;  // {unit, value, bytes}: of the tensors of the quantized linears
  std::vector<std::string> constraints;
  std::optional<AdditivityCheck> additivity;
  double seconds = 0;  // that planning took
};

// A run before anything is rounded: what will be written, to the byte, and what it takes. Only
// headers were read, unless there was a budget to plan for.
struct PreparedRun {
  std::unique_ptr<Checkpoint> source;
  ModelGraph graph;
  QuantPlan plan;
  PlanRecord planning;
  const OutputFormat* format = nullptr;
  bool needs_calibration = true;
  // Whether the source holds the tied table a second time, as its head (Qwen3-0.6B and 1.7B as
  // released).
  bool head_is_copy = false;
  SafetensorsLayout layout;  // of the weight files
  std::vector<TensorDeclaration> declarations;
  std::optional<GgufPlan> gguf;  // instead of the two, where the format is one GGUF file
  Estimate estimate;
};

// Opens and checks everything that can be checked at once. Throws the errors of its parts.
[[nodiscard]] PreparedRun prepare_quantize(const Context& ctx, const QuantizeOptions& options);

// What the weight files will take, exactly.
[[nodiscard]] std::uint64_t output_bytes(const PreparedRun& run);
// `predicted`, as in the plan document and the manifest.
[[nodiscard]] Json predicted_json(const PreparedRun& run);
// Lines for people: sizes, memory, time, what stays in 16 bits.
[[nodiscard]] std::string describe_plan(const PreparedRun& run, const QuantizeOptions& options);

// The whole job; returns the manifest (schema quern.quantize/1). The output directory appears by
// one rename when everything in it was written, read back and compared.
[[nodiscard]] Json quantize(const Context& ctx, const QuantizeOptions& options);

}  // namespace quern
