// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/json.h"
#include "eval/eval_model.h"

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace quern {

// Which predictions of a text count, and how they are averaged.
enum class Protocol {
  // GPTQ, AWQ and the Qwen3 study: windows of `context` tokens from the start, the rest dropped;
  // all context - 1 predictions of each count; the mean of window means.
  kGptq,
  // llama.cpp: the same windows, token 0 replaced by BOS where the model wants one; predictions at
  // positions context/2 … context - 2 count; the mean over predictions.
  kLlamaCpp,
};
[[nodiscard]] std::string_view protocol_name(Protocol protocol);

struct PerplexityOptions {
  Protocol protocol = Protocol::kGptq;
  std::int64_t context = 2048;
  std::int64_t max_windows = 0;  // 0: all
  std::optional<std::int32_t> bos_id;  // for kLlamaCpp, when the tokenizer adds BOS
};

struct PerplexityResult {
  double nll_mean = 0;  // nats per predicted token
  double nll_stderr = 0;  // of window means (kGptq), of predictions (kLlamaCpp)
  double ppl = 0;
  std::int64_t tokens = 0;  // predictions counted
  std::int64_t windows = 0;
  std::int64_t context = 0;
  std::vector<double> window_nll;  // mean of each window
};

// KL(reference || model) in nats and agreement of the most likely token, over all positions of
// each window (kGptq) or the counted ones (kLlamaCpp).
struct DivergenceResult {
  double kl_mean = 0;
  double kl_stderr = 0;  // of window means (kGptq), of positions (kLlamaCpp)
  double kl_median = 0;
  double kl_p99 = 0;
  double top1_agreement = 0;
  double ppl_ratio = 0;  // perplexity of the model over that of the reference
  std::int64_t tokens = 0;
};

// As in the documents of `eval` and `compare`.
[[nodiscard]] Json divergence_json(const DivergenceResult& result);

struct TextResult {
  PerplexityResult model;
  std::optional<PerplexityResult> reference;
  std::optional<DivergenceResult> divergence;
};

// Called after each window with (windows done, windows in all).
using EvalProgress = std::function<void(std::int64_t done, std::int64_t total)>;

// Windows of the text with this many tokens.
[[nodiscard]] std::int64_t window_count(std::size_t tokens, const PerplexityOptions& options);

// Scores the tokens of one text. With `reference`, both models see each window and only tiles of
// logits are ever held. Throws UsageError when the text is shorter than one window,
// InterruptedError when ctx says so.
[[nodiscard]] TextResult evaluate_text(
    const Context& ctx,
    EvalModel& model,
    EvalModel* reference,
    std::span<const std::int32_t> ids,
    const PerplexityOptions& options,
    const EvalProgress& progress);
// Of loaded models.
[[nodiscard]] TextResult evaluate_text(
    const Context& ctx,
    Decoder& model,
    Decoder* reference,
    std::span<const std::int32_t> ids,
    const PerplexityOptions& options,
    const EvalProgress& progress);

}  // namespace quern
