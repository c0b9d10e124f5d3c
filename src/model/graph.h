// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "model/config.h"

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace quern {

// What a linear does. Later stages decide by role, never by name.
enum class Role {
  kQuery,
  kKey,
  kValue,
  kOutput,
  kGate,
  kUp,
  kDown,
  kRouter,  // [experts, hidden]: a score for each expert
  kSharedGate,  // [1, hidden]: how much of the shared expert a token takes
  kEmbedding,
  kHead
};
[[nodiscard]] std::string_view role_name(Role role);

// y = x W^T + b with W [out_features, in_features].
struct Linear {
  std::string module;  // "model.layers.0.self_attn.q_proj"; the weight is module + ".weight"
  Role role = Role::kQuery;
  std::int64_t out_features = 0;
  std::int64_t in_features = 0;
  bool has_bias = false;

  [[nodiscard]] std::int64_t parameters() const noexcept { return out_features * in_features; }
  [[nodiscard]] std::string weight() const { return module + ".weight"; }
};

struct Norm {
  std::string tensor;  // gain [size]
  std::int64_t size = 0;
};

// One distinct input of one or more linears; the unit of calibration statistics. A block is walked
// site after site, which is the true-sequential order of GPTQ.
struct CalibrationSite {
  std::string name;  // "attention_input", …
  std::int64_t width = 0;
  std::vector<int> linears;  // indices into Block::linears
  // What makes the channels, and can take a factor per channel out of them: a norm of the block
  // (-1), or the rows of this linear.
  int producer = -1;
  // [width] the producer's row behind each channel; empty: row c makes channel c.
  std::vector<std::int32_t> producer_rows;
};

// The sites of a dense block, in the order in which they are walked.
enum DenseSite { kAttentionInput = 0, kAttentionOutput = 1, kMlpInput = 2, kMlpHidden = 3 };
inline constexpr int kDenseSites = 4;

// The linears of a mixture of experts, as indices into Block::linears. Gate, up and down of an
// expert follow each other, and so do the experts.
struct Mixture {
  int router = 0;
  int first_expert = 0;
  int shared_expert = -1;  // gate_proj of the expert that every token takes; -1: none
  int shared_gate = -1;
  int experts = 0;
  int experts_per_token = 0;
  bool normalize = false;

  [[nodiscard]] int expert(int index) const noexcept { return first_expert + 3 * index; }
};

// A pre-norm decoder block: x += attention(norm(x)); x += mlp(norm(x)). All plain data.
struct Block {
  int index = 0;
  Norm attention_norm;
  Norm mlp_norm;
  bool has_qk_norm = false;  // RMSNorm over each head of q and k, before RoPE (Qwen3)
  Norm q_norm;
  Norm k_norm;
  std::int64_t sliding_window = 0;
  std::optional<Mixture> mixture;  // in place of gate, up and down
  std::vector<Linear> linears;  // q, k, v, o, gate, up, down; of a mixture as that says
  // Indexed by DenseSite; a mixture ends with kMlpInput, whose rows go to some of its linears each.
  std::vector<CalibrationSite> sites;
};
enum DenseLinear { kQ = 0, kK = 1, kV = 2, kO = 3, kGateProj = 4, kUpProj = 5, kDownProj = 6 };

// A model as data. Walked by calibration, quantization, evaluation and generation alike.
struct ModelGraph {
  ModelConfig config;
  Linear embedding;  // [vocab_size, hidden_size]; rows are looked up
  std::vector<Block> blocks;
  Norm final_norm;
  Linear head;  // the embedding's module when tied
  bool head_tied = false;

  [[nodiscard]] std::int64_t linear_parameters() const;
};

struct DenseOptions {
  std::string prefix = "model.";
  bool qkv_bias = false;
  bool output_bias = false;
  bool mlp_bias = false;
  bool qk_norm = false;
};

// The graph of a dense decoder with the names that all these families share.
[[nodiscard]] ModelGraph dense_graph(ModelConfig config, const DenseOptions& options);

// One model family: one file, one line in families.cpp.
struct Family {
  std::string_view model_type;  // of config.json
  std::string_view title;
  ModelGraph (*build)(const JsonReader& config);
};
[[nodiscard]] const std::vector<Family>& families();

// Reads config.json and builds the graph; throws UnsupportedError, with the known families, for
// another model_type.
[[nodiscard]] ModelGraph build_graph(const Json& config, const std::string& where);

// Throws UnsupportedError when a block is a mixture of experts: such models run, and what calls
// this does not do them yet.
void refuse_mixtures(const ModelGraph& graph, const std::string& where);

// Checks that every tensor the graph names is in the store with its shape (quantized linears
// excepted: their format checks them). Throws ParseError naming the first that is not.
class Checkpoint;
void check_tensors(const ModelGraph& graph, const Checkpoint& checkpoint);

}  // namespace quern
