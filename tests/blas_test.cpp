// SPDX-License-Identifier: Apache-2.0
// The dense products and factorisations against loops in double.
#include "kernels/blas.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace quern {
namespace {

constexpr std::uint32_t kSeed = 20240301;
constexpr double kUnit32 = 0x1p-24;  // one rounding of a float, relative
constexpr double kUnit64 = 0x1p-53;

const Blas& blas() {
  static const Blas kInstance(detect_cpu());
  return kInstance;
}

template <class T>
constexpr double unit() {
  return sizeof(T) == sizeof(float) ? kUnit32 : kUnit64;
}

template <class T>
std::vector<T> random_values(std::int64_t count, std::uint32_t salt) {
  std::mt19937 random(kSeed + salt);
  std::normal_distribution<double> normal;
  std::vector<T> values(static_cast<std::size_t>(count));
  for (T& value : values) {
    value = static_cast<T>(normal(random));
  }
  return values;
}

// What the padding between the end of a row and its stride holds: it must survive every call, and
// must not enter a result.
constexpr double kPadding = 1e30;

template <class T>
struct Matrix {
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t stride;
  std::vector<T> values;

  Matrix(std::int64_t r, std::int64_t c, std::int64_t padding, std::uint32_t salt)
      : rows(r),
        columns(c),
        stride(c + padding),
        values(static_cast<std::size_t>(r * stride), static_cast<T>(kPadding)) {
    const std::vector<T> random = random_values<T>(r * c, salt);
    for (std::int64_t i = 0; i < r; ++i) {
      for (std::int64_t j = 0; j < c; ++j) {
        (*this)(i, j) = random[static_cast<std::size_t>(i * c + j)];
      }
    }
  }
  T& operator()(std::int64_t i, std::int64_t j) {
    return values[static_cast<std::size_t>(i * stride + j)];
  }
  const T& operator()(std::int64_t i, std::int64_t j) const {
    return values[static_cast<std::size_t>(i * stride + j)];
  }
  [[nodiscard]] bool padding_intact() const {
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t j = columns; j < stride; ++j) {
        if ((*this)(i, j) != static_cast<T>(kPadding)) {
          return false;
        }
      }
    }
    return true;
  }
};

// Each of the k products and sums of an element rounds once, then alpha, beta and their sum.
template <class T>
void check_gemm(bool ta, bool tb, std::int64_t m, std::int64_t n, std::int64_t k, T alpha, T beta) {
  const Matrix<T> A(ta ? k : m, ta ? m : k, 3, 1);
  const Matrix<T> B(tb ? n : k, tb ? k : n, 5, 2);
  Matrix<T> C(m, n, 2, 3);
  const Matrix<T> before = C;
  blas().gemm(
      ta,
      tb,
      m,
      n,
      k,
      alpha,
      A.values.data(),
      A.stride,
      B.values.data(),
      B.stride,
      beta,
      C.values.data(),
      C.stride);
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t j = 0; j < n; ++j) {
      double sum = 0;
      double magnitudes = 0;
      for (std::int64_t l = 0; l < k; ++l) {
        const double product = static_cast<double>(ta ? A(l, i) : A(i, l)) *
                               static_cast<double>(tb ? B(j, l) : B(l, j));
        sum += product;
        magnitudes += std::abs(product);
      }
      const double old = static_cast<double>(beta) * static_cast<double>(before(i, j));
      const double expected = static_cast<double>(alpha) * sum + old;
      const double bound = unit<T>() * static_cast<double>(2 * k + 4) *
                           (std::abs(static_cast<double>(alpha)) * magnitudes + std::abs(old));
      ASSERT_NEAR(static_cast<double>(C(i, j)), expected, bound) << i << ", " << j;
    }
  }
  EXPECT_TRUE(C.padding_intact());
}

TEST(Blas, ProductsOfEveryTransposition) {
  for (const bool ta : {false, true}) {
    for (const bool tb : {false, true}) {
      for (const std::int64_t m : {1, 5, 64}) {
        for (const std::int64_t n : {1, 33, 96}) {
          for (const std::int64_t k : {1, 7, 130}) {
            SCOPED_TRACE(
                std::to_string(m) + " x " + std::to_string(n) + " x " + std::to_string(k) +
                (ta ? " A transposed" : "") + (tb ? " B transposed" : ""));
            check_gemm<float>(ta, tb, m, n, k, 1.0F, 0.0F);
            check_gemm<float>(ta, tb, m, n, k, -0.5F, 1.5F);
            check_gemm<double>(ta, tb, m, n, k, 1.0, 0.0);
            check_gemm<double>(ta, tb, m, n, k, -0.5, 1.5);
          }
        }
      }
    }
  }
}

// What an output buffer holds before must not matter when beta is 0, NaN included.
TEST(Blas, BetaOfZeroOverwrites) {
  const std::vector<float> a = {1, 2, 3, 4};
  std::vector<float> c(4, std::nanf(""));
  blas().gemm(false, true, 2, 2, 2, 1.0F, a.data(), 2, a.data(), 2, 0.0F, c.data(), 2);
  EXPECT_EQ(c, (std::vector<float>{5, 11, 11, 25}));
}

