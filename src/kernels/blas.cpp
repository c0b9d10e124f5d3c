// SPDX-License-Identifier: Apache-2.0
#include "kernels/blas.h"

#include "base/error.h"

#include <dlfcn.h>

#include <array>
#include <cmath>
#include <cstdlib>

namespace quern {
namespace {

constexpr int kRowMajor = 101;
constexpr int kNoTrans = 111;
constexpr int kTrans = 112;
constexpr int kUpper = 121;

// The core type that this CPU deserves, or null to leave the library's own choice. OpenBLAS 0.3.21
// falls back to the oldest core for Intel models newer than itself, and takes the slower AVX-512
// kernels on AMD (docs/gemm.md).
const char* best_core_type(const CpuFeatures& cpu) {
  if (cpu.amd && cpu.avx2) {
    return "ZEN";
  }
  if (cpu.avx512) {
    return "SKYLAKEX";
  }
  return cpu.avx2 ? "HASWELL" : nullptr;
}

// OpenBLAS only stops at pivots that compare as not positive: NaN slips through to the factor's
// diagonal, from wherever in the matrix it was.
template <class T>
bool has_positive_diagonal(std::int64_t n, const T* L, std::int64_t ldl) {
  for (std::int64_t i = 0; i < n; ++i) {
    const T pivot = L[i * ldl + i];
    if (!(pivot > 0) || std::isinf(pivot)) {
      return false;
    }
  }
  return true;
}

// OpenBLAS built without threads hands one scratch buffer to two callers at once: its memory pool
// has no lock, and one product in a hundred came out wrong when two workers called it. The build
// with threads has the lock, and runs in the calling thread when OPENBLAS_NUM_THREADS is 1.
bool is_thread_safe(void* library) {
  using Parallel = int (*)();
  const auto parallel = reinterpret_cast<Parallel>(::dlsym(library, "openblas_get_parallel"));
  return parallel != nullptr && parallel() != 0;
}

}  // namespace

struct Blas::Functions {
  using Gemm = void (*)(
      int,
      int,
      int,
      int,
      int,
      int,
      float,
      const float*,
      int,
      const float*,
      int,
      float,
      float*,
      int);
  using GemmDouble = void (*)(
      int,
      int,
      int,
      int,
      int,
      int,
      double,
      const double*,
      int,
      const double*,
      int,
      double,
      double*,
      int);
  using Syrk = void (*)(int, int, int, int, int, float, const float*, int, float, float*, int);
  using Potrf = void (*)(const char*, const int*, double*, const int*, int*);
  using PotrfFloat = void (*)(const char*, const int*, float*, const int*, int*);
  using Trtri = void (*)(const char*, const char*, const int*, double*, const int*, int*);
  using TrtriFloat = void (*)(const char*, const char*, const int*, float*, const int*, int*);
  using Trsm =
      void (*)(int, int, int, int, int, int, int, double, const double*, int, double*, int);

  void* library = nullptr;
  Gemm sgemm = nullptr;
  GemmDouble dgemm = nullptr;
  Syrk ssyrk = nullptr;
  Potrf dpotrf = nullptr;
  PotrfFloat spotrf = nullptr;
  Trtri dtrtri = nullptr;
  TrtriFloat strtri = nullptr;
  Trsm dtrsm = nullptr;

