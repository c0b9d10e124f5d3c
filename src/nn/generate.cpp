// SPDX-License-Identifier: Apache-2.0
#include "nn/generate.h"

#include "base/error.h"
#include "base/process.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace quern {

std::int32_t Sampler::next(std::span<const float> logits) {
  if (options_.temperature <= 0) {
    const auto less = [](float a, float b) { return a < b || (std::isnan(a) && !std::isnan(b)); };
    return static_cast<std::int32_t>(
        std::max_element(logits.begin(), logits.end(), less) - logits.begin());
  }
  std::vector<std::pair<double, std::int32_t>> candidates;
  candidates.reserve(logits.size());
  for (std::size_t i = 0; i < logits.size(); ++i) {
    // NaN has no place in an order; last is where it does no harm.
    const double logit = std::isnan(logits[i]) ? -std::numeric_limits<double>::infinity()
                                               : static_cast<double>(logits[i]);
    candidates.emplace_back(logit / options_.temperature, static_cast<std::int32_t>(i));
  }
  // Likeliest first; of equals the lower id, so that the order does not depend on the sort.
  std::sort(candidates.begin(), candidates.end(), [](const auto& a, const auto& b) {
    return a.first != b.first ? a.first > b.first : a.second < b.second;
  });
  if (options_.top_k > 0 && static_cast<std::size_t>(options_.top_k) < candidates.size()) {
    candidates.resize(static_cast<std::size_t>(options_.top_k));
  }
  const double highest = candidates.front().first;
  double total = 0;
  for (auto& candidate : candidates) {
    candidate.first = std::exp(candidate.first - highest);
    total += candidate.first;
  }
  double kept = 0;
  std::size_t count = 0;
  while (count < candidates.size() && (count == 0 || (kept < options_.top_p * total &&
                                                      candidates[count].first >= options_.min_p))) {
    kept += candidates[count].first;
    ++count;
  }
  // 53 random bits: std::uniform_real_distribution differs between standard libraries.
  double left = static_cast<double>(random_() >> 11U) * 0x1p-53 * kept;
  for (std::size_t i = 0; i + 1 < count; ++i) {
    left -= candidates[i].first;
    if (left < 0) {
      return candidates[i].second;
    }
  }
  return candidates[count - 1].second;
}

GenerateResult generate(
    const Context& ctx,
    Decoder& decoder,
    std::span<const std::int32_t> prompt,
    Sampler& sampler,
    const GenerateOptions& options,
    const TokenObserver& observer) {
  if (prompt.empty()) {
    throw UsageError(
        "nothing to go on from", "--prompt", "the prompt has no tokens", "give a longer prompt");
  }
  const ModelConfig& config = decoder.model().graph.config;
  const auto width = static_cast<std::size_t>(config.hidden_size);
  const std::int64_t drawable =
      options.drawable > 0 ? std::min(options.drawable, config.vocab_size) : config.vocab_size;
  GenerateResult result;
  Sequence sequence;
  sequence.images = options.images;
  double started = steady_seconds();
  std::vector<float> hidden = decoder.forward(prompt, sequence);
  result.finish_reason = "length";
  while (static_cast<std::int64_t>(result.ids.size()) < options.max_tokens) {
    if (ctx.interrupted()) {
      result.finish_reason = "interrupted";
      break;
    }
    std::int32_t id = 0;
    decoder.for_logits(
        std::span(hidden).last(width), [&](std::int64_t, std::int64_t, const float* logits) {
          id = sampler.next({logits, static_cast<std::size_t>(drawable)});
        });
    if (result.prompt_seconds == 0) {
      result.prompt_seconds = steady_seconds() - started;
      started = steady_seconds();
    }
    if (std::find(options.stop_ids.begin(), options.stop_ids.end(), id) != options.stop_ids.end()) {
      result.finish_reason = "stop";
      break;
    }
    result.ids.push_back(id);
    if (observer && !observer(id)) {
      result.finish_reason = "stop";
      break;
    }
    if (static_cast<std::int64_t>(result.ids.size()) < options.max_tokens) {
      hidden = decoder.forward(std::span(&id, 1), sequence);
    }
  }
  result.decode_seconds = steady_seconds() - started;
  return result;
}

}  // namespace quern
