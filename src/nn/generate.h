// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "nn/mtp.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

namespace quern {

// How the next token is chosen from the logits.
struct SamplingOptions {
  double temperature = 0;  // 0: the most likely token
  double top_p = 1;  // the smallest set of likeliest tokens with this share
  std::int64_t top_k = 0;  // the k likeliest; 0: all
  double min_p = 0;  // at least this share of the likeliest token's probability
};

// Draws tokens; the same seed gives the same tokens for the same logits.
class Sampler {
 public:
  Sampler(const SamplingOptions& options, std::uint64_t seed) : options_(options), random_(seed) {}
  // `logits` covers the tokens that may be drawn (padding rows of the vocabulary cut off).
  [[nodiscard]] std::int32_t next(std::span<const float> logits);

 private:
  SamplingOptions options_;
  std::mt19937_64 random_;
};

// Tokens that the draft layer proposes at a time. A third is seldom right and costs another product
// with the head.
inline constexpr std::int64_t kDefaultDraftTokens = 2;

struct GenerateOptions {
  std::int64_t max_tokens = 128;
  std::vector<std::int32_t> stop_ids;
  std::int64_t drawable = 0;  // tokens that exist; 0: every row of the vocabulary
  std::shared_ptr<const ImagePrompt> images;  // when the prompt has some: its ids are the prompt's
  // Proposes tokens that the model then sees several at a time. Every token is still drawn from the
  // model's own logits, whose bits do not depend on that: the result is the same, seed for seed.
  Drafter* drafter = nullptr;
  std::int64_t draft_tokens = kDefaultDraftTokens;  // at a time, at most
};

struct GenerateResult {
  std::vector<std::int32_t> ids;
  std::string finish_reason;  // "stop" (a stop id, which is not in ids), "length", "interrupted"
  double prompt_seconds = 0;
  double decode_seconds = 0;
  std::int64_t drafted_tokens = 0;
  std::int64_t accepted_draft_tokens = 0;
};

// Called with each new token; false ends the generation.
using TokenObserver = std::function<bool(std::int32_t id)>;

[[nodiscard]] GenerateResult generate(
    const Context& ctx,
    Decoder& decoder,
    std::span<const std::int32_t> prompt,
    Sampler& sampler,
    const GenerateOptions& options,
    const TokenObserver& observer = nullptr);

}  // namespace quern
