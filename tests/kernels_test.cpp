// SPDX-License-Identifier: Apache-2.0
// Every level that this CPU has against the scalar one. u is the unit roundoff of float: one
// operation errs by at most u times its result. Bounds are first order in u; kSlack covers the
// rest, and the roundings of the scalar level's doubles.
#include "kernels/kernels.h"

#include "base/error.h"
#include "base/half.h"

#include <gtest/gtest.h>

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <new>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace quern {
namespace {

constexpr double kU = 0x1p-24;
constexpr double kSlack = 1.001;
constexpr double kDenormal = 0x1p-149;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr std::uint32_t kSeed = 20240229;

// An array that ends where its memory does: the page behind it cannot be touched, so that reading
// or writing one element too far ends the program, also in masked instructions that the address
// sanitizer does not see. Arrays of odd lengths are so unaligned.
template <class T>
class Guarded {
 public:
  explicit Guarded(std::int64_t n) : size_(n) {
    const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    const std::size_t bytes = sizeof(T) * static_cast<std::size_t>(n);
    const std::size_t whole = (bytes + page - 1) / page * page;
    mapped_ = whole + page;
    base_ = ::mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED || ::mprotect(bytes_at(whole), page, PROT_NONE) != 0) {
      throw std::bad_alloc();
    }
    data_ = reinterpret_cast<T*>(bytes_at(whole - bytes));
  }
  Guarded(const Guarded& other) : Guarded(other.size_) {
    std::copy_n(other.data_, other.size_, data_);
  }
  Guarded& operator=(Guarded other) noexcept {
    std::swap(base_, other.base_);
    std::swap(mapped_, other.mapped_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Guarded() { ::munmap(base_, mapped_); }

  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](std::int64_t i) { return data_[i]; }
  const T& operator[](std::int64_t i) const { return data_[i]; }
  [[nodiscard]] std::int64_t size() const { return size_; }
  // The same bytes: NaN equals itself, 0 is not -0.
  bool operator==(const Guarded& other) const {
    return size_ == other.size_ &&
           std::memcmp(data_, other.data_, sizeof(T) * static_cast<std::size_t>(size_)) == 0;
  }

 private:
  char* bytes_at(std::size_t offset) const { return static_cast<char*>(base_) + offset; }

  void* base_ = nullptr;
  std::size_t mapped_ = 0;
  T* data_ = nullptr;
  std::int64_t size_;
};

using Floats = Guarded<float>;

// All remainders of every vector width and unrolling, then layer sizes and more than one block of
// the dot products.
std::vector<std::int64_t> lengths() {
  std::vector<std::int64_t> all;
  for (std::int64_t n = 0; n <= 67; ++n) {
    all.push_back(n);
  }
  for (const std::int64_t n : {128, 1000, 1024, 3072, 4095, 4097, 8200, 20011}) {
    all.push_back(n);
  }
  return all;
}

Floats random_floats(std::int64_t n, std::uint32_t salt, float spread = 1.0F) {
  std::mt19937 random(kSeed + salt * 7919U + static_cast<std::uint32_t>(n));
  std::normal_distribution<float> normal(0.0F, spread);
  Floats values(n);
  for (std::int64_t i = 0; i < n; ++i) {
    values[i] = normal(random);
  }
  return values;
}

Guarded<std::uint16_t> random_bf16(std::int64_t n, std::uint32_t salt) {
  const Floats values = random_floats(n, salt);
  Guarded<std::uint16_t> halves(n);
  for (std::int64_t i = 0; i < n; ++i) {
    halves[i] = float_to_bf16(values[i]);
  }
  return halves;
}

const std::vector<float>& special_values() {
  static const std::vector<float> kValues = {
      0.0F,
      -0.0F,
      1.0F,
      -1.0F,
      kInf,
      -kInf,
      kNan,
      0x1p-149F,
      -0x1.8p-140F,
      0x1p-126F,
      -0x1p-127F,
      std::numeric_limits<float>::max(),
      std::numeric_limits<float>::lowest(),
      88.7F,
      -88.7F,
      89.5F,
      -89.5F,
      -103.9F,
      104.5F,
      1e-10F};
  return kValues;
}

// The special values against each other: pair (i, j) for every i, j.
void special_pairs(Floats& a, Floats& b) {
  const std::vector<float>& values = special_values();
  const auto count = static_cast<std::int64_t>(values.size());
  a = Floats(count * count);
  b = Floats(count * count);
  for (std::int64_t i = 0; i < count * count; ++i) {
    a[i] = values[static_cast<std::size_t>(i / count)];
    b[i] = values[static_cast<std::size_t>(i % count)];
  }
}

// Equal, both NaN, or within the bound.
void expect_close(double got, double expected, double bound, const std::string& where) {
  if (std::isnan(expected)) {
    EXPECT_TRUE(std::isnan(got)) << where << ": " << got << " instead of NaN";
  } else if (got != expected) {
    EXPECT_LE(std::abs(got - expected), bound * kSlack)
        << where << ": " << got << " instead of " << expected;
  }
}

std::string at(std::int64_t n, std::int64_t i) {
  return "n " + std::to_string(n) + ", element " + std::to_string(i);
}

std::vector<std::string> levels_here() {
  const CpuFeatures cpu = detect_cpu();
  std::vector<std::string> levels = {"scalar"};
  if (cpu.avx2) {
    levels.emplace_back("avx2");
  }
  if (cpu.avx512) {
    levels.emplace_back("avx512");
  }
  return levels;
}

std::vector<void (*)()> entries(const KernelOps& ops) {
  return {
#define QUERN_OP(name, signature) reinterpret_cast<void (*)()>(ops.name),
#include "kernels/ops.def"
#undef QUERN_OP
  };
}

class Kernels : public ::testing::TestWithParam<std::string> {
 protected:
  const KernelTable ops_ = make_kernel_table(detect_cpu(), GetParam());
  const KernelTable scalar_ = make_kernel_table(detect_cpu(), "scalar");
};

INSTANTIATE_TEST_SUITE_P(
    Levels,
    Kernels,
    ::testing::ValuesIn(levels_here()),
    [](const ::testing::TestParamInfo<std::string>& level) { return level.param; });

TEST_P(Kernels, TheForcedLevelIsTheOneThatRuns) {
  EXPECT_EQ(ops_.isa, GetParam());
  const auto mine = entries(ops_);
  const std::vector<std::string> all = levels_here();
  for (const std::string& level : all) {
    if (level == GetParam()) {
      continue;
    }
    // Every level has a version of its own of every operation.
    const auto other = entries(make_kernel_table(detect_cpu(), level));
    ASSERT_EQ(mine.size(), other.size());
    for (std::size_t i = 0; i < mine.size(); ++i) {
      EXPECT_NE(mine[i], other[i]) << ops_.choices[i].operation << " is the one of " << level;
    }
  }
  for (const KernelTable::Choice& choice : ops_.choices) {
    EXPECT_EQ(choice.level, GetParam()) << choice.operation;
  }
}

TEST(KernelTable, TakesTheBestLevelUnlessForced) {
  EXPECT_EQ(make_kernel_table(detect_cpu(), "").isa, levels_here().back());
  CpuFeatures old;
  const KernelTable table = make_kernel_table(old, "");
  EXPECT_EQ(table.isa, "scalar");
  for (const KernelTable::Choice& choice : table.choices) {
    EXPECT_NE(choice.refused.find("this CPU lacks"), std::string::npos) << choice.refused;
  }
}

TEST(KernelTable, RefusesWhatItCannotHave) {
  CpuFeatures old;
  for (const char* isa : {"avx2", "avx512"}) {
    try {
      (void)make_kernel_table(old, isa);
      FAIL() << isa;
    } catch (const UsageError& error) {
      EXPECT_EQ(error.failed(), "this CPU does not have the instruction set");
      EXPECT_EQ(error.hint(), "--isa scalar");
    }
  }
  EXPECT_THROW((void)make_kernel_table(detect_cpu(), "neon"), UsageError);
  EXPECT_THROW((void)make_kernel_table(detect_cpu(), "AVX2"), UsageError);
}

TEST_P(Kernels, SixteenBitFloatsConvertExactly) {
  constexpr std::int64_t kAll = 0x10000;
  Guarded<std::uint16_t> in(kAll);
  for (std::int64_t i = 0; i < kAll; ++i) {
    in[i] = static_cast<std::uint16_t>(i);
  }
  Floats out(kAll);
  ops_.bf16_to_f32(in.data(), out.data(), kAll);
  for (std::int64_t i = 0; i < kAll; ++i) {
    ASSERT_EQ(
        std::bit_cast<std::uint32_t>(out[i]), std::bit_cast<std::uint32_t>(bf16_to_float(in[i])))
        << "bf16 " << i;
  }
  ops_.f16_to_f32(in.data(), out.data(), kAll);
  for (std::int64_t i = 0; i < kAll; ++i) {
    ASSERT_EQ(
        std::bit_cast<std::uint32_t>(out[i]), std::bit_cast<std::uint32_t>(f16_to_float(in[i])))
        << "f16 " << i;
  }
  for (std::int64_t n = 0; n <= 67; ++n) {
    const Guarded<std::uint16_t> some = random_bf16(n, 1);
    for (const bool brain : {true, false}) {
      Floats got(n);
      Floats expected(n);
      (brain ? ops_.bf16_to_f32 : ops_.f16_to_f32)(some.data(), got.data(), n);
      (brain ? scalar_.bf16_to_f32 : scalar_.f16_to_f32)(some.data(), expected.data(), n);
      EXPECT_TRUE(got == expected) << "n " << n;
    }
  }
}

// A product is added to a partial sum in one rounding. A block of 4096 elements goes to at least 32
// partial sums (4 vectors of 8 lanes), each of which takes at most block / 32 + 4 terms (4: the
// remainder of the unrolled loop). Two partial sums are added as floats, and the result is rounded
// to float: every product passes through at most that many roundings. The scalar level rounds once.
double dot_bound(std::int64_t n, double sum_of_magnitudes) {
  const std::int64_t block = std::min<std::int64_t>(n, 4096);
  const std::int64_t roundings = block / 32 + 4 + 1 + 1 + 1;
  return static_cast<double>(roundings) * kU * sum_of_magnitudes;
}

TEST_P(Kernels, DotProducts) {
  for (const std::int64_t n : lengths()) {
    const Floats a = random_floats(n, 1);
    const Floats b = random_floats(n, 2);
    const Guarded<std::uint16_t> c = random_bf16(n, 3);
    double ab = 0;
    double ac = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      ab += std::abs(static_cast<double>(a[i]) * b[i]);
      ac += std::abs(static_cast<double>(a[i]) * bf16_to_float(c[i]));
    }
    expect_close(
        ops_.dot_f32(a.data(), b.data(), n),
        scalar_.dot_f32(a.data(), b.data(), n),
        dot_bound(n, ab),
        at(n, 0));
    expect_close(
        ops_.dot_bf16(a.data(), c.data(), n),
        scalar_.dot_bf16(a.data(), c.data(), n),
        dot_bound(n, ac),
        at(n, 0));
  }
}

TEST_P(Kernels, DotProductsPassOnWhatIsNotFinite) {
  for (const std::int64_t n : {1, 7, 16, 67}) {
    for (std::int64_t place = 0; place < n; ++place) {
      Floats a = random_floats(n, 1);
      const Floats b = random_floats(n, 2);
      a[place] = kNan;
      EXPECT_TRUE(std::isnan(ops_.dot_f32(a.data(), b.data(), n)));
      a[place] = kInf;
      EXPECT_EQ(ops_.dot_f32(a.data(), b.data(), n), b[place] > 0 ? kInf : -kInf);
    }
  }
}

TEST_P(Kernels, MatrixVectorProduct) {
  for (const std::int64_t columns : lengths()) {
    for (const std::int64_t rows : {0, 1, 3, 4, 6, 9}) {
      const Floats x = random_floats(columns, 1);
      const Guarded<std::uint16_t> W = random_bf16(rows * columns, 2);
      Floats got(rows);
      Floats expected(rows);
      ops_.matvec_bf16(W.data(), x.data(), got.data(), rows, columns);
      scalar_.matvec_bf16(W.data(), x.data(), expected.data(), rows, columns);
      for (std::int64_t row = 0; row < rows; ++row) {
        double magnitudes = 0;
        for (std::int64_t i = 0; i < columns; ++i) {
          magnitudes += std::abs(static_cast<double>(x[i]) * bf16_to_float(W[row * columns + i]));
        }
        expect_close(got[row], expected[row], dot_bound(columns, magnitudes), at(columns, row));
      }
      // Any split of the rows gives the same bytes.
      Floats split(rows);
      for (std::int64_t row = 0; row < rows; row += 2) {
        ops_.matvec_bf16(
            W.data() + row * columns,
            x.data(),
            split.data() + row,
            std::min<std::int64_t>(2, rows - row),
            columns);
      }
      EXPECT_TRUE(split == got) << "columns " << columns << ", rows " << rows;
    }
  }
}

// Scalar: product and sum rounded; elsewhere the sum alone.
TEST_P(Kernels, Axpy) {
  const auto check = [&](float a, const Floats& x, const Floats& y) {
    Floats got = y;
    Floats expected = y;
    ops_.axpy_f32(a, x.data(), got.data(), x.size());
    scalar_.axpy_f32(a, x.data(), expected.data(), x.size());
    for (std::int64_t i = 0; i < x.size(); ++i) {
      const double product = std::abs(static_cast<double>(a) * x[i]);
      expect_close(
          got[i],
          expected[i],
          kU * (product + 2 * std::abs(static_cast<double>(expected[i]))) + kDenormal,
          at(x.size(), i));
    }
  };
  for (const std::int64_t n : lengths()) {
    check(0.37F, random_floats(n, 1), random_floats(n, 2));
  }
  Floats x(0);
  Floats y(0);
  special_pairs(x, y);
  check(1.0F, x, y);
  check(-0.5F, x, y);
}

TEST_P(Kernels, AddIsExactlyTheScalarOne) {
  const auto check = [&](const Floats& x, const Floats& y) {
    Floats got = y;
    Floats expected = y;
    ops_.add_f32(x.data(), got.data(), x.size());
    scalar_.add_f32(x.data(), expected.data(), x.size());
    for (std::int64_t i = 0; i < x.size(); ++i) {
      expect_close(got[i], expected[i], 0, at(x.size(), i));
      EXPECT_EQ(std::signbit(got[i]) && got[i] == 0, std::signbit(expected[i]) && expected[i] == 0);
    }
  };
  for (const std::int64_t n : lengths()) {
    check(random_floats(n, 1), random_floats(n, 2));
  }
  Floats x(0);
  Floats y(0);
  special_pairs(x, y);
  check(x, y);
}

// Both levels sum in double, so that the inverse root errs by its rounding to float alone; two
// products follow: 3 u each.
TEST_P(Kernels, RmsNorm) {
  const auto check = [&](const Floats& x, const Floats& gain, float eps) {
    const std::int64_t n = x.size();
    Floats got(n);
    Floats expected(n);
    ops_.rms_norm(x.data(), gain.data(), eps, got.data(), n);
    scalar_.rms_norm(x.data(), gain.data(), eps, expected.data(), n);
    for (std::int64_t i = 0; i < n; ++i) {
      expect_close(
          got[i],
          expected[i],
          6 * kU * std::abs(static_cast<double>(expected[i])) +
              2 * kDenormal * (1 + std::abs(static_cast<double>(gain[i]))),
          at(n, i));
    }
    Floats in_place = x;
    ops_.rms_norm(in_place.data(), gain.data(), eps, in_place.data(), n);
    EXPECT_TRUE(in_place == got) << "n " << n;
  };
  for (const std::int64_t n : lengths()) {
    check(random_floats(n, 1, 30.0F), random_floats(n, 2), 1e-6F);
    check(random_floats(n, 1, 1e-30F), random_floats(n, 2), 1e-6F);
    // The squares exceed the floats; the sum is in double.
    check(random_floats(n, 1, 1e30F), random_floats(n, 2), 1e-6F);
  }
  for (const float special : special_values()) {
    for (const std::int64_t n : {5, 20, 67}) {
      Floats x = random_floats(n, 1);
      x[n / 2] = special;
      check(x, random_floats(n, 2), 1e-6F);
    }
  }
}

// A sum of two products; each level rounds at most both products and the sum.
TEST_P(Kernels, RopeHalf) {
  const auto check = [&](const Floats& x, const Floats& cos, const Floats& sin) {
    const std::int64_t half = cos.size();
    Floats got = x;
    Floats expected = x;
    ops_.rope_half(got.data(), cos.data(), sin.data(), half);
    scalar_.rope_half(expected.data(), cos.data(), sin.data(), half);
    for (std::int64_t i = 0; i < 2 * half; ++i) {
      const std::int64_t m = i % half;
      const std::int64_t other = i < half ? i + half : i - half;
      const double magnitudes = std::abs(static_cast<double>(x[i]) * cos[m]) +
                                std::abs(static_cast<double>(x[other]) * sin[m]);
      expect_close(got[i], expected[i], 4 * kU * magnitudes + 2 * kDenormal, at(half, i));
    }
  };
  for (const std::int64_t half : lengths()) {
    Floats cos = random_floats(half, 1);
    Floats sin(half);
    for (std::int64_t m = 0; m < half; ++m) {
      sin[m] = std::sin(cos[m]);
      cos[m] = std::cos(cos[m]);
    }
    check(random_floats(2 * half, 2), cos, sin);
  }
  Floats low(0);
  Floats high(0);
  special_pairs(low, high);
  Floats x(2 * low.size());
  Floats angle(low.size());
  for (std::int64_t i = 0; i < low.size(); ++i) {
    x[i] = low[i];
    x[low.size() + i] = high[i];
    angle[i] = 0.7071F;
  }
  check(x, angle, angle);
}

// Distance in units of the last place of the correctly rounded value.
double ulps(float got, double exact) {
  if (static_cast<double>(got) == exact) {
    return 0;
  }
  int exponent = 0;
  (void)std::frexp(exact, &exponent);
  return std::abs(static_cast<double>(got) - exact) /
         std::ldexp(1.0, std::max(exponent - 24, -149));
}

// Floats of [-104, 89] by a stride of bit patterns that is coprime to every power of two. With a
// stride of 1, that is over all of them, the maximum is 0.988 ulp at both vector levels (at 59.275)
// and 0.502 at the scalar one.
TEST_P(Kernels, ExponentialIsAccurate) {
  constexpr std::uint32_t kStride = 499;
  constexpr std::int64_t kBatch = 4096;
  std::vector<float> in;
  std::vector<float> out(kBatch);
  double worst = 0;
  float worst_at = 0;
  const auto flush = [&] {
    ops_.exp_f32(in.data(), out.data(), static_cast<std::int64_t>(in.size()));
    for (std::size_t i = 0; i < in.size(); ++i) {
      const double exact = std::exp(static_cast<double>(in[i]));
      if (exact >= 0x1.ffffffp127) {  // rounds to infinity
        EXPECT_EQ(out[i], kInf) << in[i];
        continue;
      }
      const double error = ulps(out[i], exact);
      if (error > worst) {
        worst = error;
        worst_at = in[i];
      }
    }
    in.clear();
  };
  for (const bool negative : {false, true}) {
    const auto last = std::bit_cast<std::uint32_t>(negative ? 104.0F : 89.0F);
    for (std::uint32_t bits = 0; bits <= last; bits += kStride) {
      in.push_back(std::bit_cast<float>(bits | (negative ? 0x80000000U : 0U)));
      if (static_cast<std::int64_t>(in.size()) == kBatch) {
        flush();
      }
    }
  }
  flush();
  RecordProperty("worst_ulps", std::to_string(worst));
  EXPECT_LE(worst, 1.0) << "at " << worst_at;
}

TEST_P(Kernels, ExponentialOfSpecialValues) {
  const Floats x = [] {
    Floats values(static_cast<std::int64_t>(special_values().size()));
    std::copy(special_values().begin(), special_values().end(), values.data());
    return values;
  }();
  Floats out(x.size());
  ops_.exp_f32(x.data(), out.data(), x.size());
  for (std::int64_t i = 0; i < x.size(); ++i) {
    const double exact = std::exp(static_cast<double>(x[i]));
    if (std::isnan(x[i])) {
      EXPECT_TRUE(std::isnan(out[i]));
    } else if (std::isinf(static_cast<float>(exact)) || exact == 0) {
      EXPECT_EQ(out[i], static_cast<float>(exact)) << x[i];
    } else {
      EXPECT_LE(ulps(out[i], exact), 1.0) << x[i];
    }
  }
  for (const float far : {-104.0F, -1e4F, -3e38F}) {
    float result = 1.0F;
    ops_.exp_f32(&far, &result, 1);
    EXPECT_EQ(result, 0.0F);
    EXPECT_FALSE(std::signbit(result));
  }
  for (std::int64_t n = 0; n <= 67; ++n) {
    const Floats in = random_floats(n, 1, 20.0F);
    Floats got(n);
    Floats each(n);
    ops_.exp_f32(in.data(), got.data(), n);
    for (std::int64_t i = 0; i < n; ++i) {
      ops_.exp_f32(in.data() + i, each.data() + i, 1);
    }
    EXPECT_TRUE(got == each) << "a result depends on where the element stands, n " << n;
  }
}

// One ulp is at most 2 u. The exponential errs by 2 u, then sum, quotient and product by u: 5 u for
// either level. A quotient below the normal floats errs by half of a denormal instead.
TEST_P(Kernels, Swiglu) {
  const auto check = [&](const Floats& gate, const Floats& up) {
    const std::int64_t n = gate.size();
    Floats got(n);
    Floats expected(n);
    ops_.swiglu(gate.data(), up.data(), got.data(), n);
    scalar_.swiglu(gate.data(), up.data(), expected.data(), n);
    for (std::int64_t i = 0; i < n; ++i) {
      expect_close(
          got[i],
          expected[i],
          10 * kU * std::abs(static_cast<double>(expected[i])) +
              kDenormal * (1 + std::abs(static_cast<double>(up[i]))),
          at(n, i));
    }
    Floats in_place = gate;
    ops_.swiglu(in_place.data(), up.data(), in_place.data(), n);
    EXPECT_TRUE(in_place == got) << "n " << n;
  };
  for (const std::int64_t n : lengths()) {
    check(random_floats(n, 1, 8.0F), random_floats(n, 2));
  }
  Floats gate(0);
  Floats up(0);
  special_pairs(gate, up);
  check(gate, up);
}

// x - max is the same in both levels. An exponential errs by 2 u and so does their sum; inverse and
// product round once each: 6 u for either level. Denormal exponentials err by one denormal.
constexpr double kSoftmaxBound = 12 * kU;

TEST_P(Kernels, Softmax) {
  const auto check = [&](const Floats& x) {
    Floats got = x;
    Floats expected = x;
    ops_.softmax(got.data(), x.size());
    scalar_.softmax(expected.data(), x.size());
    for (std::int64_t i = 0; i < x.size(); ++i) {
      expect_close(
          got[i],
          expected[i],
          kSoftmaxBound * static_cast<double>(expected[i]) + 2 * kDenormal,
          at(x.size(), i));
    }
  };
  for (const std::int64_t n : lengths()) {
    if (n > 0) {
      check(random_floats(n, 1));
      check(random_floats(n, 2, 40.0F));
    }
  }
  for (const float special : special_values()) {
    for (const std::int64_t n : {1, 5, 16, 20, 67}) {
      for (const std::int64_t place : {std::int64_t{0}, n / 2, n - 1}) {
        Floats x = random_floats(n, 3);
        x[place] = special;
        check(x);
        if (std::isnan(special) || special == kInf) {
          ops_.softmax(x.data(), n);
          EXPECT_TRUE(std::isnan(x[0])) << special;
        }
      }
    }
  }
}

// The logarithm turns the relative error of the sum, 2 u for either level, into an absolute one.
TEST_P(Kernels, LogSumExp) {
  const auto check = [&](const Floats& x) {
    const double expected = scalar_.log_sum_exp(x.data(), x.size());
    expect_close(
        ops_.log_sum_exp(x.data(), x.size()),
        expected,
        4 * kU + 0x1p-51 * std::abs(expected),
        at(x.size(), 0));
  };
  for (const std::int64_t n : lengths()) {
    if (n > 0) {
      check(random_floats(n, 1));
      check(random_floats(n, 2, 40.0F));
    }
  }
  check(random_floats(151936, 3, 4.0F));
  for (const float special : special_values()) {
    for (const std::int64_t n : {1, 5, 16, 20, 67}) {
      for (const std::int64_t place : {std::int64_t{0}, n / 2, n - 1}) {
        Floats x = random_floats(n, 4);
        x[place] = special;
        check(x);
        if (std::isnan(special) || special == kInf) {
          EXPECT_TRUE(std::isnan(ops_.log_sum_exp(x.data(), n))) << special;
        }
      }
    }
  }
}

TEST_P(Kernels, UnpackCodesOfEveryWidth) {
  for (int bits = 1; bits <= 8; ++bits) {
    for (const std::int64_t first : {0, 32, 96, 1024}) {
      for (std::int64_t n : lengths()) {
        // Exactly the words that hold the codes.
        const std::int64_t words = ((first + n) * bits + 31) / 32;
        std::mt19937 random(kSeed + static_cast<std::uint32_t>(n * 8 + bits));
        Guarded<std::uint32_t> packed(words);
        std::generate_n(packed.data(), words, std::ref(random));
        Guarded<std::uint8_t> got(n);
        ops_.unpack_codes(packed.data(), bits, first, n, got.data());
        for (std::int64_t i = 0; i < n; ++i) {
          unsigned expected = 0;  // bit by bit, from the definition of the stream
          for (int b = 0; b < bits; ++b) {
            const std::int64_t bit = (first + i) * bits + b;
            expected |= ((packed[bit / 32] >> (bit % 32)) & 1U) << static_cast<unsigned>(b);
          }
          ASSERT_EQ(got[i], expected) << bits << " bits, from " << first << ", " << at(n, i);
        }
      }
    }
  }
}

TEST_P(Kernels, DequantizeIsExactlyTheScalarOne) {
  for (const std::int64_t n : lengths()) {
    std::mt19937 random(kSeed + static_cast<std::uint32_t>(n));
    Guarded<std::uint8_t> codes(n);
    for (std::int64_t i = 0; i < n; ++i) {
      codes[i] = static_cast<std::uint8_t>(random());
    }
    for (const float scale : {0.0123F, -3.5F, 0x1p-24F, 0.0F}) {
      for (const float zero : {0.0F, 8.0F, 7.3F, 255.0F}) {
        Floats got(n);
        Floats expected(n);
        ops_.dequantize_group(codes.data(), scale, zero, got.data(), n);
        scalar_.dequantize_group(codes.data(), scale, zero, expected.data(), n);
        EXPECT_TRUE(got == expected) << "n " << n << ", scale " << scale << ", zero " << zero;
      }
    }
  }
}

}  // namespace
}  // namespace quern
