#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Fails when an object built for a wide instruction set defines or names a weak symbol. The linker
# keeps one copy of a weak function for the whole program: it may be the one that older CPUs cannot
# run.
set -eu

if [ "$#" -ne 1 ] || [ ! -d "$1" ]; then
  echo "usage: $0 BUILD_DIRECTORY (for example build/dev)" >&2
  exit 2
fi

objects=$(find "$1" -path '*src/kernels/avx*' -name '*.o' | sort)
# An empty list would pass for the wrong reason.
for level in avx2 avx512; do
  if ! echo "$objects" | grep -q "/kernels/$level/"; then
    echo "$0: no object of kernels/$level under $1; build first" >&2
    exit 2
  fi
done

failed=0
for object in $objects; do
  leaks=$(nm --demangle "$object" | grep -E '^[0-9a-f ]{16} [WwVvu] ' || true)
  if [ -n "$leaks" ]; then
    echo "$object has weak symbols:" >&2
    echo "$leaks" >&2
    failed=1
  else
    echo "$object: no weak symbol"
  fi
done
exit "$failed"
