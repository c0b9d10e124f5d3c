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
  kDeltaInput,  // queries, keys, values and output gates of DeltaNet
  kDeltaGates,  // its decay and write strength, one row a head
  kDraftInput,  // of the draft layer: embedding and hidden state side by side
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
  bool zero_centred = false;  // the tensor holds gain - 1
};

inline constexpr int kNormProduces = -1;
inline constexpr int kNothingProduces = -2;

// One distinct input of one or more linears; the unit of calibration statistics. A block is walked
// site after site, which is the true-sequential order of GPTQ.
struct CalibrationSite {
  std::string name;  // "attention_input", …
  std::int64_t width = 0;
  std::vector<int> linears;  // indices into Block::linears
  // What makes the channels, and can take a factor per channel out of them: a norm of the block
  // (kNormProduces), the rows of this linear, or nothing.
  int producer = kNormProduces;
  // [width] the producer's row behind each channel; empty: row c makes channel c.
  std::vector<std::int32_t> producer_rows;
};

// The sites of a dense block, in the order in which they are walked.
enum DenseSite { kAttentionInput = 0, kAttentionOutput = 1, kMlpInput = 2, kMlpHidden = 3 };
inline constexpr int kDenseSites = 4;

// Linears of an attention block with an MLP.
enum DenseLinear { kQ = 0, kK = 1, kV = 2, kO = 3, kGateProj = 4, kUpProj = 5, kDownProj = 6 };

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

// Gated DeltaNet in the place of attention: indices into Block::linears, and its other tensors.
struct DeltaNet {
  int qkv = 0;  // rows: all queries, all keys, all values; fused: by key head, with the gates
  int z = -1;  // gates of the output norm; -1: fused with qkv
  int b = 0;  // write strength; fused: with a, by key head
  int a = -1;  // decay
  std::string convolution;  // [channels, 1, kernel]
  std::string log_decay;  // A_log [value heads]
  std::string decay_bias;  // dt_bias [value heads]
  Norm norm;  // of each value head's output, before its gate
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
  std::optional<DeltaNet> delta_net;  // in place of q, k and v
  std::optional<Mixture> mixture;  // in place of gate, up and down
  int output = kO;  // of attention or DeltaNet
  int mlp = kGateProj;  // gate_proj, before up_proj and down_proj; without a mixture
  // q, k, v, o, gate, up, down; what takes their place as that says.
  std::vector<Linear> linears;
  // Indexed by DenseSite; a mixture ends with kMlpInput, whose rows go to some of its linears each.
  std::vector<CalibrationSite> sites;

  // Whether a linear is of a routed expert, which sees a part of the rows only.
  [[nodiscard]] bool is_expert(int linear) const noexcept {
    return mixture && linear >= mixture->first_expert && linear < mixture->expert(mixture->experts);
  }
};

// The draft layer of multi-token prediction (Qwen3-Next and later): from the final-normed hidden
// state of a token and the embedding of the next one to the logits of the token after that.
// Embedding and head are the model's.
struct MtpLayer {
  Linear projection;  // [hidden, 2 hidden], of [normed embedding | normed hidden state]
  Norm embedding_norm;
  Norm hidden_norm;
  Block block;  // with attention
  Norm norm;  // what the head reads, and the next draft in the place of a hidden state
};

// A model as data. Walked by calibration, quantization, evaluation and generation alike.
struct ModelGraph {
  ModelConfig config;
  Linear embedding;  // [vocab_size, hidden_size]; rows are looked up
  std::vector<Block> blocks;
  Norm final_norm;
  Linear head;  // the embedding's module when tied
  bool head_tied = false;
  // Of build_graph(checkpoint), when the checkpoint holds one that quern runs. Kept in 16 bits: no
  // stage but drafting walks it.
  std::optional<MtpLayer> mtp;

  [[nodiscard]] std::int64_t linear_parameters() const;
};

struct DecoderOptions {
  std::string prefix = "model.";
  bool qkv_bias = false;
  bool output_bias = false;
  bool mlp_bias = false;
  bool qk_norm = false;
};

// The block whose tensors begin with `base`; `index` is left 0.
[[nodiscard]] Block decoder_block(
    const std::string& base,
    const ModelConfig& config,
    const DecoderOptions& options,
    bool has_delta_net,
    bool has_mixture);

// The graph of a decoder with the names that all these families share.
[[nodiscard]] ModelGraph decoder_graph(ModelConfig config, const DecoderOptions& options);

// The graph of a family with DeltaNet layers. A multimodal config.json holds the decoder's keys in
// `text_config`; what of them stands outside counts first.
[[nodiscard]] ModelGraph hybrid_graph(
    const JsonReader& config, const DecoderDefaults& defaults, DecoderOptions options = {});

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
// The same, with the prefix that the checkpoint's tensors have: a text-only export of a multimodal
// model may keep or drop "language_model.".
class Checkpoint;
[[nodiscard]] ModelGraph build_graph(const Checkpoint& checkpoint);

// Throws UnsupportedError when a block is a mixture of experts or has DeltaNet: such models run,
// and what calls this does not do them yet.
void refuse_sparse_and_linear(const ModelGraph& graph, const std::string& where);

// Checks that every tensor the graph names is in the store with its shape (quantized linears
// excepted: their format checks them). Throws ParseError naming the first that is not.
void check_tensors(const ModelGraph& graph, const Checkpoint& checkpoint);
// The same for one norm, linear or block.
void check_norm(const Norm& norm, const Checkpoint& checkpoint);
void check_linear(const Linear& linear, const Checkpoint& checkpoint);
void check_block(const Block& block, const ModelConfig& config, const Checkpoint& checkpoint);

}  // namespace quern
