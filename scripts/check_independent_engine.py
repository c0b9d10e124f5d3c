#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compare the logits of `quern logits` with those of an engine that shares no code with quern.

The other engine is transformers with GPTQModel's torch kernel, on the CPU with float32 activations. Given a
GPTQ checkpoint written by quern it runs twice:

    as it is    the model as anybody would load it. GPTQModel keeps scales as float16 and therefore rounds every
                dequantized weight s*(q-z) to float16, so this can only agree up to that rounding.
    float32     the same quantized modules, their scales widened to float32 (exact), their weights decoded by
                GPTQModel's own dequantize_weight() and put into dense float32 linears. What is left is the order
                of sums.

For each it prints the largest absolute difference, the largest logit, their ratio and a tolerance with its
derivation. Exit code: 0 both agree, 1 a ratio exceeds its tolerance, 2 a side could not be run.

    scripts/check_independent_engine.py --quern build/release/quern --checkpoint DIR [--ids FILE.json]

transformers (through optimum) ignores the per-module rules of `dynamic`; a checkpoint that has them is loaded
by GPTQModel instead, which widens the scales itself, so that "as it is" is then float32 as well.

Packages (Python 3.11, CPU): torch==2.13.0 transformers==5.23.* safetensors accelerate; optimum==2.3.0 with --no-deps;
`setuptools>=84.2.1` and wheel, then gptqmodel==7.7.0 with --no-build-isolation --no-deps, then Defuser Device-SMI
LogBar PyPcre TokeNicer datasets threadpoolctl pillow requests.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # run the kernel as written, without a compiler
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file

DEFAULT_LENGTHS = (32, 77, 128, 200)
FLOAT16_UNIT_ROUNDOFF = 2.0**-11
FLOAT32_UNIT_ROUNDOFF = 2.0**-24
FLOAT32_FLOOR = 1e-4


def fail(what: str, reason: str, attempt: str) -> SystemExit:
    print(f"error: {what}\nreason: {reason}\ntry: {attempt}", file=sys.stderr)
    return SystemExit(2)


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """GPTQModel logs to stdout: keep that apart from this script's result."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


def default_ids(vocab: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(vocab) for _ in range(length)] for length in DEFAULT_LENGTHS]


def load_peer(checkpoint: Path, quantization: dict[str, Any]) -> torch.nn.Module:
    """The checkpoint in transformers with GPTQModel's torch kernel; all other tensors widened to float32."""
    if quantization.get("dynamic"):
        from gptqmodel import BACKEND, GPTQModel
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear

        # The kernel computes in the dtype of its input; only the loader's list leaves float32 out.
        TorchLinear.SUPPORTS_DTYPES = [*TorchLinear.SUPPORTS_DTYPES, torch.float32]
        peer = GPTQModel.load(
            str(checkpoint),
            device="cpu",
            dtype=torch.float32,
            backend=BACKEND.GPTQ_TORCH,
            attn_implementation="eager",
        )
        return peer.model

    from transformers import AutoModelForCausalLM, GPTQConfig

    return AutoModelForCausalLM.from_pretrained(
        checkpoint,
        dtype=torch.float32,
        device_map="cpu",
        attn_implementation="eager",
        quantization_config=GPTQConfig(bits=quantization["bits"], backend="gptq_torch"),
    )


def quantized_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    return {name: module for name, module in model.named_modules() if isinstance(module, TorchLinear)}


@torch.no_grad()
def make_dense(model: torch.nn.Module) -> None:
    """Replace every quantized module by a float32 linear holding the values that its codes stand for."""
    for name, module in quantized_modules(model).items():
        module.scales = module.scales.float()
        weight = module.dequantize_weight()
        if weight.dtype != torch.float32:
            raise fail(name, f"dequantize_weight() gave {weight.dtype}, not float32", "GPTQModel 7.7.0")
        dense = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        dense.weight = torch.nn.Parameter(weight.T.contiguous())
        if module.bias is not None:
            dense.bias = torch.nn.Parameter(module.bias.float())
        model.set_submodule(name, dense)


@torch.no_grad()
def peer_logits(model: torch.nn.Module, ids: list[list[int]]) -> list[torch.Tensor]:
    return [model(torch.tensor([row])).logits[0].float() for row in ids]


