// SPDX-License-Identifier: Apache-2.0
// One thread of this machine: the operations of ops.def at every level, and the dense products,
// each next to what the hardware gives. `of_peak` is the share of a register-only loop of fused
// multiply-adds at the same level, `of_memory` the share of a sequential read of memory: data that
// stays in a cache can exceed it.
//
//   kernels_bench --benchmark_filter='matvec.*avx512'
#include "base/cpu.h"
#include "base/half.h"
#include "kernels/blas.h"
#include "kernels/kernels.h"

#include <benchmark/benchmark.h>
#include <fmt/format.h>

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <ctime>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace quern {
namespace {

// Enough sums to cover latency times throughput on every CPU so far, few enough for 16 registers.
constexpr int kSums = 12;

__attribute__((target("avx512f"))) float multiply_add_avx512(std::int64_t rounds, float factor) {
  __m512 sums[kSums];
  for (__m512& sum : sums) {
    sum = _mm512_set1_ps(factor);
  }
  const __m512 a = _mm512_set1_ps(factor);
  for (std::int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int k = 0; k < kSums; ++k) {
      sums[k] = _mm512_fmadd_ps(sums[k], a, a);
    }
  }
  __m512 all = sums[0];
  for (int k = 1; k < kSums; ++k) {
    all = _mm512_add_ps(all, sums[k]);
  }
  return _mm512_cvtss_f32(all);
}

__attribute__((target("avx2,fma"))) float multiply_add_avx2(std::int64_t rounds, float factor) {
  __m256 sums[kSums];
  for (__m256& sum : sums) {
    sum = _mm256_set1_ps(factor);
  }
  const __m256 a = _mm256_set1_ps(factor);
  for (std::int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int k = 0; k < kSums; ++k) {
      sums[k] = _mm256_fmadd_ps(sums[k], a, a);
    }
  }
  __m256 all = sums[0];
  for (int k = 1; k < kSums; ++k) {
    all = _mm256_add_ps(all, sums[k]);
  }
  return _mm256_cvtss_f32(all);
}

// The lowest CPU has no fused instruction: a product and a sum, four lanes each.
float multiply_add_scalar(std::int64_t rounds, float factor) {
  __m128 sums[kSums];
  for (__m128& sum : sums) {
    sum = _mm_set1_ps(factor);
  }
  const __m128 a = _mm_set1_ps(factor);
  for (std::int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int k = 0; k < kSums; ++k) {
      sums[k] = _mm_add_ps(_mm_mul_ps(sums[k], a), a);
    }
  }
  __m128 all = sums[0];
  for (int k = 1; k < kSums; ++k) {
    all = _mm_add_ps(all, sums[k]);
  }
  return _mm_cvtss_f32(all);
}

