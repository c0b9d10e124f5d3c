// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/cpu.h"

#include <cstdint>
#include <memory>
#include <string>

namespace quern {

// Dense products and factorisations, single-threaded, row-major; called from the pool's workers.
// One implementation today: OpenBLAS, loaded at run time so that its core type can be set for CPUs
// that its own detection mistakes for old ones (a factor of five; docs/gemm.md has the figures).
class Blas {
 public:
  // Throws Error(kFailed) with the package to install when the library cannot be loaded.
  explicit Blas(const CpuFeatures& cpu);
  Blas(const Blas&) = delete;
  Blas& operator=(const Blas&) = delete;
  ~Blas();

  // C[m,n] (row stride ldc) = alpha * op(A) * op(B) + beta * C. op transposes when the flag is set:
  // A is [m,k] or, transposed, [k,m]; B is [k,n] or, transposed, [n,k].
  void gemm(
      bool transpose_a,
      bool transpose_b,
      std::int64_t m,
      std::int64_t n,
      std::int64_t k,
      float alpha,
      const float* A,
      std::int64_t lda,
      const float* B,
      std::int64_t ldb,
      float beta,
      float* C,
      std::int64_t ldc) const;
  void gemm(
      bool transpose_a,
      bool transpose_b,
      std::int64_t m,
      std::int64_t n,
      std::int64_t k,
      double alpha,
      const double* A,
      std::int64_t lda,
      const double* B,
      std::int64_t ldb,
      double beta,
      double* C,
      std::int64_t ldc) const;

  // Upper triangle of C[n,n] = alpha * A^T A + beta * C with A [k,n]; the lower one is untouched.
  void syrk_upper(
      std::int64_t n,
      std::int64_t k,
      float alpha,
      const float* A,
      std::int64_t lda,
      float beta,
      float* C,
      std::int64_t ldc) const;

  // In place: the lower triangle of a symmetric A[n,n] (row-major) becomes L with A = L L^T.
  // Returns false when a pivot is not positive or not finite; A is then unspecified. The upper
  // triangle is kept.
  [[nodiscard]] bool cholesky_lower(std::int64_t n, double* A, std::int64_t lda) const;
  [[nodiscard]] bool cholesky_lower(std::int64_t n, float* A, std::int64_t lda) const;
  // In place: the lower triangular L[n,n] becomes its inverse. False when a diagonal entry is 0.
  [[nodiscard]] bool invert_lower(std::int64_t n, double* L, std::int64_t ldl) const;
  [[nodiscard]] bool invert_lower(std::int64_t n, float* L, std::int64_t ldl) const;
  // Solves A x = b for `columns` right-hand sides, A = L L^T from cholesky_lower; x replaces
  // b[n, columns] (row-major, row stride ldb).
  void solve_cholesky_lower(
      std::int64_t n,
      std::int64_t columns,
      const double* L,
      std::int64_t ldl,
      double* b,
      std::int64_t ldb) const;

  [[nodiscard]] std::string description() const;  // "OpenBLAS 0.3.21, core Zen"

 private:
  struct Functions;
  std::unique_ptr<Functions> functions_;
};

}  // namespace quern
