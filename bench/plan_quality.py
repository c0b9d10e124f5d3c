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

import argparse
import itertools
import json
import pathlib
import subprocess
import sys
import tempfile

MIXING_TOOLS = ("AutoRound", "llama.cpp")


def run(command: list[str]) -> dict:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout)


def linear_bits(made: dict) -> float:
    """Bits that the tensors of the quantized linears take per weight."""
    weights = sum(row["shape"][0] * row["shape"][1] for row in made["linears"])
    return 8 * (made["bytes"] - sum(row["bytes"] for row in made["kept"])) / weights


class Bench:
    def __init__(self, arguments, extra: list[str]):
        self.arguments = arguments
        self.extra = extra
        self.path = arguments.results
        self.known = json.loads(self.path.read_text()) if self.path and self.path.exists() else {}

    def measure(self, model: pathlib.Path, options: list[str]) -> dict:
        words = [*options, "--format", self.arguments.format, *self.extra]
        key = " ".join([model.name, *words, str(self.arguments.windows)])
        if key not in self.known:
            with tempfile.TemporaryDirectory() as folder:
                out = f"{folder}/out"
                made = run([self.arguments.quern, "quantize", str(model), "-o", out, *words,
                            "--calibration", self.arguments.calibration, "--json", "--quiet"])
                judged = run([self.arguments.quern, "eval", out, "--reference", str(model), "--perplexity",
                              self.arguments.text, "--windows", str(self.arguments.windows), "--json", "--quiet"])
            divergence = next(iter(judged["divergence"].values()))
            self.known[key] = {
                "bits": linear_bits(made), "kl": divergence["kl_mean"], "top1": divergence["top1_agreement"],
                "cpu_seconds": made["cpu_seconds"], "exact": made["predicted"]["bytes"] == made["bytes"],
                "predicted": made["predicted"]["kl"], "planning": made.get("planning")}
            if self.path:
                self.path.write_text(json.dumps(self.known, indent=1))
        return self.known[key]

    def uniform_size(self, model: pathlib.Path, options: list[str]) -> float | None:
        """Bits per linear weight of a uniform setting, from headers alone; None if the format lacks it."""
        command = [self.arguments.quern, "plan", str(model), *options, "--format", self.arguments.format,
                   "--calibration", self.arguments.calibration, "--json", "--quiet"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        if done.returncode != 0:
            return None
        plan = json.loads(done.stdout)
        keep = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        weights = sum(row["shape"][0] * row["shape"][1] for row in plan["linears"])
        return 8 * (plan["predicted"]["bytes"] - (keep - 2 * weights)) / weights

    def uniform_settings(self, model: pathlib.Path, budget: float) -> list[list[str]]:
        """The settings worth trying: of each symmetry the largest that fit, at the two largest widths."""
        chosen = []
        for symmetry in ("--asymmetric", "--symmetric"):
            fitting = []
            for bits, group in itertools.product((2, 3, 4, 5, 6, 8), (32, 64, 128)):
                options = ["--bits", str(bits), "--group-size", str(group), symmetry]
                size = self.uniform_size(model, options)
                if size is not None and size <= budget:
                    fitting.append((bits, size, options))
            for bits in sorted({entry[0] for entry in fitting}, reverse=True)[:2]:
                chosen.append(max((entry for entry in fitting if entry[0] == bits), key=lambda e: e[1])[2])
        return chosen


def peers_of(model: pathlib.Path, folder: pathlib.Path | None) -> list[dict]:
    path = folder / f"{model.name}.json" if folder else model / "golden" / "peers.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row for row in rows if row["tool"] in MIXING_TOOLS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=pathlib.Path)
    parser.add_argument("--quern", default="build/release/quern")
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--peers", type=pathlib.Path)
    parser.add_argument("--format", default="gptq")
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--budgets", type=float, nargs="+", default=[2.5, 3.0, 3.5, 4.0, 4.5])
    parser.add_argument("--recipe", nargs="+", default=["--method", "best"],
                        help="options of the uniform settings; `--method gasq` brings the same")
    parser.add_argument("--results", type=pathlib.Path)
    arguments, extra = parser.parse_known_args()
    bench = Bench(arguments, [word for word in extra if word != "--"])

    print("| model | bits per linear weight | what | mean KL | top-1 | CPU s |")
    print("| --- | ---: | --- | ---: | ---: | ---: |")
    best_everywhere = True
    for model in arguments.models:
        before = float("inf")
        for budget in arguments.budgets:
            found = bench.measure(model, ["--method", "gasq", "--linear-bpw", str(budget)])
            print(f"| {model.name} | {found['bits']:.3f} | **GASQ at {budget}** | **{found['kl']:.5f}** |"
                  f" {100 * found['top1']:.2f} % | {found['cpu_seconds']:.0f} |", flush=True)
            rivals = []
            for options in bench.uniform_settings(model, budget):
                rival = bench.measure(model, [*options, *arguments.recipe])
                rivals.append((rival["kl"], rival["bits"], " ".join(options), rival))
            if rivals:
                kl, bits, name, rival = min(rivals, key=lambda each: each[0])
                print(f"| | {bits:.3f} | best uniform: {name} | {kl:.5f} | {100 * rival['top1']:.2f} % |"
                      f" {rival['cpu_seconds']:.0f} |", flush=True)
                best_everywhere = best_everywhere and found["kl"] < kl
            smaller = [row for row in peers_of(model, arguments.peers) if row["bits_per_weight"] <= budget]
            for row in sorted(smaller, key=lambda row: row["kl_mean"])[:1]:
                print(f"| | {row['bits_per_weight']:.3f} | {row['tool']}: {row['id']} | {row['kl_mean']:.5f} |"
                      f" {100 * row['top1_agree']:.2f} % | |", flush=True)
                best_everywhere = best_everywhere and found["kl"] < row["kl_mean"]
            best_everywhere = best_everywhere and found["kl"] < before and found["exact"]
            before = found["kl"]
    sys.exit(0 if best_everywhere else 1)


if __name__ == "__main__":
    main()