// The thread's own time, here and below: the machine may be shared.
double cpu_seconds() {
  timespec now{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Seconds of the fastest of several calls.
double best_seconds(const std::function<void()>& work) {
  double best = 1e9;
  for (int i = 0; i < 12; ++i) {
    const double begin = cpu_seconds();
    work();
    best = std::min(best, cpu_seconds() - begin);
  }
  return best;
}

double measured_peak(float (*multiply_add)(std::int64_t, float), int lanes) {
  constexpr std::int64_t kRounds = 2'000'000;
  const double seconds =
      best_seconds([&] { benchmark::DoNotOptimize(multiply_add(kRounds, 0.5F)); });
  return 2.0 * lanes * kSums * static_cast<double>(kRounds) / seconds;
}

double measured_bandwidth() {
  // Larger than any cache; 64-bit loads outrun memory several times over.
  std::vector<std::uint64_t> values(std::size_t{1} << 26U, 1);
  const double seconds = best_seconds([&] {
    std::uint64_t sums[8] = {};
    for (std::size_t i = 0; i < values.size(); i += 8) {
      for (std::size_t k = 0; k < 8; ++k) {
        sums[k] += values[i + k];
      }
    }
    benchmark::DoNotOptimize(sums);
  });
  return static_cast<double>(values.size() * sizeof(std::uint64_t)) / seconds;
}

struct Machine {
  CpuFeatures cpu = detect_cpu();
  std::map<std::string, KernelTable> levels;
  std::map<std::string, double> peak;  // flops per second, by level
  double bandwidth = 0;  // bytes per second

  Machine() {
    levels.emplace("scalar", make_kernel_table(cpu, "scalar"));
    peak["scalar"] = measured_peak(multiply_add_scalar, 4);
    if (cpu.avx2) {
      levels.emplace("avx2", make_kernel_table(cpu, "avx2"));
      peak["avx2"] = measured_peak(multiply_add_avx2, 8);
    }
    if (cpu.avx512) {
      levels.emplace("avx512", make_kernel_table(cpu, "avx512"));
      peak["avx512"] = measured_peak(multiply_add_avx512, 16);
    }
    bandwidth = measured_bandwidth();
  }

  [[nodiscard]] double highest_peak() const {
    double highest = 0;
    for (const auto& [level, flops] : peak) {
      highest = std::max(highest, flops);
    }
    return highest;
  }
};

// Runs the call and returns the seconds of one. The rates of the framework would print a share of
// the peak as "0.9/s".
double seconds_per_call(benchmark::State& state, const std::function<void()>& call) {
  const double begin = cpu_seconds();
  while (state.KeepRunning()) {
    call();
    benchmark::ClobberMemory();
  }
  return (cpu_seconds() - begin) / static_cast<double>(state.iterations());
}

void report_flops(benchmark::State& state, double flops_per_second, double peak) {
  state.counters["GFLOP/s"] = flops_per_second * 1e-9;
  state.counters["of_peak"] = flops_per_second / peak;
}

void report_bytes(benchmark::State& state, double bytes_per_second, double bandwidth) {
  state.counters["GB/s"] = bytes_per_second * 1e-9;
  state.counters["of_memory"] = bytes_per_second / bandwidth;
}

std::vector<float> random_floats(std::int64_t n) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<std::size_t>(n));
  for (float& value : values) {
    value = normal(random);
  }
  return values;
}

// A short random pattern repeated: the values do not matter to the speed, only that they are
// ordinary numbers, and the largest matrix here has 156 million.
std::vector<std::uint16_t> random_bf16(std::int64_t n) {
  const std::vector<float> pattern = random_floats(4099);
  std::vector<std::uint16_t> values(static_cast<std::size_t>(n));
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = float_to_bf16(pattern[i % pattern.size()]);
  }
  return values;
}

// One registered measurement: `prepare` makes the data once the benchmark is chosen to run, and
// gives the call to be timed. `cost` is what one call takes.
struct Cost {
  double flops = 0;
  double bytes = 0;
};
using Prepare = std::function<std::function<void()>(const KernelTable& ops)>;

void add(const Machine& machine, const std::string& name, Cost cost, const Prepare& prepare) {
  for (const auto& [level, ops] : machine.levels) {
    const double peak = machine.peak.at(level);
    const double bandwidth = machine.bandwidth;
    const KernelTable& table = ops;
    benchmark::RegisterBenchmark(
        fmt::format("{}/{}", name, level).c_str(), [=, &table](benchmark::State& state) {
          const std::function<void()> call = prepare(table);
          const double seconds = seconds_per_call(state, call);
          if (cost.flops > 0) {
            report_flops(state, cost.flops / seconds, peak);
          }
          if (cost.bytes > 0) {
            report_bytes(state, cost.bytes / seconds, bandwidth);
          }
        });
  }
}

// Widths of the small Qwen models: hidden 1024, feed-forward 3072, heads of 128, vocabulary 151936.
constexpr std::int64_t kHidden = 1024;
constexpr std::int64_t kWide = 3072;
constexpr std::int64_t kHead = 128;
constexpr std::int64_t kVocabulary = 151936;

void add_conversions(const Machine& machine) {
  for (const std::int64_t n : {kWide, kHidden * kWide}) {
    const auto bytes = static_cast<double>(n) * 6;
    add(machine, fmt::format("bf16_to_f32/{}", n), {0, bytes}, [n](const KernelTable& ops) {
      return [&ops, n, in = random_bf16(n), out = std::vector<float>(n)]() mutable {
        ops.bf16_to_f32(in.data(), out.data(), n);
      };
    });
    add(machine, fmt::format("f16_to_f32/{}", n), {0, bytes}, [n](const KernelTable& ops) {
      return [&ops, n, in = random_bf16(n), out = std::vector<float>(n)]() mutable {
        ops.f16_to_f32(in.data(), out.data(), n);
      };
    });
  }
  for (const int bits : {2, 3, 4, 8}) {
    const auto n = kHidden;
    const auto bytes = static_cast<double>(n) * (1 + bits / 8.0);
    add(machine,
        fmt::format("unpack_codes/{}bit/{}", bits, n),
        {0, bytes},
        [n, bits](const KernelTable& ops) {
          const auto words = static_cast<std::size_t>(n * bits / 32);
          return [&ops,
                  n,
                  bits,
                  in = std::vector<std::uint32_t>(words, 0x9e3779b9U),
                  out = std::vector<std::uint8_t>(n)]() mutable {
            ops.unpack_codes(in.data(), bits, 0, n, out.data());
          };
        });
  }
  add(machine,
      fmt::format("dequantize_group/{}", kHead),
      {0, kHead * 5},
      [](const KernelTable& ops) {
        return [&ops,
                codes = std::vector<std::uint8_t>(kHead, 7),
                out = std::vector<float>(kHead)]() mutable {
          ops.dequantize_group(codes.data(), 0.01F, 8.0F, out.data(), kHead);
        };
      });
}

