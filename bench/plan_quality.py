#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Whether planned precision (GASQ) earns its place: mean KL at equal size.

At each budget of bits per linear weight (scales and zero points counted) the model is quantized by
`--method gasq --linear-bpw`, and by the same recipe with every linear alike, at the settings (bits x
group x symmetry) that fit the budget; the best of those is what GASQ has to beat. Mixes of other
tools come from MODEL/golden/peers.json.

    bench/plan_quality.py --quern build/release/quern --text wiki.test.raw \\
        --calibration calibration-128x512.safetensors models/tiny-qwen3

Results are kept in --results, so that a run that was cut short goes on. Prints Markdown; exits 1
when GASQ is not the best somewhere.
"""

import itertools
import json
import pathlib
import subprocess
import sys

from measuring import Bench, arguments_of, peers_of

MIXING_TOOLS = ("AutoRound", "llama.cpp")


def uniform_size(arguments, model: pathlib.Path, options: list[str]) -> float | None:
    """Bits per linear weight of a uniform setting, from headers alone; None if the format lacks it."""
    command = [arguments.quern, "plan", str(model), *options, "--format", arguments.format,
               "--calibration", arguments.calibration, "--json", "--quiet"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    if done.returncode != 0:
        return None
    plan = json.loads(done.stdout)
    keep = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    weights = sum(row["shape"][0] * row["shape"][1] for row in plan["linears"] if row["method"] != "keep")
    return 8 * (plan["predicted"]["bytes"] - (keep - 2 * weights)) / weights


def uniform_settings(arguments, model: pathlib.Path, budget: float) -> list[list[str]]:
    """The settings worth trying: of each symmetry the largest that fit, at the two largest widths."""
    chosen = []
    for symmetry in ("--asymmetric", "--symmetric"):
        fitting = []
        for bits, group in itertools.product((2, 3, 4, 5, 6, 8), (32, 64, 128)):
            options = ["--bits", str(bits), "--group-size", str(group), symmetry]
            size = uniform_size(arguments, model, options)
            if size is not None and size <= budget:
                fitting.append((bits, size, options))
        for bits in sorted({entry[0] for entry in fitting}, reverse=True)[:2]:
            chosen.append(max((entry for entry in fitting if entry[0] == bits), key=lambda e: e[1])[2])
    return chosen


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--format", default="gptq_v2")
    parser.add_argument("--budgets", type=float, nargs="+", default=[2.5, 3.0, 3.5, 4.0, 4.5])
    arguments = parser.parse_args()
    bench = Bench(arguments)
    form = ["--format", arguments.format]

    print("| model | bits per linear weight | what | mean KL | top-1 | CPU s |")
    print("| --- | ---: | --- | ---: | ---: | ---: |")
    best_everywhere = True
    for model in arguments.models:
        before = float("inf")
        for budget in arguments.budgets:
            found = bench.measure(model, ["--method", "gasq", "--linear-bpw", str(budget), *form])
            print(f"| {model.name} | {found['bits']:.3f} | **GASQ at {budget}** | **{found['kl']:.5f}** |"
                  f" {100 * found['top1']:.2f} % | {found['cpu_seconds']:.0f} |", flush=True)
            rivals = []
            for options in uniform_settings(arguments, model, budget):
                rival = bench.measure(model, ["--recipe", "best", *options, *form])
                rivals.append((rival["kl"], rival["bits"], " ".join(options), rival))
            if rivals:
                kl, bits, name, rival = min(rivals, key=lambda each: each[0])
                print(f"| | {bits:.3f} | best uniform: {name} | {kl:.5f} | {100 * rival['top1']:.2f} % |"
                      f" {rival['cpu_seconds']:.0f} |", flush=True)
                best_everywhere = best_everywhere and found["kl"] < kl
            smaller = [row for row in peers_of(model, arguments.peers)
                       if row["tool"] in MIXING_TOOLS and row["bits_per_weight"] <= budget]
            for row in sorted(smaller, key=lambda row: row["kl_mean"])[:1]:
                print(f"| | {row['bits_per_weight']:.3f} | {row['tool']}: {row['id']} | {row['kl_mean']:.5f} |"
                      f" {100 * row['top1_agree']:.2f} % | |", flush=True)
                best_everywhere = best_everywhere and found["kl"] < row["kl_mean"]
            best_everywhere = best_everywhere and found["kl"] < before and found["exact"]
            before = found["kl"]
    sys.exit(0 if best_everywhere else 1)


if __name__ == "__main__":
    main()
