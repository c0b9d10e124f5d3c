// SPDX-License-Identifier: Apache-2.0
// Times a whole-model gradient pass against a plain forward pass. Built by hand:
//   cmake --preset dev -DQUERN_BENCH=ON && cmake --build --preset dev --target gradients_bench
//   gradients_bench MODEL [sequences length threads]
#include "base/context.h"
#include "base/cpu.h"
#include "base/process.h"
#include "calib/gradients.h"
#include "format/checkpoint.h"
#include "kernels/blas.h"
#include "kernels/kernels.h"
#include "nn/decoder.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <random>
#include <vector>

namespace {

using quern::GradientOptions;
using quern::GradientParts;
using quern::Linear;

using Sequences = std::vector<std::vector<std::int32_t>>;

Sequences random_sequences(std::int64_t vocab, std::int64_t count, std::int64_t length) {
  std::mt19937 random(1);
  Sequences sequences(
      static_cast<std::size_t>(count), std::vector<std::int32_t>(static_cast<std::size_t>(length)));
  for (auto& sequence : sequences) {
    for (std::int32_t& id : sequence) {
      id = static_cast<std::int32_t>(random() % static_cast<std::uint32_t>(vocab));
    }
  }
  return sequences;
}

void report(const char* name, double work, const std::function<void()>& run) {
  const double wall = quern::steady_seconds();
  const double cpu = quern::process_usage().cpu_seconds;
  run();
  const double cpu_seconds = quern::process_usage().cpu_seconds - cpu;
  fmt::print(
      "{:<28} {:8.3f} s  CPU {:8.3f} s  {:7.2f} GFLOP  {:6.1f} GFLOP/s a core\n",
      name,
      quern::steady_seconds() - wall,
      cpu_seconds,
      2e-9 * work,
      2e-9 * work / cpu_seconds);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    fmt::print(stderr, "usage: gradients_bench MODEL [sequences length threads]\n");
    return 2;
  }
  const auto argument = [&](int i, int otherwise) {
    return argc > i ? std::atoi(argv[i]) : otherwise;  // NOLINT(cert-err34-c)
  };
  const quern::CpuFeatures cpu = quern::detect_cpu();
  const quern::KernelTable kernels = quern::make_kernel_table(cpu, "");
  const quern::Blas blas(cpu);
  quern::Log log({});
  quern::ThreadPool pool(argument(4, 1));
  const quern::Context ctx{pool, kernels, blas, log};
  const quern::Model model = quern::load_model(quern::open_checkpoint(argv[1]));
  const Sequences sequences =
      random_sequences(model.graph.config.vocab_size, argument(2, 16), argument(3, 512));

  const double plain = quern::gradient_work(model.graph, sequences, {});
  double forward = 0;  // block inputs, head and all: what perplexity computes
  for (const auto& sequence : sequences) {
    const auto rows = static_cast<double>(sequence.size());
    const double attention =
        rows * rows * static_cast<double>(model.graph.config.heads * model.graph.config.head_dim);
    forward += rows * static_cast<double>(
                          model.graph.linear_parameters() + model.graph.head.parameters()) +
               attention * static_cast<double>(model.graph.blocks.size());
  }
  report("forward, logits included", forward, [&] {
    quern::Decoder decoder(ctx, model);
    for (const auto& sequence : sequences) {
      decoder.for_logits(decoder.forward(sequence), [](auto, auto, const float*) {});
    }
  });
  const auto gradients = [&](const char* name, const GradientParts& parts) {
    GradientOptions options;
    options.parts = [&](const Linear& linear) {
      return linear.role == quern::Role::kHead ? GradientParts{} : parts;
    };
    std::uint64_t highest = 0;
    const std::uint64_t before = quern::process_usage().anonymous_bytes;
    options.progress = [&](double) {
      highest = std::max(highest, quern::process_usage().anonymous_bytes - before);
    };
    const double work = quern::gradient_work(model.graph, sequences, options);
    const quern::GradientMemory memory =
        quern::gradient_memory(ctx, model.graph, sequences, options);
    report(name, work, [&] {
      (void)quern::gather_gradients(
          ctx, model.graph, *model.checkpoint, sequences, options, [](auto, auto&&...) {});
    });
    fmt::print(
        "  memory: at most {:.0f} MB by the estimate, {:.0f} MB seen between sequences\n",
        1e-6 * static_cast<double>(memory.stored + memory.working),
        1e-6 * static_cast<double>(highest));
  };
  gradients("gradients, vectors", {});
  gradients("gradients, Fisher diagonal", {false, true, 0});
  gradients("gradients, guided Hessians", {false, false, 1});
  fmt::print("work of the plain pass over that of a forward pass: {:.2f}\n", plain / forward);
  return 0;
}