void add_products(const Machine& machine) {
  for (const std::int64_t n : {kHead, kHidden, kWide}) {
    const auto count = static_cast<double>(n);
    add(machine, fmt::format("dot_f32/{}", n), {2 * count, 8 * count}, [n](const KernelTable& ops) {
      return [&ops, n, a = random_floats(n), b = random_floats(n)] {
        benchmark::DoNotOptimize(ops.dot_f32(a.data(), b.data(), n));
      };
    });
    add(machine,
        fmt::format("dot_bf16/{}", n),
        {2 * count, 6 * count},
        [n](const KernelTable& ops) {
          return [&ops, n, a = random_floats(n), b = random_bf16(n)] {
            benchmark::DoNotOptimize(ops.dot_bf16(a.data(), b.data(), n));
          };
        });
  }
  struct Shape {
    std::int64_t rows;
    std::int64_t columns;
  };
  for (const Shape s :
       {Shape{kHidden, kHidden}, {kWide, kHidden}, {kHidden, kWide}, {kVocabulary, kHidden}}) {
    const auto count = static_cast<double>(s.rows * s.columns);
    add(machine,
        fmt::format("matvec_bf16/{}x{}", s.rows, s.columns),
        {2 * count, 2 * count},
        [s](const KernelTable& ops) {
          return [&ops,
                  s,
                  W = random_bf16(s.rows * s.columns),
                  x = random_floats(s.columns),
                  y = std::vector<float>(s.rows)]() mutable {
            ops.matvec_bf16(W.data(), x.data(), y.data(), s.rows, s.columns);
          };
        });
  }
}

void add_elementwise(const Machine& machine) {
  const auto n = kWide;
  const auto count = static_cast<double>(n);
  add(machine, fmt::format("axpy_f32/{}", n), {0, 12 * count}, [n](const KernelTable& ops) {
    return [&ops, n, x = random_floats(n), y = random_floats(n)]() mutable {
      ops.axpy_f32(1e-3F, x.data(), y.data(), n);
    };
  });
  add(machine, fmt::format("add_f32/{}", kHidden), {0, 12.0 * kHidden}, [](const KernelTable& ops) {
    return [&ops, x = random_floats(kHidden), y = random_floats(kHidden)]() mutable {
      ops.add_f32(x.data(), y.data(), kHidden);
    };
  });
  for (const std::int64_t width : {kHead, kHidden}) {
    const auto bytes = 16 * static_cast<double>(width);  // x twice, gain, y
    add(machine, fmt::format("rms_norm/{}", width), {0, bytes}, [width](const KernelTable& ops) {
      return [&ops,
              width,
              x = random_floats(width),
              gain = random_floats(width),
              y = std::vector<float>(width)]() mutable {
        ops.rms_norm(x.data(), gain.data(), 1e-6F, y.data(), width);
      };
    });
  }
  add(machine,
      fmt::format("rope_half/{}", kHead / 2),
      {0, 12.0 * kHead},
      [](const KernelTable& ops) {
        return [&ops,
                x = random_floats(kHead),
                cos = std::vector<float>(kHead / 2, 0.6F),
                sin = std::vector<float>(kHead / 2, 0.8F)]() mutable {
          ops.rope_half(x.data(), cos.data(), sin.data(), kHead / 2);
        };
      });
  add(machine, fmt::format("exp_f32/{}", n), {0, 8 * count}, [n](const KernelTable& ops) {
    return [&ops, n, x = random_floats(n), out = std::vector<float>(n)]() mutable {
      ops.exp_f32(x.data(), out.data(), n);
    };
  });
  add(machine, fmt::format("swiglu/{}", n), {0, 12 * count}, [n](const KernelTable& ops) {
    return [&ops,
            n,
            gate = random_floats(n),
            up = random_floats(n),
            out = std::vector<float>(n)]() mutable {
      ops.swiglu(gate.data(), up.data(), out.data(), n);
    };
  });
  for (const std::int64_t length : {512, 2048}) {
    const auto bytes =
        20 * static_cast<double>(length);  // read for the maximum, then twice updated
    add(machine, fmt::format("softmax/{}", length), {0, bytes}, [length](const KernelTable& ops) {
      return [&ops, length, x = random_floats(length)]() mutable { ops.softmax(x.data(), length); };
    });
  }
  add(machine,
      fmt::format("log_sum_exp/{}", kVocabulary),
      {0, 8.0 * kVocabulary},
      [](const KernelTable& ops) {
        return [&ops, x = random_floats(kVocabulary)] {
          benchmark::DoNotOptimize(ops.log_sum_exp(x.data(), kVocabulary));
        };
      });
}

