#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Every method at every width it has, on every model given, beside other tools' figures.

Prints a Markdown table: bits per linear weight (true bytes, scales and zero points counted), bits
per weight of the whole file, perplexity, mean KL divergence from the original with its standard
error, top-1 agreement. Other tools' rows of the same bits and group come from
MODEL/golden/peers.json (same text, windows and calibration tokens).

    bench/quality.py models/tiny-qwen3 models/tiny-llama3 --quern build/release/quern \\
        --text wiki.test.raw --calibration calibration-128x512.safetensors

`--methods gptq best --bits 4` does a part; `--samples 32 --windows 4` shows in a quarter of an hour
that everything runs, and compares with nobody. Exits 1 when a claim fails: `gptq` has a lower KL than
every peer's GPTQ, `awq` than every AWQ, `smoothquant` than every SmoothQuant, `best` than every row,
at the same bits and group, and `gguf` (all linears Q4_K, Q3_K, Q2_K) than llama.cpp's larger mix of
that name with its importance matrix.
"""

import sys

from measuring import Bench, arguments_of, peers_of

GROUP = 128
WIDTHS = (2, 3, 4, 5, 6, 7, 8)

# name: options, widths, and which peers it claims to beat.
METHODS = {
    "rtn": (["--method", "rtn", "--symmetric"], WIDTHS, None),
    "gptq": (["--method", "gptq", "--symmetric"], WIDTHS, "gptq"),
    "gptaq": (["--method", "gptaq", "--symmetric"], WIDTHS, None),
    "awq": (["--method", "awq", "--asymmetric"], WIDTHS, "awq"),
    "smoothquant": (["--method", "smoothquant"], (4, 8), "smoothquant"),
    "billm": (["--method", "billm"], (1,), "billm"),
    "best": (["--recipe", "best", "--symmetric"], WIDTHS, ""),
    "best-asym": (["--recipe", "best", "--asymmetric"], (2, 3, 4), ""),
    "gguf": (["--recipe", "best"], (2, 3, 4), "llamacpp_"),
}


def options_of(name: str, bits: int) -> list[str]:
    options = [*METHODS[name][0], "--bits", str(bits)]
    if name == "smoothquant":
        return [*options, "--format", "compressed-tensors"]
    if name == "billm":
        return [*options, "--format", "quern"]
    if name == "gguf":
        return [*METHODS[name][0], "--format", f"gguf:Q{bits}_K"]
    options += ["--group-size", str(GROUP)]
    if bits in (5, 6, 7):
        return [*options, "--format", "compressed-tensors"]
    if name == "awq" and bits == 4:
        return [*options, "--format", "awq"]
    return [*options, "--format", "gptq_v2" if "--asymmetric" in options else "gptq"]


def rivals(name: str, bits: int, peers: list[dict], fewer: bool) -> list[dict]:
    """Peers of the same kind, bits and group."""
    kind = METHODS[name][2]
    if kind is None or fewer:
        return []
    if name == "gguf":  # llama.cpp's mix of that name, which is never smaller
        return [row for row in peers if row["id"] in (f"llamacpp_Q{bits}_K_M_im", f"llamacpp_Q{bits}_K_im")]
    group = None if name == "smoothquant" else GROUP
    return [row for row in peers
            if row["bits"] == bits and (group is None or row["group_size"] == group)
            and kind in f"{row['id']} {row['method']}".lower()]


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--bits", type=int, nargs="+", default=[1, *WIDTHS])
    arguments = parser.parse_args()
    bench = Bench(arguments)
    fewer = arguments.samples is not None or arguments.windows != 40  # than the peers had

    print("| model | setting | bits per linear weight | of the file | perplexity | mean KL | top-1 | CPU s | best peer | ratio |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |")
    beaten = True
    for model in arguments.models:
        peers = peers_of(model, arguments.peers)
        for name in arguments.methods:
            for bits in (bits for bits in METHODS[name][1] if bits in arguments.bits):
                found = bench.measure(model, options_of(name, bits))
                against = min(rivals(name, bits, peers, fewer), key=lambda row: row["kl_mean"], default=None)
                verdict = " | "
                if against is not None:
                    ratio = found["kl"] / against["kl_mean"]
                    beaten = beaten and ratio < 1
                    verdict = f"{against['id']} {against['kl_mean']:.5f} | {ratio:.3f}"
                print(f"| {model.name} | {name} {bits} | {found['bits']:.3f} | {found['model_bits']:.3f} | {found['ppl']:.3f} |"
                      f" {found['kl']:.5f} ± {found['kl_stderr']:.5f} | {100 * found['top1']:.2f} % |"
                      f" {found['cpu_seconds']:.0f} | {verdict} |", flush=True)
    sys.exit(0 if beaten else 1)


if __name__ == "__main__":
    main()
