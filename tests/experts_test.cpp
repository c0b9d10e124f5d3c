// SPDX-License-Identifier: Apache-2.0
// Mixtures of experts, quantized expert by expert.
#include "base/error.h"
#include "format/checkpoint.h"
#include "golden.h"
#include "nn/decoder.h"
#include "pipeline/block_quantizer.h"
#include "plan/recipes.h"
#include "quant_fixture.h"
#include "running_model.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace quern {
namespace {

using testing::Ids;
using testing::test_model;
using testing::TestContext;

using Parts = std::map<std::string, QuantizedBlock>;

// One run over some sequences of random ids; where its parts are kept.
class ExpertRun {
 public:
  ExpertRun(const Context& ctx, const std::string& directory, bool two_streams)
      : ctx_(ctx), model_(load_model(open_checkpoint(test_model(directory)))) {
    plan = uniform_plan(model_.graph, "gptq", {4, true, 32}, {});
    options.mismatch_target = two_streams;
  }

  [[nodiscard]] const ModelGraph& graph() const { return model_.graph; }

  // Rounds the model, taking what `known` holds as it is; the residual stream at its end.
  std::vector<float> run(const std::vector<Ids>& calibration, const Parts& known, Parts& made) {
    std::vector<BlockWeights> blocks = model_.blocks;
    BlockQuantizer quantizer(ctx_, model_.graph, model_.checkpoint->tensors(), plan, options, {});
    const std::int64_t hidden = model_.graph.config.hidden_size;
    const std::vector<std::int64_t> rows(
        calibration.size(), static_cast<std::int64_t>(calibration.front().size()));
    CalibrationState state{ActivationStore(hidden, rows, {}), std::nullopt, {}, 1};
    if (options.mismatch_target) {
      state.reference.emplace(hidden, rows, "");
    }
    for (std::size_t i = 0; i < calibration.size(); ++i) {
      const std::vector<float> x = embed_tokens(ctx_.kernels, model_.embedding, calibration[i]);
      const auto sequence = static_cast<std::int64_t>(i);
      state.x.write(sequence, x.data());
      if (state.reference) {
        state.reference->write(sequence, x.data());
      }
      state.order.push_back(sequence);
    }
    Progress progress(ctx_.log, 1);
    const BlockParts parts = {
        [&](const std::string& part) -> std::optional<QuantizedBlock> {
          const auto found = known.find(part);
          return found == known.end() ? std::nullopt : std::optional(found->second);
        },
        [&](const std::string& part, const QuantizedBlock& done) { made[part] = done; }};
    for (std::size_t i = 0; i < model_.graph.blocks.size(); ++i) {
      quantizer.run(model_.graph.blocks[i], blocks[i], state, parts, progress);
    }
    std::vector<float> all;
    for (std::size_t i = 0; i < calibration.size(); ++i) {
      std::vector<float> x(static_cast<std::size_t>(rows[i] * hidden));
      state.x.read(static_cast<std::int64_t>(i), x.data());
      all.insert(all.end(), x.begin(), x.end());
    }
    return all;
  }

  // What the blocks make of the same sequences once the parts are in their places.
  std::vector<float> forward(const std::vector<Ids>& calibration, const Parts& parts) {
    std::vector<BlockWeights> blocks = model_.blocks;
    for (std::size_t i = 0; i < model_.graph.blocks.size(); ++i) {
      for (const std::string& part : block_parts(model_.graph.blocks[i])) {
        install(model_.graph.blocks[i], parts.at(part), blocks[i]);
      }
    }
    Workspace workspace(ctx_);
    std::vector<float> all;
    for (const Ids& ids : calibration) {
      std::vector<float> x = embed_tokens(ctx_.kernels, model_.embedding, ids);
      for (std::size_t i = 0; i < model_.graph.blocks.size(); ++i) {
        LayerCache cache;
        block_forward(
            ctx_,
            workspace,
            model_.graph.config,
            model_.graph.blocks[i],
            blocks[i],
            static_cast<std::int64_t>(ids.size()),
            cache,
            x.data());
      }
      all.insert(all.end(), x.begin(), x.end());
    }
    return all;
  }

  QuantPlan plan;
  MethodOptions options;

