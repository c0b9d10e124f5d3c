// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cli/verb.h"
#include "pipeline/quantize.h"

#include <optional>
#include <string>
#include <vector>

namespace quern {

// The options that `quantize` and `plan` share, as typed.
struct QuantizeArguments {
  std::string model;
  std::string output;
  std::optional<std::string> method;
  std::optional<std::string> recipe;
  std::optional<int> bits;  // what is not given is as the recipe says
  std::optional<std::string> group_size;
  std::string embedding_bits = "16";
  int head_bits = 16;
  bool symmetric = false;
  bool asymmetric = false;
  std::string order;
  std::string range;
  std::string format = "gptq";
  std::string plan;
  std::vector<std::string> calibration;
  std::int64_t samples = 0;
  std::int64_t length = 512;
  double damping = 0.01;
  int sweeps = -1;
  int refits = -1;
  std::optional<int> restarts;
  std::string transform;
  std::optional<bool> mismatch_target;
  double asymmetry = 0.25;
  std::optional<int> activation_bits;
  std::string activation_scale = "dynamic";
  std::string work_directory;
  std::string shard_size = "5GB";
  bool resume = true;
  bool force = false;
};

void add_quantize_options(CLI::App& app, QuantizeArguments& arguments);

// Throws UsageError for values that contradict each other.
[[nodiscard]] QuantizeOptions quantize_options(
    const Session& session, const QuantizeArguments& arguments);

}  // namespace quern
