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
  std::optional<std::string> embedding_bits;  // 16, unless a budget counts the table
  std::optional<int> head_bits;
  bool symmetric = false;
  bool asymmetric = false;
  std::string order;
  std::string failsafe;
  bool experts_only = false;
  std::string range;
  std::optional<std::string> format;  // as the recipe has it
  std::vector<std::string> also;
  std::string plan;
  double bpw = 0;
  double linear_bpw = 0;
  std::string target_size;
  std::string fit_ram;
  std::int64_t fit_context = 4096;
  std::vector<int> plan_bits;
  bool fused_alike = false;
  bool fused_apart = false;
  bool no_check = false;
  std::vector<std::string> calibration;
  std::string imatrix;
  std::string imatrix_output;
  std::int64_t samples = 0;
  std::int64_t length = 512;
  double damping = 0.01;
  int sweeps = -1;
  int refits = -1;
  std::optional<int> restarts;
  std::string transform;
  bool mismatch_target = false;
  bool no_mismatch_target = false;
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
