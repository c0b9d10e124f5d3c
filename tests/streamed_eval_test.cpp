// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "base/process.h"
#include "eval/eval_memory.h"
#include "eval/perplexity.h"
#include "packed_model.h"
#include "run_binary.h"
#include "running_model.h"
#include "scratch.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <fstream>
#include <sstream>

namespace quern {
namespace {

using testing::Ids;
using testing::PackedModel;
using testing::ScratchDirectory;
using testing::test_model;
using testing::TestContext;

Ids ids_below(std::int64_t vocabulary, std::int64_t count) {
  const auto rows = testing::some_ids(1, count, vocabulary);
  return {rows[0].begin(), rows[0].end()};
}

EvalMemory streamed(std::int64_t group, bool spilled) {
  EvalMemory memory;
  memory.streamed = true;
  memory.group = group;
  memory.spilled = spilled;
  return memory;
}

struct Run {
  std::filesystem::path model;
  std::filesystem::path reference;  // empty: none
};

TextResult evaluate(
    const Context& ctx,
    const Run& run,
    const EvalMemory& memory,
    std::span<const std::int32_t> ids,
    const PerplexityOptions& options) {
  const std::filesystem::path work = std::filesystem::temp_directory_path();
  const auto model = open_eval_model(ctx, open_checkpoint(run.model), memory, work, nullptr);
  std::unique_ptr<EvalModel> reference;
  if (!run.reference.empty()) {
    reference = open_eval_model(ctx, open_checkpoint(run.reference), memory, work, nullptr);
  }
  return evaluate_text(ctx, *model, reference.get(), ids, options, nullptr);
}

void expect_equal(const PerplexityResult& a, const PerplexityResult& b) {
  EXPECT_EQ(a.window_nll, b.window_nll);
  EXPECT_EQ(a.nll_mean, b.nll_mean);
  EXPECT_EQ(a.nll_stderr, b.nll_stderr);
  EXPECT_EQ(a.tokens, b.tokens);
}

// To the last bit.
void expect_equal(const TextResult& a, const TextResult& b) {
  expect_equal(a.model, b.model);
  ASSERT_EQ(a.reference.has_value(), b.reference.has_value());
  if (a.reference) {
    expect_equal(*a.reference, *b.reference);
    EXPECT_EQ(a.divergence->kl_mean, b.divergence->kl_mean);
    EXPECT_EQ(a.divergence->kl_stderr, b.divergence->kl_stderr);
    EXPECT_EQ(a.divergence->kl_median, b.divergence->kl_median);
    EXPECT_EQ(a.divergence->kl_p99, b.divergence->kl_p99);
    EXPECT_EQ(a.divergence->top1_agreement, b.divergence->top1_agreement);
    EXPECT_EQ(a.divergence->ppl_ratio, b.divergence->ppl_ratio);
  }
}

constexpr std::int64_t kContext = 24;
constexpr std::int64_t kWindows = 5;

PerplexityOptions small_windows() {
  PerplexityOptions options;
  options.context = kContext;
  return options;
}

void expect_streamed_is_resident(const Run& run, std::int64_t vocabulary) {
  const Ids ids = ids_below(vocabulary, kContext * kWindows + 3);
  const TestContext context(1);
  const TextResult resident = evaluate(*context, run, EvalMemory(), ids, small_windows());
  ASSERT_EQ(resident.model.windows, kWindows);
  for (const std::int64_t group : {1, 2, 5}) {
    for (const bool spilled : {false, true}) {
      SCOPED_TRACE(fmt::format("group {}, spilled {}", group, spilled));
      expect_equal(
          evaluate(*context, run, streamed(group, spilled), ids, small_windows()), resident);
    }
  }
  const TestContext three(3);
  expect_equal(evaluate(*three, run, streamed(2, true), ids, small_windows()), resident);
}

// A copy of a model in which the gains before the first mixer are others.
void write_changed_copy(const std::filesystem::path& source, const std::filesystem::path& copy) {
  std::filesystem::create_directories(copy);
  std::filesystem::copy_file(source / "config.json", copy / "config.json");
  std::string weights = read_file(source / "model.safetensors");
  const auto bytes = std::as_bytes(std::span(weights));
  const SafetensorsContent parsed = parse_safetensors(bytes, "model");
  for (const auto& [name, view] : parsed.tensors) {
    if (name.ends_with("layers.0.input_layernorm.weight")) {
      std::vector<float> gain = to_float(view);
      std::reverse(gain.begin(), gain.end());
      gain[0] += 0.5F;
      const std::vector<std::byte> stored = from_float(gain, view.dtype);
      std::copy_n(
          reinterpret_cast<const char*>(stored.data()),
          stored.size(),
          weights.begin() + (view.bytes.data() - bytes.data()));
    }
  }
  write_file(copy / "model.safetensors", weights);
}

class Streamed : public ::testing::TestWithParam<const char*> {};

INSTANTIATE_TEST_SUITE_P(
    Models,
    Streamed,
    ::testing::Values(
        "models/tiny-qwen3",
        "models/tiny-qwen2.5",
        "random-models/llama3-tied",
        "random-models/mistral-window",
        "random-models/qwen2-moe",
        "random-models/qwen3-moe",
        "random-models/qwen3-next",
        "random-models/qwen3.5",
        "random-models/qwen3.5-moe"),
    [](const auto& model) { return testing::test_name(model.param); });

TEST_P(Streamed, IsTheResidentEvaluationToTheLastBit) {
  const std::filesystem::path directory = test_model(GetParam());
  const std::int64_t vocabulary = build_graph(*open_checkpoint(directory)).config.vocab_size;
  expect_streamed_is_resident({directory, {}}, vocabulary);
  const ScratchDirectory scratch;
  write_changed_copy(directory, scratch.path() / "changed");
  expect_streamed_is_resident({scratch.path() / "changed", directory}, vocabulary);
}

TEST(StreamedEvaluation, ReadsQuantizedCheckpoints) {
  const ScratchDirectory scratch;
  const PackedModel four = PackedModel::uniform({4, true, 32, {}});
  const PackedModel eight = PackedModel::uniform({8, true, 32, {}});
  eight.write(scratch.path() / "reference", "gptq");
  for (const char* format : {"gptq", "awq", "compressed-tensors", "quern"}) {
    SCOPED_TRACE(format);
    const PackedModel model =
        format == std::string("awq") ? PackedModel::uniform({4, false, 32, {}}) : four;
    model.write(scratch.path() / format, format);
    expect_streamed_is_resident({scratch.path() / format, scratch.path() / "reference"}, 64);
  }
}

// The linears of a model, rounded to random codes, in GPTQ's files; the rest as it is.
void write_packed(const std::filesystem::path& source, const std::filesystem::path& target) {
  const auto checkpoint = open_checkpoint(source);
  const ModelGraph graph = build_graph(*checkpoint);
  const OutputFormat& format = find_output_format("gptq");
  const QuantScheme scheme{4, true, 32, {}};
  std::vector<TensorDeclaration> declarations;
  std::vector<std::vector<std::byte>> contents;
  std::vector<OutputModule> modules;
  std::map<std::string, TensorView> kept = checkpoint->tensors().tensors();
  unsigned seed = 1;
  for (const Block& block : graph.blocks) {
    for (const Linear& linear : block.linears) {
      if (linear.role == Role::kRouter || linear.role == Role::kSharedGate) {
        continue;
      }
      OutputModule module;
      module.name = linear.module;
      module.out_features = linear.out_features;
      module.in_features = linear.in_features;
      module.scheme = scheme;
      modules.push_back(module);
      const auto declared = format.declare(module);
      auto packed = format.pack(
          testing::random_linear(
              scheme, linear.out_features, linear.in_features, DType::kF16, seed++),
          module);
      declarations.insert(declarations.end(), declared.begin(), declared.end());
      std::move(packed.begin(), packed.end(), std::back_inserter(contents));
      kept.erase(linear.weight());
    }
  }
  for (const auto& [name, view] : kept) {
    declarations.push_back({name, view.dtype, view.shape});
    contents.emplace_back(view.bytes.begin(), view.bytes.end());
  }
  std::filesystem::create_directories(target);
  SafetensorsWriter writer(target, plan_safetensors(declarations));
  for (std::size_t i = 0; i < declarations.size(); ++i) {
    writer.write(declarations[i].name, contents[i]);
  }
  writer.finish();
  Json config = checkpoint->config();
  config["quantization_config"] = format.config(scheme, modules, Json::object());
  write_file(target / "config.json", config.dump(1));
}

TEST(StreamedEvaluation, ReadsPackedExpertsOneByOne) {
  const ScratchDirectory scratch;
  const std::filesystem::path source = test_model("random-models/qwen3-moe");
  write_packed(source, scratch.path() / "packed");
  ASSERT_TRUE(open_checkpoint(scratch.path() / "packed")
                  ->is_quantized("model.layers.0.mlp.experts.0.gate_proj"));
  expect_streamed_is_resident({scratch.path() / "packed", source}, 307);
}

TEST(StreamedEvaluation, TheSecondTextIsNotTheFirst) {
  const TestContext context(1);
  const auto directory = test_model("random-models/qwen3-moe");
  const Ids first = ids_below(307, 3 * kContext);
  const Ids second = {first.rbegin(), first.rend() - kContext};
  const auto model = open_eval_model(
      *context,
      open_checkpoint(directory),
      streamed(2, true),
      std::filesystem::temp_directory_path(),
      nullptr);
  (void)evaluate_text(*context, *model, nullptr, first, small_windows(), nullptr);
  const TextResult again =
      evaluate_text(*context, *model, nullptr, second, small_windows(), nullptr);
  expect_equal(again, evaluate(*context, {directory, {}}, EvalMemory(), second, small_windows()));
}

// Bytes of a file that are mapped into this process now.
std::uint64_t mapped_bytes(const std::filesystem::path& path) {
  std::ifstream maps("/proc/self/smaps");
  std::uint64_t bytes = 0;
  bool ours = false;
  for (std::string line; std::getline(maps, line);) {
    if (line.find('-') < line.find(':') && line.find(" r") != std::string::npos) {
      ours = line.ends_with(path.string());
    } else if (ours && line.starts_with("Rss:")) {
      std::istringstream fields(line.substr(4));
      std::uint64_t kilobytes = 0;
      fields >> kilobytes;
      bytes += kilobytes * 1024;
    }
  }
  return bytes;
}

TEST(StreamedEvaluation, GivesPagesBackAfterEachBlock) {
  const TestContext context(1);
  const std::filesystem::path directory = test_model("models/tiny-qwen3");
  const std::filesystem::path file = directory / "model.safetensors";
  const std::uint64_t size = std::filesystem::file_size(file);
  const std::vector<std::vector<std::int32_t>> windows = {ids_below(4096, 64)};
  std::uint64_t most = 0;
  const auto model = open_eval_model(
      *context, open_checkpoint(directory), streamed(1, false), {}, [&](double, std::int64_t) {
        most = std::max(most, mapped_bytes(file));
      });
  model->begin(windows);
  EXPECT_GT(most, size / 100);
  EXPECT_LT(most, size / 2);  // a block of four, and the table of embeddings is given back first
  EXPECT_LT(mapped_bytes(file), size / 10);

  // The whole model keeps them.
  const auto resident =
      open_eval_model(*context, open_checkpoint(directory), EvalMemory(), {}, nullptr);
  resident->begin(windows);
  (void)resident->hidden(0);
  EXPECT_GT(mapped_bytes(file), size / 2);
}

class Planned : public ::testing::Test {
 protected:
  EvalMemory plan(
      std::uint64_t budget,
      Streaming streaming = Streaming::kAuto,
      const char* name = "random-models/qwen3-moe",
      std::int64_t windows = 64,
      std::int64_t context = 65536) {
    const auto checkpoint = open_checkpoint(test_model(name));
    const ModelGraph graph = build_graph(*checkpoint);
    const std::vector<EvalSide> sides = {{graph, *checkpoint}};
    Context ctx = *context_;
    ctx.memory_budget = budget;
    return plan_eval_memory(ctx, sides, windows, context, streaming);
  }
  // What a refusal names, in MiB.
  std::uint64_t named(std::uint64_t budget, Streaming streaming) {
    try {
      (void)plan(budget, streaming);
    } catch (const ResourceError& error) {
      EXPECT_TRUE(error.hint().starts_with("--memory ")) << error.hint();
      return std::stoull(error.hint().substr(9));
    }
    return 0;
  }