 private:
  const Context& ctx_;
  Model model_;
};

std::vector<Ids> random_ids(std::size_t count, std::size_t length) {
  std::mt19937 random(7);
  std::uniform_int_distribution<std::int32_t> id(0, 306);
  std::vector<Ids> sequences(count);
  for (Ids& ids : sequences) {
    for (std::size_t i = 0; i < length; ++i) {
      ids.push_back(id(random));
    }
  }
  return sequences;
}

void expect_same(const Context& ctx, const QuantizedBlock& a, const QuantizedBlock& b) {
  ASSERT_EQ(a.linears.size(), b.linears.size());
  for (std::size_t i = 0; i < a.linears.size(); ++i) {
    EXPECT_EQ(a.linears[i].plan->name, b.linears[i].plan->name);
    EXPECT_EQ(
        a.linears[i].matrix->dequantize(ctx.kernels), b.linears[i].matrix->dequantize(ctx.kernels))
        << a.linears[i].plan->name;
  }
}

class Experts : public ::testing::Test {
 protected:
  TestContext context_;
};

// A run that goes on where any part ended makes what an undisturbed one makes, to the last bit.
TEST_F(Experts, GoOnAfterAnyPart) {
  const std::vector<Ids> calibration = random_ids(3, 40);
  for (const auto& [model, two_streams] :
       {std::pair("random-models/qwen3-moe", false),
        std::pair("random-models/qwen3.5-moe", true)}) {
    SCOPED_TRACE(model);
    ExpertRun whole(*context_, model, two_streams);
    Parts all;
    const std::vector<float> end = whole.run(calibration, {}, all);
    std::vector<std::string> order;
    for (const Block& block : whole.graph().blocks) {
      for (const std::string& part : block_parts(block)) {
        order.push_back(part);
      }
    }
    ASSERT_EQ(all.size(), order.size());
    for (std::size_t kept = 1; kept < order.size(); kept += 3) {
      Parts known;
      for (std::size_t i = 0; i < kept; ++i) {
        known.emplace(order[i], all.at(order[i]));
      }
      Parts made;
      EXPECT_EQ(whole.run(calibration, known, made), end) << kept << " parts were done";
      EXPECT_EQ(made.size(), order.size() - kept);
      for (const auto& [part, done] : made) {
        expect_same(*context_, done, all.at(part));
      }
    }
  }
}

// The rows that experts get are gathered over all sequences; what becomes of them is what the block
// makes sequence by sequence, but for the rounding of sums in another order.
TEST_F(Experts, LeaveTheResidualThatTheBlockMakes) {
  const std::vector<Ids> calibration = random_ids(3, 40);
  for (const char* model : {"random-models/qwen2-moe", "random-models/qwen3-next"}) {
    SCOPED_TRACE(model);
    ExpertRun run(*context_, model, false);
    Parts parts;
    const std::vector<float> end = run.run(calibration, {}, parts);
    const std::vector<float> wanted = run.forward(calibration, parts);
    ASSERT_EQ(end.size(), wanted.size());
    double largest = 0;
    double difference = 0;
    for (std::size_t i = 0; i < end.size(); ++i) {
      largest = std::max(largest, std::abs(static_cast<double>(wanted[i])));
      difference = std::max(difference, std::abs(static_cast<double>(end[i] - wanted[i])));
    }
    // Sums of some hundred floats in each of a dozen linears: 2^-24 * 12 * sqrt(200), generously.
    EXPECT_LT(difference, 2e-5 * largest);
  }
}

TEST_F(Experts, ThatAreRareBorrowOrAreRoundedPlainly) {
  const std::vector<Ids> calibration = random_ids(2, 24);
  for (const RareExperts choice : {RareExperts::kPooled, RareExperts::kRtn}) {
    ExpertRun run(*context_, "random-models/qwen3-moe", false);
    run.options.rare_experts = choice;
    Parts parts;
    (void)run.run(calibration, {}, parts);
    std::size_t experts = 0;
    for (const auto& [part, done] : parts) {
      for (const QuantizedLinear& linear : done.linears) {
        if (part.find("experts") == std::string::npos) {
          EXPECT_EQ(linear.report.borrowed_tokens, 0);
          continue;
        }
        ++experts;
        // 24 tokens count, one sequence is held out: every expert is rare.
        EXPECT_LE(linear.report.tokens, 24);
        if (choice == RareExperts::kRtn) {
          EXPECT_EQ(linear.report.method, "rtn");
          EXPECT_TRUE(linear.report.fallback.has_value());
          EXPECT_EQ(linear.report.borrowed_tokens, 0);
        } else {
          EXPECT_EQ(linear.report.method, "gptq") << linear.plan->name;
          EXPECT_EQ(linear.report.tokens + linear.report.borrowed_tokens, 24);
        }
      }
    }
    EXPECT_GT(experts, 0U);
  }
}

TEST_F(Experts, AloneAreRoundedWhenAskedFor) {
  ExpertRun run(*context_, "random-models/qwen3.5-moe", false);
  keep_all_but_experts(run.graph(), run.plan);
  for (const PlannedLinear& linear : run.plan.linears) {
    EXPECT_EQ(!linear.keep(), linear.name.find(".experts.") != std::string::npos) << linear.name;
  }
  ExpertRun dense(*context_, "random-models/qwen3.5", false);
  EXPECT_THROW(keep_all_but_experts(dense.graph(), dense.plan), UsageError);
}

// Routers and the gates of DeltaNet decide where values go; no plan of ours rounds them.
TEST_F(Experts, KeepTheirRouters) {
  for (const char* model : {"random-models/qwen3-next", "random-models/qwen3.5-moe"}) {
    ExpertRun run(*context_, model, false);
    std::set<Role> kept;
    for (const PlannedLinear& linear : run.plan.linears) {
      if (linear.keep()) {
        kept.insert(linear.role);
      }
    }
    EXPECT_TRUE(kept.contains(Role::kRouter));
    EXPECT_TRUE(kept.contains(Role::kSharedGate));
    EXPECT_TRUE(kept.contains(Role::kDeltaGates));
    EXPECT_FALSE(kept.contains(Role::kDeltaInput));
    EXPECT_FALSE(kept.contains(Role::kGate));
  }
}

}  // namespace
}  // namespace quern