TEST(Blas, SyrkFillsTheUpperTriangleOnly) {
  for (const std::int64_t n : {1, 5, 64, 130}) {
    for (const std::int64_t k : {1, 9, 200}) {
      const Matrix<float> A(k, n, 3, 1);
      Matrix<float> C(n, n, 2, 2);
      const Matrix<float> before = C;
      blas().syrk_upper(n, k, 0.5F, A.values.data(), A.stride, 1.0F, C.values.data(), C.stride);
      for (std::int64_t i = 0; i < n; ++i) {
        for (std::int64_t j = 0; j < n; ++j) {
          if (j < i) {
            ASSERT_EQ(C(i, j), before(i, j)) << i << ", " << j;
            continue;
          }
          double sum = 0;
          double magnitudes = 0;
          for (std::int64_t l = 0; l < k; ++l) {
            const double product = static_cast<double>(A(l, i)) * static_cast<double>(A(l, j));
            sum += product;
            magnitudes += std::abs(product);
          }
          const double old = static_cast<double>(before(i, j));
          ASSERT_NEAR(
              C(i, j),
              0.5 * sum + old,
              kUnit32 * static_cast<double>(2 * k + 4) * (magnitudes + std::abs(old)))
              << i << ", " << j;
        }
      }
      EXPECT_TRUE(C.padding_intact());
    }
  }
}

// X^T X / k + I: condition number of order 10, so that every bound below stays near k u.
template <class T>
Matrix<T> positive_definite(std::int64_t n, std::int64_t padding, std::uint32_t salt) {
  const std::int64_t k = n + 8;
  const std::vector<double> X = random_values<double>(k * n, salt);
  Matrix<T> A(n, n, padding, 0);
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (std::int64_t l = 0; l < k; ++l) {
        sum += X[static_cast<std::size_t>(l * n + i)] * X[static_cast<std::size_t>(l * n + j)];
      }
      A(i, j) = static_cast<T>(sum / static_cast<double>(k) + (i == j ? 1.0 : 0.0));
    }
  }
  return A;
}

template <class T>
void check_factorisation(std::int64_t n) {
  SCOPED_TRACE("n " + std::to_string(n) + ", bytes " + std::to_string(sizeof(T)));
  const Matrix<T> A = positive_definite<T>(n, 3, static_cast<std::uint32_t>(n));
  Matrix<T> L = A;
  ASSERT_TRUE(blas().cholesky_lower(n, L.values.data(), L.stride));
  EXPECT_TRUE(L.padding_intact());
  // Higham, Accuracy and Stability, theorem 10.3: |A - L L^T| <= (n + 2) u |L| |L^T| elementwise,
  // and sum_k l_ik^2 = a_ii bounds the right side by sqrt(a_ii a_jj).
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j < n; ++j) {
      if (j > i) {
        ASSERT_EQ(L(i, j), A(i, j)) << "the upper triangle was touched";
        continue;
      }
      double sum = 0;
      for (std::int64_t l = 0; l <= j; ++l) {
        sum += static_cast<double>(L(i, l)) * static_cast<double>(L(j, l));
      }
      const double size = std::sqrt(static_cast<double>(A(i, i)) * static_cast<double>(A(j, j)));
      ASSERT_NEAR(
          sum, static_cast<double>(A(i, j)), 2 * static_cast<double>(n + 2) * unit<T>() * size)
          << i << ", " << j;
    }
  }

  // Theorem 14.5 there, for the inverse M: |M L - I| <= c_n u |M| |L|, with c_n of order n.
  Matrix<T> M = L;
  ASSERT_TRUE(blas().invert_lower(n, M.values.data(), M.stride));
  EXPECT_TRUE(M.padding_intact());
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j <= i; ++j) {
      double sum = 0;
      double magnitudes = 0;
      for (std::int64_t l = j; l <= i; ++l) {
        const double product = static_cast<double>(M(i, l)) * static_cast<double>(L(l, j));
        sum += product;
        magnitudes += std::abs(product);
      }
      ASSERT_NEAR(sum, i == j ? 1.0 : 0.0, 2 * static_cast<double>(n + 2) * unit<T>() * magnitudes)
          << i << ", " << j;
    }
  }
}

TEST(Blas, CholeskyAndTriangularInverse) {
  for (const std::int64_t n : {1, 2, 3, 17, 64, 130}) {
    check_factorisation<float>(n);
    check_factorisation<double>(n);
  }
}

