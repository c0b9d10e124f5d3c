#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs the Debian packages that building and running quern need, and only those that are missing.
# Usage: scripts/install_dependencies.sh [tests]
set -euo pipefail

packages=(
  g++ cmake ninja-build pkg-config git ca-certificates
  nlohmann-json3-dev libfmt-dev libspdlog-dev libcli11-dev
  libpcre2-dev libutf8proc-dev libssl-dev zlib1g-dev libzstd-dev
  libpng-dev libjpeg-dev libwebp-dev
  libopenblas0-pthread
)
if [ "${1:-}" = tests ]; then
  packages+=(libgtest-dev python3 binutils)
fi

missing=()
for package in "${packages[@]}"; do
  if ! dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'install ok installed'; then
    missing+=("$package")
  fi
done
if [ "${#missing[@]}" -eq 0 ]; then
  exit 0
fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  if ! command -v sudo >/dev/null; then
    echo "error: packages are missing and this is neither root nor has it sudo" >&2
    echo "reason: missing: ${missing[*]}" >&2
    echo "try: apt-get install ${missing[*]}   (as root)" >&2
    exit 1
  fi
  as_root=(sudo)
fi
echo "installing: ${missing[*]}" >&2
log=$(mktemp)
if ! { "${as_root[@]}" apt-get update &&
       "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
  tail -20 "$log" >&2
  exit 1
fi
rm -f "$log"
