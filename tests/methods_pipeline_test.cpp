// SPDX-License-Identifier: Apache-2.0
// Methods, transforms and integer activations on a whole model, block by block and in memory.
#include "base/error.h"
#include "calib/calibration_set.h"
#include "format/checkpoint.h"
#include "golden.h"
#include "nn/decoder.h"
#include "pipeline/block_quantizer.h"
#include "pipeline/run_state.h"
#include "plan/recipes.h"
#include "quant_fixture.h"
#include "running_model.h"
#include "scratch.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace quern {
namespace {

using testing::Ids;
using testing::ScratchDirectory;
using testing::test_model;
using testing::TestContext;
using testing::values_of;

// Rows of the ids that every tool of peers.json was calibrated with.
std::vector<Ids> calibration_ids(std::size_t first, std::size_t count, std::size_t length) {
  const auto store = SafetensorsStore::open(test_model("models/calibration-128x512.safetensors"));
  const TensorView& view = *store->find("input_ids");
  const std::vector<std::int32_t> all = values_of<std::int32_t>(view);
  const auto width = static_cast<std::size_t>(view.shape[1]);
  std::vector<Ids> rows;
  for (std::size_t i = first; i < first + count; ++i) {
    rows.emplace_back(
        all.begin() + static_cast<std::ptrdiff_t>(i * width),
        all.begin() + static_cast<std::ptrdiff_t>(i * width + length));
  }
  return rows;
}

// What a run is told, as the program makes it of a recipe.
struct RunSetup {
  QuantPlan plan;
  MethodOptions options;
};

RunSetup setup_of(const ModelGraph& graph, const std::string& name) {
  const Recipe& recipe = find_recipe(name);
  RunSetup setup;
  setup.plan =
      uniform_plan(graph, std::string(recipe.method), {recipe.bits, true, recipe.group_size}, {});
  setup.plan.transform = recipe.transform;
  for (PlannedLinear& linear : setup.plan.linears) {
    linear.range = range_for(linear.role, recipe.range);
    linear.activation.bits = recipe.activation_bits;
  }
  setup.options.range = recipe.range;
  setup.options.mismatch_target = recipe.mismatch_target;
  setup.options.restarts = recipe.restarts;
  return setup;
}

// A model whose blocks are quantized where they stand.
class QuantizedModel {
 public:
  QuantizedModel(const Context& ctx, const std::string& directory)
      : ctx_(ctx), model_(load_model(open_checkpoint(test_model(directory)))) {}

  [[nodiscard]] const ModelGraph& graph() const { return model_.graph; }
  [[nodiscard]] Model& model() { return model_; }

  std::vector<QuantizedBlock> quantize(const RunSetup& setup, const std::vector<Ids>& calibration) {
    BlockQuantizer quantizer(
        ctx_, model_.graph, model_.checkpoint->tensors(), setup.plan, setup.options, {});
    CalibrationState state = initial_state(setup, calibration);
    Progress progress(ctx_.log, 1);
    std::vector<QuantizedBlock> done;
    const BlockParts parts = {
        [](const std::string&) { return std::optional<QuantizedBlock>(); },
        [&](const std::string&, const QuantizedBlock& part) { done.push_back(part); }};
    for (std::size_t i = 0; i < model_.graph.blocks.size(); ++i) {
      quantizer.run(model_.graph.blocks[i], model_.blocks[i], state, parts, progress);
    }
    return done;
  }

  std::vector<float> logits(const Ids& ids) {
    std::vector<float> all;
    Decoder decoder(ctx_, model_);
    decoder.for_logits(
        decoder.forward(ids), [&](std::int64_t, std::int64_t rows, const float* logits) {
          all.insert(all.end(), logits, logits + rows * model_.graph.config.vocab_size);
        });
    return all;
  }

 private:
  CalibrationState initial_state(const RunSetup& setup, const std::vector<Ids>& calibration) {
    const std::int64_t hidden = model_.graph.config.hidden_size;
    const std::vector<std::int64_t> rows(
        calibration.size(), static_cast<std::int64_t>(calibration.front().size()));
    CalibrationState state{ActivationStore(hidden, rows, {}), std::nullopt, {}, 1};
    if (needs_reference(setup.plan, setup.options)) {
      state.reference.emplace(hidden, rows, "");
    }
    for (std::size_t i = 0; i < calibration.size(); ++i) {
      const std::vector<float> x = embed_tokens(ctx_.kernels, model_.embedding, calibration[i]);
      state.x.write(static_cast<std::int64_t>(i), x.data());
      if (state.reference) {
        state.reference->write(static_cast<std::int64_t>(i), x.data());
      }
      state.order.push_back(static_cast<std::int64_t>(i));
    }
    return state;
  }

