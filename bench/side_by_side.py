#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Quantize one checkpoint with quern and with GPTQModel, one after the other, and print a Markdown table.

Both get the same calibration tokens, 4 bits in groups of 128, symmetric, and the same number of threads. Each
runs alone; on a shared machine compare the CPU seconds, which contention changes little.

    bench/side_by_side.py --quern build/release/quern --python VENV/bin/python MODEL --calibration FILE.safetensors

`--python` is the interpreter of the environment that holds GPTQModel (see bench/peer_gptqmodel.py). Options for
`quern quantize` go after `--`: `... -- --order natural`. Needs the standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PEER = Path(__file__).with_name("peer_gptqmodel.py")
BITS, GROUP_SIZE = 4, 128


def run(command: list[str]) -> dict[str, Any]:
    """Run a command whose stdout is one JSON document."""
    print("+ " + " ".join(command), file=sys.stderr)
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    except OSError as problem:
        raise SystemExit(f"error: {command[0]}\nreason: {problem}\ntry: --help") from problem
    if done.returncode != 0:
        raise SystemExit(f"error: {command[0]} failed\nreason: exit code {done.returncode}\ntry: see its message above")
    return json.loads(done.stdout)


def run_quern(arguments: argparse.Namespace, out: Path) -> dict[str, Any]:
    return run(
        [
            *(str(arguments.quern), "quantize", str(arguments.model), "-o", str(out)),
            *("--bits", str(BITS), "--group-size", str(GROUP_SIZE), "--symmetric", "--method", "gptq"),
            *("--calibration", str(arguments.calibration), "--json", "--threads", str(arguments.threads)),
            *arguments.quern_options,
        ]
    )


def run_peer(arguments: argparse.Namespace, out: Path) -> dict[str, Any]:
    return run(
        [
            *(arguments.python, str(PEER), str(arguments.model), "-o", str(out)),
            *("--bits", str(BITS), "--group-size", str(GROUP_SIZE), "--calibration", str(arguments.calibration)),
            *("--threads", str(arguments.threads), "--batch-size", str(arguments.batch_size)),
        ]
    )


def weight_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def table(columns: dict[str, dict[str, float]]) -> str:
    """Two named columns of measurements and the second over the first."""
    (ours, theirs) = columns
    lines = [f"| | {ours} | {theirs} | ratio |", "| --- | ---: | ---: | ---: |"]
    for row, value in columns[ours].items():
        other = columns[theirs][row]
        lines.append(f"| {row} | {value:.1f} | {other:.1f} | {other / value:.2f} |")
    return "\n".join(lines)


def measurements(document: dict[str, Any], size: int) -> dict[str, float]:
    return {
        "seconds": document["seconds"],
        "CPU seconds": document["cpu_seconds"],
        "peak memory, MiB": document["peak_rss_bytes"] / 2**20,
        "weight files, MiB": size / 2**20,
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a checkpoint directory")
    parser.add_argument("--calibration", type=Path, required=True, metavar="FILE", help="safetensors, input_ids")
    parser.add_argument("--quern", type=Path, required=True, help="the quern binary")
    parser.add_argument("--python", default=sys.executable, help="interpreter with GPTQModel; default: this one")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all, %(default)s")
    parser.add_argument("--batch-size", type=int, default=1, help="GPTQModel's sequences at once; default: its own, 1")
    own, quern_options = sys.argv[1:], []
    if "--" in own:
        split = own.index("--")
        own, quern_options = own[:split], own[split + 1 :]
    return parser.parse_args(own, argparse.Namespace(quern_options=quern_options))


def main() -> int:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as scratch:
        quern_out, peer_out = Path(scratch, "quern"), Path(scratch, "peer")
        quern = run_quern(arguments, quern_out)
        peer = run_peer(arguments, peer_out)
        columns = {
            "quern": measurements(quern, weight_bytes(quern_out)),
            f"GPTQModel {peer['version']}": measurements(peer, weight_bytes(peer_out)),
        }
    calibration = peer["calibration"]
    print(
        f"{arguments.model.resolve().name}, {BITS} bit, groups of {GROUP_SIZE}, symmetric, "
        f"{calibration['samples']} sequences ({calibration['tokens']} tokens), {arguments.threads} threads; "
        f"load {os.getloadavg()[0]:.1f} at the end. GPTQModel: float32, without its imports "
        f"({peer['import_seconds']:.1f} s, {peer['import_cpu_seconds']:.1f} CPU s).\n"
    )
    print(table(columns))
    return 0


if __name__ == "__main__":
    sys.exit(main())
