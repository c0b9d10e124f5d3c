#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Whether llama.cpp computes with a GGUF file of quern what quern computes with it.

    pip install llama-cpp-python numpy
    scripts/check_llamacpp.py --quern build/release/quern --text wiki.test.raw model.gguf

Perplexity by llama.cpp's protocol (windows of 512, the second half counts) through llama-cpp-python
and by `quern eval`, and their relative difference, which must be below --tolerance: llama.cpp rounds
activations to 8 bits before its integer products.
"""

import argparse
import json
import math
import pathlib
import subprocess
import sys

import llama_cpp
import numpy


def mean_loss(path: pathlib.Path, text: bytes, windows: int, context: int) -> tuple[float, int]:
    model = llama_cpp.Llama(model_path=str(path), n_ctx=context, n_batch=context, logits_all=True, verbose=False)
    ids = model.tokenize(text, add_bos=False, special=True)
    count = len(ids) // context
    count = min(count, windows) if windows else count
    # llama.cpp's tool puts the BOS token at the beginning of every window where the model wants one.
    wants_bos = model._model.add_bos_token()
    total, tokens = 0.0, 0
    for window in range(count):
        chunk = ids[window * context:(window + 1) * context]
        fed = [model.token_bos(), *chunk[1:]] if wants_bos else chunk
        model.reset()
        model.eval(fed)
        first = context // 2
        logits = numpy.asarray(model.scores[first:context - 1], dtype=numpy.float64)
        logits -= logits.max(axis=1, keepdims=True)
        log_sum = numpy.log(numpy.exp(logits).sum(axis=1))
        targets = numpy.asarray(chunk[first + 1:context])
        total += float((log_sum - logits[numpy.arange(len(targets)), targets]).sum())
        tokens += len(targets)
    return total / tokens, count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=pathlib.Path)
    parser.add_argument("--quern", default="build/release/quern")
    parser.add_argument("--text", required=True, type=pathlib.Path)
    parser.add_argument("--windows", type=int, default=0, help="0: all")
    parser.add_argument("--tolerance", type=float, default=0.005)
    arguments = parser.parse_args()
    good = True
    for path in arguments.files:
        loss, windows = mean_loss(path, arguments.text.read_bytes(), arguments.windows, 512)
        command = [arguments.quern, "eval", str(path), "--perplexity", str(arguments.text), "--windows", str(windows),
                   "--context", "512", "--protocol", "llama.cpp", "--json", "--quiet"]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        ours = next(iter(json.loads(done.stdout)["perplexity"].values()))
        difference = ours["ppl"] / math.exp(loss) - 1
        good = good and abs(difference) < arguments.tolerance
        print(f"{path.name}: llama.cpp {math.exp(loss):.5f}, quern {ours['ppl']:.5f}, {100 * difference:+.3f} %,"
              f" {windows} windows", flush=True)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
