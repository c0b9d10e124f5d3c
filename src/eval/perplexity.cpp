// SPDX-License-Identifier: Apache-2.0
#include "eval/perplexity.h"

#include "base/error.h"
#include "eval/divergence.h"
#include "kernels/kernels.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>

namespace quern {
namespace {

constexpr std::int64_t kRowChunk = 8;

// What one window gave; vectors over its positions.
struct WindowScores {
  std::vector<double> nll;  // of the token that follows position t; the last one is 0
  std::vector<double> reference_nll;
  std::vector<double> kl;
  std::vector<std::uint8_t> same_top;
};

struct Counted {
  std::int64_t first_prediction;  // positions whose next token is predicted and counted
  std::int64_t end_prediction;
  std::int64_t first_position;  // positions whose distributions are compared
  std::int64_t end_position;
};

Counted counted_positions(const PerplexityOptions& options) {
  const std::int64_t context =
      std::max<std::int64_t>(options.context, 0);  // what is too short is refused
  if (options.protocol == Protocol::kGptq) {
    return {0, context - 1, 0, context};
  }
  return {context / 2, context - 1, context / 2, context - 1};
}

std::int64_t arg_max(const float* x, std::int64_t n) {
  return std::max_element(x, x + n) - x;  // the first of equals
}

WindowScores score_window(
    const Context& ctx,
    EvalModel& model,
    EvalModel* reference,
    std::int64_t index,
    std::span<const std::int32_t> window) {
  const auto length = static_cast<std::int64_t>(window.size());
  const std::int64_t vocab = model.config().vocab_size;
  WindowScores scores;
  scores.nll.resize(window.size());
  const auto next_nll = [&](std::int64_t position, const float* logits, double norm) {
    return position + 1 < length ? norm - logits[window[static_cast<std::size_t>(position) + 1]]
                                 : 0.0;
  };
  const std::span<const float> hidden = model.hidden(index);
  if (reference == nullptr) {
    model.for_logits(hidden, [&](std::int64_t begin, std::int64_t rows, const float* logits) {
      ctx.pool.for_chunks(rows, kRowChunk, [&](std::int64_t from, std::int64_t to, int) {
        for (std::int64_t r = from; r < to; ++r) {
          const float* row = logits + r * vocab;
          scores.nll[static_cast<std::size_t>(begin + r)] =
              next_nll(begin + r, row, ctx.kernels.log_sum_exp(row, vocab));
        }
      });
    });
    return scores;
  }
  scores.reference_nll.resize(window.size());
  scores.kl.resize(window.size());
  scores.same_top.resize(window.size());
  const std::span<const float> reference_hidden = reference->hidden(index);
  const std::int64_t chunk = logit_rows_per_chunk(vocab);
  const std::int64_t width = model.config().hidden_size;
  const std::int64_t reference_width = reference->config().hidden_size;
  std::vector<float> probabilities(static_cast<std::size_t>(ctx.pool.size() * vocab));
  for (std::int64_t begin = 0; begin < length; begin += chunk) {
    const std::int64_t rows = std::min(chunk, length - begin);
    const auto slice = [&](std::span<const float> values, std::int64_t row_width) {
      return values.subspan(
          static_cast<std::size_t>(begin * row_width), static_cast<std::size_t>(rows * row_width));
    };
    model.for_logits(slice(hidden, width), [&](std::int64_t, std::int64_t, const float* q) {
      reference->for_logits(
          slice(reference_hidden, reference_width),
          [&](std::int64_t, std::int64_t, const float* p) {
            ctx.pool.for_chunks(
                rows, kRowChunk, [&](std::int64_t from, std::int64_t to, int worker) {
                  for (std::int64_t r = from; r < to; ++r) {
                    const float* a = p + r * vocab;
                    const float* b = q + r * vocab;
                    const double a_norm = ctx.kernels.log_sum_exp(a, vocab);
                    const double b_norm = ctx.kernels.log_sum_exp(b, vocab);
                    const auto at = static_cast<std::size_t>(begin + r);
                    scores.nll[at] = next_nll(begin + r, b, b_norm);
                    scores.reference_nll[at] = next_nll(begin + r, a, a_norm);
                    scores.kl[at] = kl_divergence(
                        ctx, a, b, a_norm, b_norm, vocab, probabilities.data() + worker * vocab);
                    scores.same_top[at] = arg_max(a, vocab) == arg_max(b, vocab) ? 1 : 0;
                  }
                });
          });
    });
  }
  return scores;
}

void check_finite(const WindowScores& scores, std::int64_t window) {
  const auto check = [&](const std::vector<double>& nll, const char* which) {
    if (!std::all_of(nll.begin(), nll.end(), [](double value) { return std::isfinite(value); })) {
      throw ParseError(
          "the model computes values that are not finite",
          which,
          fmt::format("found in window {}", window),
          "check the checkpoint with quern verify: it may be damaged");
    }
  };
  check(scores.nll, "MODEL");
  check(scores.reference_nll, "--reference");
}

double mean_of(std::span<const double> values) {
  return values.empty() ? 0
                        : std::accumulate(values.begin(), values.end(), 0.0) /
                              static_cast<double>(values.size());
}

double standard_error(std::span<const double> values) {
  if (values.size() < 2) {
    return 0;
  }
  const double mean = mean_of(values);
  double sum = 0;
  for (const double value : values) {
    sum += (value - mean) * (value - mean);
  }
  const auto n = static_cast<double>(values.size());
  return std::sqrt(sum / (n - 1) / n);
}

// Linear interpolation between order statistics; `values` is sorted.
double quantile(std::span<const double> values, double q) {
  const double at = q * static_cast<double>(values.size() - 1);
  const auto low = static_cast<std::size_t>(at);
  const std::size_t high = std::min(low + 1, values.size() - 1);
  return values[low] + (at - static_cast<double>(low)) * (values[high] - values[low]);
}

// Collects values window by window and averages them as the protocol says.
struct Average {
  std::vector<double> values;
  std::vector<double> windows;