  TestContext context_{1};
};

TEST_F(Planned, StreamsWhenTheBudgetSaysSo) {
  EXPECT_FALSE(plan(0).streamed);
  EXPECT_FALSE(plan(std::uint64_t{1} << 40U).streamed);
  EXPECT_TRUE(plan(std::uint64_t{1} << 40U, Streaming::kOn).streamed);
  // Rows of a window are 16 MiB, twice that before the experts.
  const EvalMemory all = plan(std::uint64_t{1} << 40U, Streaming::kOn);
  EXPECT_FALSE(all.spilled);
  EXPECT_EQ(all.group, 64);
  EXPECT_EQ(all.spilled_bytes, 0U);
  const EvalMemory some = plan(all.peak - (std::uint64_t{256} << 20U), Streaming::kOn);
  EXPECT_TRUE(some.spilled);
  EXPECT_GT(some.group, 32);
  EXPECT_LT(some.group, 64);
  EXPECT_EQ(some.spilled_bytes, std::uint64_t{64} * 65536 * 64 * 4);
  EXPECT_LE(some.peak, all.peak - (std::uint64_t{256} << 20U));
}

TEST_F(Planned, NamesTheSmallestBudgetThatWorks) {
  for (const Streaming streaming : {Streaming::kAuto, Streaming::kOn, Streaming::kOff}) {
    const std::uint64_t smallest = named(1, streaming);
    ASSERT_GT(smallest, 64U);
    const EvalMemory memory = plan(smallest << 20U, streaming);
    EXPECT_LE(memory.peak, smallest << 20U);
    if (streaming != Streaming::kAuto) {  // so small a model may fit as a whole
      EXPECT_EQ(memory.streamed, streaming == Streaming::kOn);
    }
    if (memory.streamed) {
      EXPECT_EQ(memory.group, 1);
      EXPECT_TRUE(memory.spilled);
    }
    EXPECT_GT(named((smallest - 16) << 20U, streaming), 0U);
  }
}

TEST(StreamedEvaluation, AnInterruptIsAnswered) {
  const TestContext context(1);
  std::atomic<int> interrupts = 0;
  Context ctx = *context;
  ctx.interrupts = &interrupts;
  const ScratchDirectory scratch;
  const auto model = open_eval_model(
      ctx,
      open_checkpoint(test_model("random-models/qwen3.5-moe")),
      streamed(1, true),
      scratch.path(),
      [&](double done, std::int64_t) { interrupts = done > 1.5 ? 1 : 0; });
  const Ids ids = ids_below(307, 2 * kContext);
  EXPECT_THROW(
      (void)evaluate_text(ctx, *model, nullptr, ids, small_windows(), nullptr), InterruptedError);
  EXPECT_TRUE(std::filesystem::is_empty(scratch.path()));
}

class StreamedProgram : public ::testing::Test {
 protected:
  testing::RunResult eval(const std::vector<std::string>& more, double signal_after = -1) {
    std::vector<std::string> arguments = {
        "--json",
        "--threads",
        "2",
        "eval",
        testing::bundled_model("tiny-qwen3"),
        "--perplexity",
        std::string(QUERN_TESTDATA) + "/text/wiki.test.raw",
        "--work-dir",
        scratch_.path().string()};
    arguments.insert(arguments.end(), more.begin(), more.end());
    testing::RunOptions options;
    options.signal_after = signal_after;
    options.signal = SIGINT;
    return testing::run_quern(arguments, options);
  }