  const Context& ctx_;
  Model model_;
};

// Mean KL divergence over the rows of [rows, vocab] logits, in nats.
double mean_kl(const std::vector<float>& p, const std::vector<float>& q, std::size_t vocab) {
  double sum = 0;
  for (std::size_t row = 0; row < p.size(); row += vocab) {
    double p_total = 0;
    double q_total = 0;
    for (std::size_t i = row; i < row + vocab; ++i) {
      p_total += std::exp(static_cast<double>(p[i]));
      q_total += std::exp(static_cast<double>(q[i]));
    }
    for (std::size_t i = row; i < row + vocab; ++i) {
      const double log_p = static_cast<double>(p[i]) - std::log(p_total);
      sum += std::exp(log_p) * (log_p - static_cast<double>(q[i]) + std::log(q_total));
    }
  }
  return sum / static_cast<double>(p.size() / vocab);
}

class MethodsOnAModel : public ::testing::Test {
 protected:
  double kl_of(const RunSetup& setup, std::vector<QuantizedBlock>* blocks = nullptr) {
    QuantizedModel model(*context_, kModel);
    std::vector<QuantizedBlock> done = model.quantize(setup, calibration_);
    if (blocks != nullptr) {
      *blocks = std::move(done);
    }
    return mean_kl(
        original_, model.logits(text_), static_cast<std::size_t>(model.graph().config.vocab_size));
  }
  RunSetup setup(const std::string& recipe) {
    return setup_of(QuantizedModel(*context_, kModel).graph(), recipe);
  }