// The residual of a solve by Cholesky: |b - A x| <= (3n + 4) u |L| |L^T| |x| (theorem 10.4), and
// the row sums of |L| |L^T| are at most n max(a_ii).
TEST(Blas, SolvesFromTheFactor) {
  for (const std::int64_t n : {1, 2, 17, 130}) {
    for (const std::int64_t columns : {1, 5}) {
      const Matrix<double> A = positive_definite<double>(n, 1, static_cast<std::uint32_t>(n));
      Matrix<double> L = A;
      ASSERT_TRUE(blas().cholesky_lower(n, L.values.data(), L.stride));
      const Matrix<double> b(n, columns, 2, 9);
      Matrix<double> x = b;
      blas().solve_cholesky_lower(n, columns, L.values.data(), L.stride, x.values.data(), x.stride);
      EXPECT_TRUE(x.padding_intact());
      double diagonal = 0;
      double largest = 0;
      for (std::int64_t i = 0; i < n; ++i) {
        diagonal = std::max(diagonal, A(i, i));
        for (std::int64_t j = 0; j < columns; ++j) {
          largest = std::max(largest, std::abs(x(i, j)));
        }
      }
      const auto size = static_cast<double>(n);
      for (std::int64_t i = 0; i < n; ++i) {
        for (std::int64_t j = 0; j < columns; ++j) {
          double product = 0;
          for (std::int64_t l = 0; l < n; ++l) {
            product += A(i, l) * x(l, j);
          }
          ASSERT_NEAR(
              product, b(i, j), (3 * size + 4) * kUnit64 * size * diagonal * largest + 1e-300)
              << i << ", " << j;
        }
      }
    }
  }
}

TEST(Blas, AMatrixThatIsNotPositiveDefiniteIsAnAnswerNotAnError) {
  for (const std::int64_t n : {1, 2, 64, 130}) {
    Matrix<double> A = positive_definite<double>(n, 0, 5);
    A(n - 1, n - 1) = -1.0;
    EXPECT_FALSE(blas().cholesky_lower(n, A.values.data(), A.stride)) << n;
    Matrix<float> B = positive_definite<float>(n, 0, 5);
    B(n / 2, n / 2) = 0.0F;
    EXPECT_FALSE(blas().cholesky_lower(n, B.values.data(), B.stride)) << n;
    for (const float bad : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
      for (const std::int64_t column : {std::int64_t{0}, n / 2}) {
        Matrix<float> C = positive_definite<float>(n, 0, 5);
        C(n / 2, column) = bad;
        EXPECT_FALSE(blas().cholesky_lower(n, C.values.data(), C.stride)) << n << ", " << bad;
        Matrix<double> D = positive_definite<double>(n, 0, 5);
        D(n / 2, column) = static_cast<double>(bad);
        EXPECT_FALSE(blas().cholesky_lower(n, D.values.data(), D.stride)) << n << ", " << bad;
      }
    }
  }
  std::vector<double> singular = {1, 0, 5, 0};
  EXPECT_FALSE(blas().invert_lower(2, singular.data(), 2));
  std::vector<float> singular_float = {1, 0, 5, 0};
  EXPECT_FALSE(blas().invert_lower(2, singular_float.data(), 2));
}

// The pool's workers call it side by side: a library that shares a buffer between calls would show.
TEST(Blas, ConcurrentCallsGiveTheSameBytes) {
  constexpr int kThreads = 8;
  constexpr int kRounds = 6;
  constexpr std::int64_t kSize = 190;
  const Matrix<float> A(kSize, kSize, 0, 1);
  const Matrix<float> B(kSize, kSize, 0, 2);
  const Matrix<double> S = positive_definite<double>(kSize, 0, 3);
  struct Results {
    std::vector<float> product;
    std::vector<float> gram;
    std::vector<double> inverse;
  };
  const auto work = [&] {
    Results r;
    r.product.resize(kSize * kSize);
    r.gram.resize(kSize * kSize);
    r.inverse = S.values;
    blas().gemm(
        false,
        true,
        kSize,
        kSize,
        kSize,
        1.0F,
        A.values.data(),
        kSize,
        B.values.data(),
        kSize,
        0.0F,
        r.product.data(),
        kSize);
    blas().syrk_upper(kSize, kSize, 1.0F, A.values.data(), kSize, 0.0F, r.gram.data(), kSize);
    if (!blas().cholesky_lower(kSize, r.inverse.data(), kSize) ||
        !blas().invert_lower(kSize, r.inverse.data(), kSize)) {
      r.inverse.clear();
    }
    return r;
  };
  const Results expected = work();
  ASSERT_FALSE(expected.inverse.empty());
  std::vector<int> differing(kThreads, 0);
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int round = 0; round < kRounds; ++round) {
        const Results r = work();
        if (r.product != expected.product || r.gram != expected.gram ||
            r.inverse != expected.inverse) {
          ++differing[static_cast<std::size_t>(t)];
        }
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  EXPECT_EQ(differing, std::vector<int>(kThreads, 0));
}

TEST(Blas, SaysWhichLibraryAndCoreItRuns) {
  const std::string text = blas().description();
  EXPECT_EQ(text.rfind("OpenBLAS ", 0), 0U) << text;
  EXPECT_NE(text.find(", core "), std::string::npos) << text;
}

}  // namespace
}  // namespace quern
