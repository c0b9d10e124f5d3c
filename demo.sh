#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The main job from nothing: install what is missing, build, quantize a model to 4 bit, evaluate the
# original and the result with the same engine, write the HTML report, print one table.
# Usage: ./demo.sh [--model DIR_OR_ID] [--text FILE] [--windows N] [--out DIR]
set -euo pipefail
cd "$(dirname "$0")"

model=testdata/models/tiny-qwen3
text=testdata/text/wiki.test.raw
out=demo-out
windows=()
while [ $# -gt 0 ]; do
  case "$1" in
    --model) model=$2; shift 2 ;;
    --text) text=$2; shift 2 ;;
    --windows) windows=(--windows "$2"); shift 2 ;;
    --out) out=$2; shift 2 ;;
    --help|-h) sed -n '3,6p' "$0" | cut -c3-; exit 0 ;;
    *) echo "error: unknown option, $1" >&2
       echo "reason: --model, --text, --windows and --out are known" >&2
       echo "try: ./demo.sh --help" >&2
       exit 2 ;;
  esac
done

scripts/install_dependencies.sh
cmake --preset release >/dev/null
cmake --build --preset release
quern=build/release/quern
mkdir -p "$out"

"$quern" quantize "$model" -o "$out/model-4bit" --recipe best --bits 4 --force
"$quern" eval "$model" --perplexity "$text" "${windows[@]}" --json >"$out/original.json"
"$quern" eval "$out/model-4bit" --reference "$model" --perplexity "$text" "${windows[@]}" --json >"$out/result.json"
"$quern" verify "$out/model-4bit" --against "$model"
echo
"$quern" report "$out/model-4bit" --original-eval "$out/original.json" --result-eval "$out/result.json" -o "$out/report.html"
echo
echo "checkpoint: $out/model-4bit   report: $out/report.html"
echo "next: $quern generate $out/model-4bit --prompt 'The history of'"
