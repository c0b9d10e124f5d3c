#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Quantize a checkpoint with GPTQModel on the CPU and print what it cost as one line of JSON.

Weights and activations are float32, the settings GPTQModel's defaults at the given width and group size. The
calibration file is a safetensors file with `input_ids` [n, length], the same that `quern quantize` takes.

    bench/peer_gptqmodel.py MODEL --calibration FILE.safetensors [-o OUT]

`seconds` and `cpu_seconds` (user and system time of this process and of its children) cover loading the model,
quantizing and writing the result; importing the packages is counted apart, as `import_seconds` and
`import_cpu_seconds`. GPTQModel compiles a packing extension the first time that it runs on a machine: that is
done before the clock starts (`warm_up_seconds`). `peak_rss_bytes` is the highest resident set of the process,
its packages included. Logs go to stderr.

Packages: as in scripts/check_independent_engine.py, optimum excepted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# On two cores GPTQModel's worker pool refuses to start without this.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def cpu_seconds() -> float:
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result of `work`, its wall seconds and its CPU seconds."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    result = work()
    return result, time.perf_counter() - wall, cpu_seconds() - cpu


def peak_rss_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1))


def import_packages() -> None:
    import gptqmodel  # noqa: F401


def warm_up() -> None:
    """Pack one small linear, which compiles GPTQModel's packing extension if it is not in its cache."""
    import torch
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    linear = torch.nn.Linear(128, 128, bias=False)
    packed = TorchLinear(bits=4, group_size=128, sym=True, desc_act=False, in_features=128, out_features=128)
    scales, zeros = torch.full((128, 1), 0.1), torch.full((128, 1), 8.0)
    packed.pack_block(linear, scales, zeros, torch.zeros(128, dtype=torch.int32))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a checkpoint directory")
    parser.add_argument("--calibration", type=Path, required=True, metavar="FILE", help="safetensors, input_ids")
    parser.add_argument("-o", "--out", type=Path, help="where to write; default: a temporary directory")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=1, help="sequences at once; default: GPTQModel's, 1")
    parser.add_argument("--threads", type=int, help="torch's threads; default: its own choice")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    result_stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # GPTQModel logs to stdout
    if arguments.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)

    _, import_wall, import_cpu = timed(import_packages)
    import torch
    import transformers
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.version import __version__ as version
    from safetensors.torch import load_file

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    _, warm_up_wall, _ = timed(warm_up)

    rows = load_file(arguments.calibration)["input_ids"].long()
    samples = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in rows]
    settings = {"bits": arguments.bits, "group_size": arguments.group_size, "sym": True}

    with tempfile.TemporaryDirectory() as scratch:
        out = (arguments.out or Path(scratch, "out")).resolve()
        source = str(arguments.model.resolve())
        os.chdir(scratch)  # GPTQModel leaves a folder of logs where it runs
        config = QuantizeConfig(**settings, offload_to_disk=False)
        model, load_wall, load_cpu = timed(
            lambda: GPTQModel.load(source, config, device="cpu", dtype=torch.float32)
        )
        _, quantize_wall, quantize_cpu = timed(lambda: model.quantize(samples, batch_size=arguments.batch_size))
        _, save_wall, save_cpu = timed(lambda: model.save(str(out)))

    peak = peak_rss_bytes()
    document = {
        "tool": "gptqmodel",
        "version": version,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "settings": {
            **settings,
            "dtype": "float32",
            "device": "cpu",
            "batch_size": arguments.batch_size,
            "threads": torch.get_num_threads(),
        },
        "calibration": {"samples": rows.shape[0], "tokens": rows.numel()},
        "seconds": load_wall + quantize_wall + save_wall,
        "cpu_seconds": load_cpu + quantize_cpu + save_cpu,
        "quantize_seconds": quantize_wall,
        "quantize_cpu_seconds": quantize_cpu,
        "import_seconds": import_wall,
        "import_cpu_seconds": import_cpu,
        "warm_up_seconds": warm_up_wall,
        "peak_rss_bytes": peak,
        "peak_rss_mib": round(peak / 2**20, 1),
    }
    print(json.dumps(document), file=result_stream, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