  static constexpr const char* kModel = "models/tiny-qwen3";
  TestContext context_;
  std::vector<Ids> calibration_ = calibration_ids(0, 8, 128);
  Ids text_ = calibration_ids(100, 1, 256).front();
  std::vector<float> original_ = QuantizedModel(*context_, kModel).logits(text_);
};

TEST_F(MethodsOnAModel, SmoothQuantHelpsIntegerActivations) {
  RunSetup smooth = setup("smoothquant");
  std::vector<QuantizedBlock> blocks;
  const double with = kl_of(smooth, &blocks);
  smooth.plan.transform = "";
  const double without = kl_of(smooth);
  EXPECT_LT(with, 0.7 * without);
  // Bounded by what no rounding of activations leaves.
  RunSetup weights = setup("rtn");
  for (PlannedLinear& linear : weights.plan.linears) {
    linear.scheme = {8, true, 0};
  }
  EXPECT_GT(with, 0.5 * kl_of(weights));
  ASSERT_EQ(blocks.size(), 6U);
  for (const QuantizedBlock& block : blocks) {
    EXPECT_EQ(block.transforms.size(), 4U);  // every site has a producer that takes factors
    for (const QuantizedLinear& linear : block.linears) {
      EXPECT_EQ(linear.report.method, "smoothquant");
      EXPECT_EQ(linear.activation, (ActivationScheme{.bits = 8}));
    }
  }
}

TEST_F(MethodsOnAModel, StaticScalesAreFoundAndUsed) {
  RunSetup smooth = setup("smoothquant");
  for (PlannedLinear& linear : smooth.plan.linears) {
    linear.activation.dynamic = false;
  }
  std::vector<QuantizedBlock> blocks;
  const double with = kl_of(smooth, &blocks);
  EXPECT_LT(with, 0.2);
  for (const QuantizedLinear& linear : blocks.front().linears) {
    EXPECT_FALSE(linear.activation.dynamic);
    EXPECT_GT(linear.activation.scale, 0.0F);
    // q, k and v read the same rows.
    if (linear.plan->role == Role::kKey || linear.plan->role == Role::kValue) {
      EXPECT_EQ(linear.activation, blocks.front().linears.front().activation);
    }
  }
}

TEST_F(MethodsOnAModel, GptaqRunsOnTwoStreams) {
  RunSetup gptaq = setup("gptaq");
  RunSetup gptq = setup("gptq");
  for (RunSetup* each : {&gptaq, &gptq}) {
    for (PlannedLinear& linear : each->plan.linears) {
      linear.scheme.bits = 3;
    }
  }
  EXPECT_TRUE(needs_reference(gptaq.plan, gptaq.options));
  EXPECT_FALSE(needs_reference(gptq.plan, gptq.options));
  std::vector<QuantizedBlock> blocks;
  const double asymmetric = kl_of(gptaq, &blocks);
  for (const QuantizedBlock& block : blocks) {
    for (const QuantizedLinear& linear : block.linears) {
      EXPECT_EQ(linear.report.method, "gptaq") << linear.report.fallback.value_or("");
      EXPECT_EQ(linear.report.mismatch_strength, 0.25);
    }
  }
  // A thousand tokens of calibration: a gain, or nearly none, but no harm.
  EXPECT_LT(asymmetric, 1.1 * kl_of(gptq));
  // One linear alone is enough to need the second stream; a kept one is not.
  for (PlannedLinear& linear : gptq.plan.linears) {
    linear.method = "keep";
  }
  gptq.plan.linears.back().method = "gptaq";
  EXPECT_TRUE(needs_reference(gptq.plan, gptq.options));
  gptq.plan.linears.back().method = "keep";
  gptq.options.mismatch_target = true;
  EXPECT_FALSE(needs_reference(gptq.plan, gptq.options));
}

TEST_F(MethodsOnAModel, AwqClipsAllButQueriesAndKeys) {
  const RunSetup awq = setup("awq");
  std::vector<QuantizedBlock> blocks;
  const double with = kl_of(awq, &blocks);
  EXPECT_LT(with, 0.5 * kl_of(setup("rtn")));
  for (const QuantizedLinear& linear : blocks.front().linears) {
    EXPECT_EQ(linear.report.method, "awq");
    ASSERT_TRUE(linear.report.clip_threshold.has_value());
    const Role role = linear.plan->role;
    if (role == Role::kQuery || role == Role::kKey) {
      EXPECT_NEAR(*linear.report.clip_threshold, 1.0, 1e-6);
    } else {
      EXPECT_LT(*linear.report.clip_threshold, 1.0);
    }
    EXPECT_EQ(linear.report.range_errors.size(), role == Role::kDown ? 4U : 0U);
  }
}

TEST_F(MethodsOnAModel, BillmRuns) {
  std::vector<QuantizedBlock> blocks;
  const RunSetup billm = setup("billm");  // the blocks point into its plan
  const double with = kl_of(billm, &blocks);
  EXPECT_LT(with, 8.0);
  for (const QuantizedBlock& block : blocks) {
    for (const QuantizedLinear& linear : block.linears) {
      EXPECT_EQ(linear.report.method, "billm");
      EXPECT_EQ(linear.matrix->kind(), "billm");
      EXPECT_FALSE(linear.report.clip_threshold.has_value());
      const Json report = report_json(linear);
      EXPECT_EQ(report["bits"], 1);
      EXPECT_GT(report["stored_bits"].get<double>(), 2.8);
      EXPECT_LT(report["stored_bits"].get<double>(), 3.0);
    }
  }
}

// What a killed run reads back is what it had: the same values, activations and reports.
TEST_F(MethodsOnAModel, RunStateKeepsEveryForm) {
  for (const char* recipe : {"smoothquant", "billm", "awq"}) {
    const ScratchDirectory scratch;
    QuantizedModel model(*context_, kModel);
    RunSetup made = setup(recipe);
    for (PlannedLinear& linear : made.plan.linears) {
      linear.activation.dynamic = !linear.activation.active();
    }
    const Block& block = model.graph().blocks.front();
    const std::vector<QuantizedBlock> blocks = model.quantize(made, calibration_);
    const QuantizedBlock& before = blocks.front();
    const RunState state(scratch.path() / "run", Json{{"test", recipe}}, true);
    state.save(block_part(block), before);
    const std::optional<QuantizedBlock> after = state.load(block_part(block), made.plan);
    ASSERT_TRUE(after.has_value()) << recipe;
    ASSERT_EQ(after->linears.size(), before.linears.size());
    for (std::size_t i = 0; i < before.linears.size(); ++i) {
      EXPECT_EQ(after->linears[i].activation, before.linears[i].activation);
      EXPECT_EQ(
          after->linears[i].matrix->dequantize((*context_).kernels),
          before.linears[i].matrix->dequantize((*context_).kernels));
      EXPECT_EQ(report_json(after->linears[i]), report_json(before.linears[i]));
    }
    // Installed, it makes the model that the run went on with.
    QuantizedModel resumed(*context_, kModel);
    install(block, *after, resumed.model().blocks.front());
    for (std::size_t k = 0; k < block.linears.size(); ++k) {
      EXPECT_EQ(
          resumed.model().blocks.front().linears[k].activation,
          model.model().blocks.front().linears[k].activation);
    }
  }
}

}  // namespace
}  // namespace quern