def quern_logits(quern: Path, checkpoint: Path, ids: list[list[int]], threads: int | None) -> list[torch.Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        ids_file, out_file = Path(folder, "ids.json"), Path(folder, "out.safetensors")
        ids_file.write_text(json.dumps(ids))
        command = [str(quern), "logits", str(checkpoint), "--ids", str(ids_file), "-o", str(out_file)]
        if threads is not None:
            command += ["--threads", str(threads)]
        try:
            code = subprocess.run(command, stdout=sys.stderr).returncode
        except OSError as problem:
            raise fail(str(quern), str(problem), "--quern build/release/quern") from problem
        if code != 0 or not out_file.is_file():
            raise fail(" ".join(command), f"exit code {code}", "read its message above")
        tensors = load_file(out_file)
    return [tensors[f"logits.{i}"] for i in range(len(ids))]


def largest_difference(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(left, right, strict=True))


def report(title: str, difference: float, largest: float, tolerance: float, why: str) -> bool:
    ratio = difference / largest
    passed = ratio <= tolerance  # false also when the ratio is NaN
    print(f"{title}: {'agrees' if passed else 'DIFFERS'}")
    print(f"  largest difference {difference:.3e}, largest logit {largest:.3f}, ratio {ratio:.3e}")
    print(f"  tolerance {tolerance:.3e}: {why}")
    return passed


def float16_tolerance(linears: int) -> tuple[float, str]:
    tolerance = FLOAT16_UNIT_ROUNDOFF * math.sqrt(linears)
    return tolerance, (
        f"2^-11 * sqrt({linears}). Rounding a weight to float16 moves it by at most 2^-11 of itself, in a random\n"
        "    direction, so the output of one linear moves by at most about 2^-11 of its norm, and the errors of the\n"
        f"    {linears} quantized linears add in quadrature."
    )


def float32_tolerance(linears: int, longest_sum: int) -> tuple[float, str]:
    estimate = FLOAT32_UNIT_ROUNDOFF * math.sqrt(longest_sum * linears)
    return max(FLOAT32_FLOOR, 4 * estimate), (
        f"the larger of {FLOAT32_FLOOR:g} and 4 * 2^-24 * sqrt({longest_sum} * {linears}) = {4 * estimate:.1e}.\n"
        f"    Both sides hold the same float32 weights; a sum of at most {longest_sum} products, in another\n"
        f"    order, moves by about 2^-24 * sqrt({longest_sum}), and {linears} linears add in quadrature."
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quern", type=Path, required=True, help="the quern binary")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="a GPTQ checkpoint")
    parser.add_argument("--ids", type=Path, metavar="FILE.json", help="lists of token ids; default: random ids")
    parser.add_argument("--threads", type=int, help="threads of either side; default: their own choice")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    try:
        config = json.loads((arguments.checkpoint / "config.json").read_text())
        quantization = config["quantization_config"]
        ids = json.loads(arguments.ids.read_text()) if arguments.ids else default_ids(config["vocab_size"])
    except (OSError, ValueError, KeyError) as problem:
        raise fail(
            "cannot read the checkpoint or the ids", repr(problem), "a directory with a GPTQ checkpoint"
        ) from problem

    ours = quern_logits(arguments.quern, arguments.checkpoint, ids, arguments.threads)
    with stdout_to_stderr():
        model = load_peer(arguments.checkpoint, quantization)
        modules = quantized_modules(model)
        if not modules:
            raise fail(str(arguments.checkpoint), "the peer found no quantized linear", "a GPTQ checkpoint")
        scale_dtype = next(iter(modules.values())).scales.dtype
        longest_sum = max(module.in_features for module in modules.values())
        as_it_is = peer_logits(model, ids)
        make_dense(model)
        exact = peer_logits(model, ids)

    for i, (mine, theirs) in enumerate(zip(ours, exact, strict=True)):
        if mine.dtype != torch.float32 or mine.shape != theirs.shape:
            raise fail(
                f"logits.{i} of quern",
                f"{mine.dtype} {list(mine.shape)}, not float32 {list(theirs.shape)}",
                "see the contract of `quern logits`",
            )

    largest = max(tensor.abs().max().item() for tensor in exact)
    rounding = largest_difference(as_it_is, exact)
    print(f"{len(modules)} quantized linears, {sum(map(len, ids))} positions, scales held as {scale_dtype} by the peer")
    print(f"the peer against itself, as it is and float32: ratio {rounding / largest:.3e}\n")
    tight = float32_tolerance(len(modules), longest_sum)
    loose = float16_tolerance(len(modules)) if scale_dtype == torch.float16 else tight
    passed = [
        report("as it is", largest_difference(ours, as_it_is), largest, *loose),
        report("float32", largest_difference(ours, exact), largest, *tight),
    ]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
