#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Quality of quern's GPTQ against its own plain RTN and against other quantizers.

Every model directory given is quantized at each width with quern's defaults and with plain RTN, and
both are compared with the original: mean KL divergence over the first windows of a text. Other
tools' figures on the same model, text and calibration tokens come from MODEL/golden/peers.json (or
--peers DIR, one NAME.json a model).

    bench/quality.py --quern build/release/quern --text wiki.test.raw \\
        --calibration calibration-128x512.safetensors models/tiny-qwen3 models/tiny-llama3

Prints a Markdown table; exits 1 when a peer's GPTQ at the same width and group is better.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile


def run(command: list[str]) -> dict:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout)


def peers_of(model: pathlib.Path, folder: pathlib.Path | None) -> list[dict]:
    path = folder / f"{model.name}.json" if folder else model / "golden" / "peers.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=pathlib.Path)
    parser.add_argument("--quern", default="build/release/quern")
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--peers", type=pathlib.Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"])
    arguments, extra = parser.parse_known_args()
    extra = [word for word in extra if word != "--"]

    print("| model | bits | tool | setting | bits per linear weight | mean KL | top-1 | CPU s |")
    print("| --- | ---: | --- | --- | ---: | ---: | ---: | ---: |")
    beaten = True
    for model in arguments.models:
        for bits in arguments.bits:
            best_peer = None
            for row in peers_of(model, arguments.peers):
                if row["bits"] == bits and row["group_size"] == arguments.group_size and "gptq" in row["method"].lower():
                    best_peer = min(best_peer or row["kl_mean"], row["kl_mean"])
                    print(f"| {model.name} | {bits} | {row['tool']} | {row['id']} | {row['bits_per_weight']:.3f} |"
                          f" {row['kl_mean']:.5f} | {100 * row['top1_agree']:.2f} % | {row['cpu_seconds']} |", flush=True)
            for method in arguments.methods:
                with tempfile.TemporaryDirectory() as folder:
                    out = f"{folder}/out"
                    made = run([arguments.quern, "quantize", str(model), "-o", out, "--method", method, "--bits", str(bits),
                                "--group-size", str(arguments.group_size), "--symmetric", "--format", "gptq",
                                "--calibration", arguments.calibration, "--json", "--quiet", *extra])
                    result = run([arguments.quern, "eval", out, "--reference", str(model), "--perplexity", arguments.text,
                                  "--windows", str(arguments.windows), "--json", "--quiet"])
                divergence = next(iter(result["divergence"].values()))
                weights = sum(row["shape"][0] * row["shape"][1] for row in made["linears"])
                stored = 8 * (made["bytes"] - sum(row["bytes"] for row in made["kept"])) / weights
                print(f"| {model.name} | {bits} | quern | {method} | {stored:.3f} | {divergence['kl_mean']:.5f} |"
                      f" {100 * divergence['top1_agreement']:.2f} % | {made['cpu_seconds']:.1f} |", flush=True)
                if method == "gptq" and best_peer is not None:
                    print(f"| | | | **ratio to the best peer's GPTQ** | | **{divergence['kl_mean'] / best_peer:.3f}** | | |", flush=True)
                    beaten = beaten and divergence["kl_mean"] < best_peer
    sys.exit(0 if beaten else 1)


if __name__ == "__main__":
    main()