// y[m, n] = x[m, k] W[n, k]^T: the product of a linear layer, m tokens at once.
void add_blas(const Machine& machine, const std::shared_ptr<const Blas>& blas) {
  const double peak = machine.highest_peak();
  for (const std::int64_t width : {1024, 2048, 3072}) {
    for (const std::int64_t m : {1, 8, 64, 128, 512, 2048}) {
      benchmark::RegisterBenchmark(
          fmt::format("gemm/{}/{}", width, m).c_str(), [=](benchmark::State& state) {
            const std::vector<float> x = random_floats(m * width);
            const std::vector<float> W = random_floats(width * width);
            std::vector<float> y(static_cast<std::size_t>(m * width));
            const double seconds = seconds_per_call(state, [&] {
              blas->gemm(
                  false,
                  true,
                  m,
                  width,
                  width,
                  1.0F,
                  x.data(),
                  width,
                  W.data(),
                  width,
                  0.0F,
                  y.data(),
                  width);
            });
            report_flops(state, 2.0 * static_cast<double>(m * width * width) / seconds, peak);
          });
    }
    benchmark::RegisterBenchmark(
        fmt::format("syrk/{}/2048", width).c_str(), [=](benchmark::State& state) {
          constexpr std::int64_t kRows = 2048;
          const std::vector<float> x = random_floats(kRows * width);
          std::vector<float> H(static_cast<std::size_t>(width * width));
          const double seconds = seconds_per_call(state, [&] {
            blas->syrk_upper(width, kRows, 1.0F, x.data(), width, 0.0F, H.data(), width);
          });
          report_flops(state, static_cast<double>(kRows * width * (width + 1)) / seconds, peak);
        });
    // Doubles: half as many to a register, so that the peak is half. The time includes the copy.
    benchmark::RegisterBenchmark(
        fmt::format("cholesky_double/{}", width).c_str(), [=](benchmark::State& state) {
          std::vector<double> A(static_cast<std::size_t>(width * width), 0.5);
          for (std::int64_t i = 0; i < width; ++i) {
            A[static_cast<std::size_t>(i * width + i)] = static_cast<double>(width);
          }
          std::vector<double> L(A.size());
          const double seconds = seconds_per_call(state, [&] {
            L = A;
            benchmark::DoNotOptimize(blas->cholesky_lower(width, L.data(), width));
          });
          report_flops(state, std::pow(static_cast<double>(width), 3) / 3 / seconds, peak / 2);
        });
  }
}

int run(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) {
    return 2;
  }
  const Machine machine;
  const auto blas = std::make_shared<const Blas>(machine.cpu);
  fmt::print(
      "{}, {}\nmemory, sequential read {:.1f} GB/s\n",
      machine.cpu.name,
      blas->description(),
      machine.bandwidth * 1e-9);
  for (const auto& [level, flops] : machine.peak) {
    fmt::print("multiply-add in registers, {}: {:.1f} GFLOP/s\n", level, flops * 1e-9);
  }
  std::fflush(stdout);
  add_conversions(machine);
  add_products(machine);
  add_elementwise(machine);
  add_blas(machine, blas);
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}

}  // namespace
}  // namespace quern

int main(int argc, char** argv) {
  return quern::run(argc, argv);
}