  ScratchDirectory scratch_;
};

TEST_F(StreamedProgram, SaysTheSameWithinItsMemory) {
  const std::vector<std::string> few = {
      "--windows", "4", "--context", "512", "--reference", testing::bundled_model("tiny-qwen2.5")};
  const auto with = [&](std::vector<std::string> more) {
    more.insert(more.end(), few.begin(), few.end());
    return eval(more);
  };
  const testing::RunResult resident = with({});
  ASSERT_EQ(resident.code, 0) << resident.err;
  EXPECT_FALSE(resident.json().at("memory").at("streamed").get<bool>());

  const testing::RunResult refused = with({"--memory", "1MiB"});
  EXPECT_EQ(refused.code, 4);
  const std::string error = testing::error_of(refused);
  const std::size_t at = error.find("try: --memory ");
  ASSERT_NE(at, std::string::npos) << refused.err;
  const std::string smallest = error.substr(at + 14, error.find(',', at) - at - 14);

  for (const std::vector<std::string>& options :
       std::vector<std::vector<std::string>>{{"--stream", "on"}, {"--memory", smallest}}) {
    const testing::RunResult result = with(options);
    ASSERT_EQ(result.code, 0) << result.err;
    const Json json = result.json();
    EXPECT_TRUE(json.at("memory").at("streamed").get<bool>());
    for (const char* part : {"perplexity", "divergence"}) {
      EXPECT_EQ(json.at(part), resident.json().at(part)) << options[1];
    }
    const auto estimate = json.at("memory").at("estimated_peak_bytes").get<double>();
    EXPECT_LE(json.at("peak_anonymous_bytes").get<double>(), 1.05 * estimate);
    EXPECT_TRUE(std::filesystem::is_empty(scratch_.path()));
  }
}

TEST_F(StreamedProgram, LeavesNothingBehindWhenItIsInterrupted) {
  const testing::RunResult result = eval({"--stream", "on"}, 1.0);
  EXPECT_EQ(result.code, 130) << result.err;
  EXPECT_NE(testing::error_of(result).find("evaluation interrupted"), std::string::npos);
  EXPECT_TRUE(std::filesystem::is_empty(scratch_.path()));
}

}  // namespace
}  // namespace quern
