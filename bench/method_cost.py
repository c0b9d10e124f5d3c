#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Time and memory of every method on one checkpoint.

    scripts/make_synthetic_checkpoint.py /tmp/q06 --shape qwen3-0.6b --ids-out ids.safetensors --length 512
    bench/method_cost.py --quern build/release/quern --calibration ids.safetensors --samples 16 /tmp/q06

Each method runs once, alone; CPU seconds of all threads count what the machine does for it and not
for others. Prints Markdown.
"""

import argparse
import pathlib
import tempfile

from measuring import run

METHODS = {
    "rtn, 4 bits": ["--method", "rtn"],
    "gptq, 4 bits (the default)": ["--method", "gptq"],
    "gptaq, 4 bits": ["--method", "gptaq"],
    "awq, 4 bits": ["--method", "awq", "--asymmetric", "--format", "awq"],
    "smoothquant, W8A8": ["--method", "smoothquant", "--format", "compressed-tensors"],
    "billm, 1 bit": ["--method", "billm", "--format", "quern"],
    "best, 4 bits": ["--recipe", "best"],
    "best, 2 bits": ["--recipe", "best", "--bits", "2"],
    "gasq at 4 bits per linear weight": ["--method", "gasq", "--linear-bpw", "4"],
    "gptq, GGUF Q4_K": ["--method", "gptq", "--format", "gguf:Q4_K"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--quern", default="build/release/quern")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--memory", help="as quern's --memory")
    parser.add_argument("--threads", help="as quern's --threads")
    parser.add_argument("--only", nargs="+", help="beginnings of names")
    parser.add_argument("--scratch", help="folder for the results (default: the system's)")
    arguments = parser.parse_args()
    common = ["--calibration", arguments.calibration, "--samples", str(arguments.samples), "--json", "--quiet"]
    for name in ("memory", "threads"):
        if getattr(arguments, name):
            common += [f"--{name}", getattr(arguments, name)]

    print("| method | seconds | CPU seconds | peak memory, MiB | without mapped files | bits per weight of the file | of it planning, s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, options in METHODS.items():
        if arguments.only and not any(name.startswith(word) for word in arguments.only):
            continue
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
            out = f"{folder}/out.gguf" if "gguf" in " ".join(options) else f"{folder}/out"
            made = run([arguments.quern, "quantize", str(arguments.model), "-o", out, *options, *common])
        planning = (made.get("planning") or {}).get("seconds")
        print(f"| {name} | {made['seconds']:.0f} | {made['cpu_seconds']:.0f} | {made['peak_rss_bytes'] / 2**20:.0f} |"
              f" {made['peak_anonymous_bytes'] / 2**20:.0f} | {made['bits_per_weight']:.3f} |"
              f" {'' if planning is None else f'{planning:.0f}'} |", flush=True)


if __name__ == "__main__":
    main()
