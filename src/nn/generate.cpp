// SPDX-License-Identifier: Apache-2.0
#include "nn/generate.h"

#include "base/error.h"
#include "base/process.h"
#include "nn/linear.h"

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

namespace {

bool is_stop(const GenerateOptions& options, std::int32_t id) {
  return std::find(options.stop_ids.begin(), options.stop_ids.end(), id) != options.stop_ids.end();
}

// The tokens of one generation, in order. Several come at a time when drafts held.
class TokenSource {
 public:
  TokenSource(
      Decoder& decoder, Sampler& sampler, const GenerateOptions& options, GenerateResult& result)
      : decoder_(decoder), sampler_(sampler), options_(options), result_(result) {
    sequence_.images = options.images;
  }

  std::vector<std::int32_t> first(std::span<const std::int32_t> prompt) {
    std::vector<float> hidden = decoder_.forward(prompt, sequence_);
    decoder_.for_logits(
        std::span(hidden).last(width()),
        [&](std::int64_t, std::int64_t, const float* logits) { last_ = draw(logits, sampler_); });
    if (options_.drafter != nullptr) {
      next_.assign(prompt.begin() + 1, prompt.end());
      next_.push_back(last_);
      hidden_ = std::move(hidden);
    }
    return {last_};
  }

  // At least one token and at most `most`.
  std::vector<std::int32_t> next(std::int64_t most) {
    std::vector<std::int32_t> ids = {last_};
    if (options_.drafter != nullptr && most > 1) {
      const std::vector<std::int32_t> drafts = draft(std::min(options_.draft_tokens, most - 1));
      ids.insert(ids.end(), drafts.begin(), drafts.end());
      result_.drafted_tokens += static_cast<std::int64_t>(drafts.size());
    }
    std::vector<std::int32_t> drawn;
    while (drawn.size() < ids.size() && holds(ids, drawn)) {
      const std::size_t count = std::min<std::size_t>(kFewTokens, ids.size() - drawn.size());
      verify(std::span(ids).subspan(drawn.size(), count), drawn);
    }
    result_.accepted_draft_tokens += static_cast<std::int64_t>(drawn.size()) - 1;
    last_ = drawn.back();
    return drawn;
  }

 private:
  [[nodiscard]] const ModelConfig& config() const { return decoder_.model().graph.config; }
  [[nodiscard]] std::size_t width() const { return static_cast<std::size_t>(config().hidden_size); }

  std::int32_t draw(const float* logits, Sampler& sampler) const {
    const std::int64_t vocab = config().vocab_size;
    const std::int64_t count = options_.drawable > 0 ? std::min(options_.drawable, vocab) : vocab;
    return sampler.next({logits, static_cast<std::size_t>(count)});
  }

  // The likeliest tokens after the last one; none after a stop.
  std::vector<std::int32_t> draft(std::int64_t most) {
    Drafter& drafter = *options_.drafter;
    std::vector<float> rows = drafter.forward(hidden_, next_, draft_cache_);
    hidden_.clear();
    next_.clear();
    const std::int64_t slots = draft_cache_.tokens;
    Sampler greedy({}, 0);
    std::vector<std::int32_t> ids;
    while (true) {
      const std::span<const float> row = std::span(rows).last(width());
      decoder_.for_logits(row, [&](std::int64_t, std::int64_t, const float* logits) {
        ids.push_back(draw(logits, greedy));
      });
      if (static_cast<std::int64_t>(ids.size()) == most || is_stop(options_, ids.back())) {
        break;
      }
      rows = drafter.forward(row, std::span(ids).last(1), draft_cache_);
    }
    // Slots that saw a drafted hidden state are made again from the true one.
    drafter.rewind(draft_cache_, slots);
    return ids;
  }

  // The tokens drawn so far are those that were drafted.
  static bool holds(const std::vector<std::int32_t>& ids, const std::vector<std::int32_t>& drawn) {
    return std::equal(drawn.begin(), drawn.end(), ids.begin() + 1);
  }

  // Draws the tokens after those of `part`, up to the first that is not the next of them.
  void verify(std::span<const std::int32_t> part, std::vector<std::int32_t>& drawn) {
    const std::int64_t before = sequence_.tokens();
    const std::vector<float> hidden = part.size() == 1
                                          ? decoder_.forward(part, sequence_)
                                          : decoder_.forward_tentative(part, sequence_);
    std::size_t kept = 0;
    decoder_.for_logits(hidden, [&](std::int64_t, std::int64_t, const float* logits) {
      do {
        drawn.push_back(draw(logits, sampler_));
        logits += config().vocab_size;
        ++kept;
      } while (kept < part.size() && drawn.back() == part[kept]);
    });
    if (kept < part.size()) {
      decoder_.rewind(sequence_, before + static_cast<std::int64_t>(kept));
    }
    if (options_.drafter != nullptr) {
      hidden_.insert(hidden_.end(), hidden.begin(), hidden.begin() + kept * width());
      next_.insert(next_.end(), drawn.end() - kept, drawn.end());
    }
  }

  Decoder& decoder_;
  Sampler& sampler_;
  const GenerateOptions& options_;
  GenerateResult& result_;
  Sequence sequence_;
  std::int32_t last_ = 0;  // drawn, and not seen by the model yet
  LayerCache draft_cache_;
  std::vector<float> hidden_;  // of the slots that the drafter has not seen
  std::vector<std::int32_t> next_;  // the tokens after those
};

}  // namespace

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
  GenerateResult result;
  TokenSource source(decoder, sampler, options, result);
  // The next token joins the result; false ends it.
  const auto take = [&](std::int32_t id) {
    if (ctx.interrupted()) {
      result.finish_reason = "interrupted";
      return false;
    }
    if (is_stop(options, id)) {
      result.finish_reason = "stop";
      return false;
    }
    result.ids.push_back(id);
    if (observer && !observer(id)) {
      result.finish_reason = "stop";
      return false;
    }
    return true;
  };
  const auto left = [&] {
    return options.max_tokens - static_cast<std::int64_t>(result.ids.size());
  };
  result.finish_reason = "length";
  double started = steady_seconds();
  std::vector<std::int32_t> ids = source.first(prompt);
  result.prompt_seconds = steady_seconds() - started;
  started = steady_seconds();
  while (left() > 0 && std::all_of(ids.begin(), ids.end(), take) && left() > 0) {
    ids = source.next(left());
  }
  result.decode_seconds = steady_seconds() - started;
  return result;
}

}  // namespace quern
