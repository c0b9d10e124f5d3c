#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs what is missing, builds, and runs every test that needs no accelerator.
# Usage: ./test.sh [PRESET]     dev (default), assert, asan or tsan
set -euo pipefail
cd "$(dirname "$0")"

preset=${1:-dev}
scripts/install_dependencies.sh tests
cmake --preset "$preset" >/dev/null
cmake --build --preset "$preset"
if [ "$preset" = tsan ]; then
  # The pool and a small end-to-end job; the rest has no threads of its own.
  ctest --preset tsan -R 'ThreadPool|Blas|Calib|Gptq|Model' -j "$(nproc)"
else
  ctest --preset "$preset" -j "$(nproc)"
fi