  void add(std::span<const double> window) {
    values.insert(values.end(), window.begin(), window.end());
    windows.push_back(mean_of(window));
  }
  // All windows count the same number of positions, so both means are one.
  [[nodiscard]] double mean() const { return mean_of(windows); }
  [[nodiscard]] double error(Protocol protocol) const {
    return standard_error(protocol == Protocol::kGptq ? windows : values);
  }
};

PerplexityResult perplexity(const Average& nll, const PerplexityOptions& options) {
  PerplexityResult result;
  result.nll_mean = nll.mean();
  result.nll_stderr = nll.error(options.protocol);
  result.ppl = std::exp(result.nll_mean);
  result.tokens = static_cast<std::int64_t>(nll.values.size());
  result.windows = static_cast<std::int64_t>(nll.windows.size());
  result.context = options.context;
  result.window_nll = nll.windows;
  return result;
}

void check_options(
    std::size_t tokens,
    const PerplexityOptions& options,
    const EvalModel& model,
    const EvalModel* reference) {
  const Counted counted = counted_positions(options);
  if (options.context < 2 || counted.first_prediction >= counted.end_prediction) {
    throw UsageError(
        "the context is too short",
        fmt::format("--context {}", options.context),
        "no prediction of such a window is counted",
        "--context 512");
  }
  if (static_cast<std::int64_t>(tokens) < options.context) {
    throw UsageError(
        "the text is shorter than one window",
        "--perplexity",
        fmt::format("{} tokens needed, the text has {}", options.context, tokens),
        "use a longer text or a smaller --context");
  }
  if (reference != nullptr && reference->config().vocab_size != model.config().vocab_size) {
    throw UsageError(
        "model and reference have different vocabularies",
        "--reference",
        fmt::format("{} and {} entries", model.config().vocab_size, reference->config().vocab_size),
        "compare checkpoints of the same model");
  }
}

std::vector<std::vector<std::int32_t>> cut_windows(
    std::span<const std::int32_t> ids, const PerplexityOptions& options) {
  std::vector<std::vector<std::int32_t>> windows;
  const std::int64_t count = window_count(ids.size(), options);
  for (std::int64_t w = 0; w < count; ++w) {
    const auto first = ids.begin() + w * options.context;
    std::vector<std::int32_t>& window = windows.emplace_back(first, first + options.context);
    if (options.protocol == Protocol::kLlamaCpp && options.bos_id) {
      window[0] = *options.bos_id;
    }
  }
  return windows;
}

}  // namespace

std::string_view protocol_name(Protocol protocol) {
  return protocol == Protocol::kGptq ? "gptq" : "llama.cpp";
}

Json divergence_json(const DivergenceResult& result) {
  return {
      {"kl_mean", result.kl_mean},
      {"kl_stderr", result.kl_stderr},
      {"kl_median", result.kl_median},
      {"kl_p99", result.kl_p99},
      {"top1_agreement", result.top1_agreement},
      {"ppl_ratio", result.ppl_ratio},
      {"tokens", result.tokens}};
}

std::int64_t window_count(std::size_t tokens, const PerplexityOptions& options) {
  const std::int64_t windows = static_cast<std::int64_t>(tokens) / options.context;
  return options.max_windows > 0 ? std::min(windows, options.max_windows) : windows;
}

TextResult evaluate_text(
    const Context& ctx,
    Decoder& model,
    Decoder* reference,
    std::span<const std::int32_t> ids,
    const PerplexityOptions& options,
    const EvalProgress& progress) {
  ResidentModel resident(model);
  std::optional<ResidentModel> resident_reference;
  if (reference != nullptr) {
    resident_reference.emplace(*reference);
  }
  return evaluate_text(
      ctx, resident, reference != nullptr ? &*resident_reference : nullptr, ids, options, progress);
}

TextResult evaluate_text(
    const Context& ctx,
    EvalModel& model,
    EvalModel* reference,
    std::span<const std::int32_t> ids,
    const PerplexityOptions& options,
    const EvalProgress& progress) {
  check_options(ids.size(), options, model, reference);
  const std::vector<std::vector<std::int32_t>> windows = cut_windows(ids, options);
  model.begin(windows);
  if (reference != nullptr) {
    reference->begin(windows);
  }
  const auto count = static_cast<std::int64_t>(windows.size());
  const Counted counted = counted_positions(options);
  const auto predictions = [&](const std::vector<double>& values) {
    return std::span(values).subspan(
        static_cast<std::size_t>(counted.first_prediction),
        static_cast<std::size_t>(counted.end_prediction - counted.first_prediction));
  };
  Average nll;
  Average reference_nll;
  Average kl;
  std::int64_t same_top = 0;
  for (std::int64_t w = 0; w < count; ++w) {
    if (ctx.interrupted()) {
      throw InterruptedError(
          "evaluation interrupted",
          "",
          fmt::format("{} of {} windows done", w, count),
          "run the same command again");
    }
    const WindowScores scores =
        score_window(ctx, model, reference, w, windows[static_cast<std::size_t>(w)]);
    check_finite(scores, w);
    nll.add(predictions(scores.nll));
    if (reference != nullptr) {
      reference_nll.add(predictions(scores.reference_nll));
      kl.add(std::span(scores.kl).subspan(
          static_cast<std::size_t>(counted.first_position),
          static_cast<std::size_t>(counted.end_position - counted.first_position)));
      same_top += std::accumulate(
          scores.same_top.begin() + counted.first_position,
          scores.same_top.begin() + counted.end_position,
          std::int64_t{0});
    }
    if (progress) {
      progress(w + 1, count);
    }
  }
  TextResult result;
  result.model = perplexity(nll, options);
  if (reference != nullptr) {
    result.reference = perplexity(reference_nll, options);
    DivergenceResult divergence;
    divergence.kl_mean = kl.mean();
    divergence.kl_stderr = kl.error(options.protocol);
    std::sort(kl.values.begin(), kl.values.end());
    divergence.kl_median = quantile(kl.values, 0.5);
    divergence.kl_p99 = quantile(kl.values, 0.99);
    divergence.tokens = static_cast<std::int64_t>(kl.values.size());
    divergence.top1_agreement =
        static_cast<double>(same_top) / static_cast<double>(divergence.tokens);
    divergence.ppl_ratio = std::exp(result.model.nll_mean - result.reference->nll_mean);
    result.divergence = divergence;
  }
  return result;
}

}  // namespace quern