  template <class Function>
  void load(Function& function, const char* name) {
    function = reinterpret_cast<Function>(::dlsym(library, name));
    if (function == nullptr) {
      throw Error(
          ErrorKind::kFailed,
          "the BLAS library lacks a function",
          name,
          "an OpenBLAS with LAPACK is expected",
          "apt-get install libopenblas0-pthread");
    }
  }
};

Blas::Blas(const CpuFeatures& cpu) : functions_(std::make_unique<Functions>()) {
  // Both are read by the library when it is loaded, once per process.
  const char* core = best_core_type(cpu);
  if (core != nullptr) {
    ::setenv("OPENBLAS_CORETYPE", core, 0);  // NOLINT(concurrency-mt-unsafe): before any thread
  }
  ::setenv("OPENBLAS_NUM_THREADS", "1", 1);  // NOLINT(concurrency-mt-unsafe)
  static constexpr std::array<const char*, 3> kNames = {
      "/usr/lib/x86_64-linux-gnu/openblas-pthread/libopenblas.so.0",
      "libopenblas.so.0",
      "libopenblas.so"};
  Functions& f = *functions_;
  bool found_serial = false;
  for (const char* name : kNames) {
    f.library = ::dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (f.library != nullptr && is_thread_safe(f.library)) {
      break;
    }
    found_serial = found_serial || f.library != nullptr;
    f.library = nullptr;
  }
  if (f.library == nullptr) {
    throw Error(
        ErrorKind::kFailed,
        "no usable BLAS library found",
        "libopenblas.so.0",
        found_serial ? "found OpenBLAS built without threads, which several threads must not call"
                     : "quern needs OpenBLAS for dense products",
        "apt-get install libopenblas0-pthread");
  }
  f.load(f.sgemm, "cblas_sgemm");
  f.load(f.dgemm, "cblas_dgemm");
  f.load(f.ssyrk, "cblas_ssyrk");
  f.load(f.dpotrf, "dpotrf_");
  f.load(f.spotrf, "spotrf_");
  f.load(f.dtrtri, "dtrtri_");
  f.load(f.strtri, "strtri_");
  f.load(f.dtrsm, "cblas_dtrsm");
}

// The library stays loaded: its memory pools do not survive being unloaded under other users.
Blas::~Blas() = default;

void Blas::gemm(
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
    std::int64_t ldc) const {
  functions_->sgemm(
      kRowMajor,
      transpose_a ? kTrans : kNoTrans,
      transpose_b ? kTrans : kNoTrans,
      static_cast<int>(m),
      static_cast<int>(n),
      static_cast<int>(k),
      alpha,
      A,
      static_cast<int>(lda),
      B,
      static_cast<int>(ldb),
      beta,
      C,
      static_cast<int>(ldc));
}

void Blas::gemm(
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
    std::int64_t ldc) const {
  functions_->dgemm(
      kRowMajor,
      transpose_a ? kTrans : kNoTrans,
      transpose_b ? kTrans : kNoTrans,
      static_cast<int>(m),
      static_cast<int>(n),
      static_cast<int>(k),
      alpha,
      A,
      static_cast<int>(lda),
      B,
      static_cast<int>(ldb),
      beta,
      C,
      static_cast<int>(ldc));
}

void Blas::syrk_upper(
    std::int64_t n,
    std::int64_t k,
    float alpha,
    const float* A,
    std::int64_t lda,
    float beta,
    float* C,
    std::int64_t ldc) const {
  functions_->ssyrk(
      kRowMajor,
      kUpper,
      kTrans,
      static_cast<int>(n),
      static_cast<int>(k),
      alpha,
      A,
      static_cast<int>(lda),
      beta,
      C,
      static_cast<int>(ldc));
}

// LAPACK is column-major: what it calls the upper triangle is the lower one of our rows.
bool Blas::cholesky_lower(std::int64_t n, double* A, std::int64_t lda) const {
  const int size = static_cast<int>(n);
  const int stride = static_cast<int>(lda);
  int info = 0;
  functions_->dpotrf("U", &size, A, &stride, &info);
  return info == 0 && has_positive_diagonal(n, A, lda);
}

bool Blas::cholesky_lower(std::int64_t n, float* A, std::int64_t lda) const {
  const int size = static_cast<int>(n);
  const int stride = static_cast<int>(lda);
  int info = 0;
  functions_->spotrf("U", &size, A, &stride, &info);
  return info == 0 && has_positive_diagonal(n, A, lda);
}

bool Blas::invert_lower(std::int64_t n, double* L, std::int64_t ldl) const {
  const int size = static_cast<int>(n);
  const int stride = static_cast<int>(ldl);
  int info = 0;
  functions_->dtrtri("U", "N", &size, L, &stride, &info);
  return info == 0;
}

bool Blas::invert_lower(std::int64_t n, float* L, std::int64_t ldl) const {
  const int size = static_cast<int>(n);
  const int stride = static_cast<int>(ldl);
  int info = 0;
  functions_->strtri("U", "N", &size, L, &stride, &info);
  return info == 0;
}

void Blas::solve_cholesky_lower(
    std::int64_t n,
    std::int64_t columns,
    const double* L,
    std::int64_t ldl,
    double* b,
    std::int64_t ldb) const {
  constexpr int kLeft = 141;
  constexpr int kLower = 122;
  constexpr int kNonUnit = 131;
  for (const int transpose : {kNoTrans, kTrans}) {
    functions_->dtrsm(
        kRowMajor,
        kLeft,
        kLower,
        transpose,
        kNonUnit,
        static_cast<int>(n),
        static_cast<int>(columns),
        1.0,
        L,
        static_cast<int>(ldl),
        b,
        static_cast<int>(ldb));
  }
}

std::string Blas::description() const {
  using Text = char* (*)();
  const auto config = reinterpret_cast<Text>(::dlsym(functions_->library, "openblas_get_config"));
  const auto core = reinterpret_cast<Text>(::dlsym(functions_->library, "openblas_get_corename"));
  std::string text = config != nullptr ? config() : "BLAS";
  // "OpenBLAS 0.3.21 NO_LAPACKE DYNAMIC_ARCH …": the first two words tell enough.
  const auto second = text.find(' ', text.find(' ') + 1);
  text = text.substr(0, second);
  return core != nullptr ? text + ", core " + core() : text;
}

}  // namespace quern
