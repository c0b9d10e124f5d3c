#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compare the logits of `quern logits` with those of readers that share no code with quern.

What the other side is depends on the format of the checkpoint; all of it runs on the CPU with float32 activations.

gptq                transformers with GPTQModel's torch kernel, twice:
    as it is        the model as anybody would load it. GPTQModel keeps scales as float16 and therefore rounds every
                    dequantized weight s*(q-z) to float16, so this can only agree up to that rounding.
    float32         the same quantized modules, their scales widened to float32 (exact), their weights decoded by
                    GPTQModel's own dequantize_weight() and put into dense float32 linears. What is left is the
                    order of sums.
compressed-tensors  transformers with the compressed-tensors package, in float32:
    as it is        as anybody would load it. Not for asymmetric weights and quantized embeddings: the package (0.20.0)
                    does not load its own files of those through transformers.
    by module       the model in plain transformers; the package matches targets to modules and decompresses each.
                    With integer inputs, which this package scales by max|x| / 127.5 and vLLM and quern by max|x| / 127,
                    the script makes it 127 and compares the residual stream after the first layer, row by row: an
                    input within float rounding of the middle between two integers may go either way, and moves its
                    row, and through attention later rows; a wrong scale would move all.
awq                 the model in transformers, its linears decoded here from AutoAWQ's layout with numpy.

For each it prints the largest absolute difference, the largest logit, their ratio and a tolerance with its
derivation. Exit code: 0 all agree, 1 a ratio exceeds its tolerance, 2 a side could not be run.

    scripts/check_independent_engine.py --quern build/release/quern --checkpoint DIR [--ids FILE.json]

transformers (through optimum) ignores the per-module rules of GPTQ's `dynamic`; a checkpoint that has them is loaded
by GPTQModel instead, which widens the scales itself, so that "as it is" is then float32 as well.

Packages (Python 3.11, CPU): torch==2.13.0 transformers==5.23.* safetensors accelerate. For GPTQ: optimum==2.3.0 with
--no-deps; `setuptools>=84.2.1` and wheel, then gptqmodel==7.7.0 with --no-build-isolation --no-deps, then Defuser
Device-SMI LogBar PyPcre TokeNicer datasets threadpoolctl pillow requests. For compressed-tensors:
compressed-tensors==0.20.0.
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

import numpy
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


def load_gptq(checkpoint: Path, quantization: dict[str, Any]) -> torch.nn.Module:
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


def quern_tensors(
    quern: Path, checkpoint: Path, ids: list[list[int]], threads: int | None, hidden: bool = False
) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        ids_file, out_file = Path(folder, "ids.json"), Path(folder, "out.safetensors")
        ids_file.write_text(json.dumps(ids))
        command = [str(quern), "logits", str(checkpoint), "--ids", str(ids_file), "-o", str(out_file)]
        command += ["--hidden"] if hidden else []
        if threads is not None:
            command += ["--threads", str(threads)]
        try:
            code = subprocess.run(command, stdout=sys.stderr).returncode
        except OSError as problem:
            raise fail(str(quern), str(problem), "--quern build/release/quern") from problem
        if code != 0 or not out_file.is_file():
            raise fail(" ".join(command), f"exit code {code}", "read its message above")
        return load_file(out_file)


def plain_model(checkpoint: Path) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The architecture without its quantization, in float32 and without weights, and all stored tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        tensors.update(load_file(file))
    config = AutoConfig.from_pretrained(checkpoint)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    return model.eval(), tensors


def fill(model: torch.nn.Module, tensors: dict[str, torch.Tensor], checkpoint: Path) -> None:
    parameters = {name for name, _ in model.named_parameters() if name.endswith((".weight", ".bias"))}
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    if parameters - tied != set(tensors) - tied:
        raise fail(str(checkpoint), f"other tensors: {parameters ^ set(tensors)}", "a checkpoint of this architecture")
    model.load_state_dict({name: value.float() for name, value in tensors.items()}, strict=False)
    model.tie_weights()


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


# --- compressed-tensors ------------------------------------------------------------------------------------------


def round_inputs_as_vllm() -> None:
    """Dynamic scales of integer inputs: max|x| / 127, where the package divides by 127.5."""
    from compressed_tensors.quantization.lifecycle import forward

    original = forward.compute_dynamic_scales_and_zp

    def scaled(*positional: Any, **named: Any) -> Any:
        scales, zero_points = original(*positional, **named)
        levels = 2 ** named["args"].num_bits - 1
        return scales * (levels / (levels - 1)), zero_points

    forward.compute_dynamic_scales_and_zp = scaled


def scheme_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    modules = model.named_modules()
    return {name: module for name, module in modules if getattr(module, "quantization_scheme", None) is not None}


def load_by_module(checkpoint: Path, quantization: dict[str, Any]) -> torch.nn.Module:
    """Plain transformers; the package chooses the scheme of each module and decompresses its tensors."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config

    model, tensors = plain_model(checkpoint)
    apply_quantization_config(model, QuantizationConfig.model_validate(quantization))
    for name, module in scheme_modules(model).items():
        scheme = module.quantization_scheme
        parts = {key: tensors.pop(key) for key in list(tensors) if key.rpartition(".")[0] == name}
        state = {key.rpartition(".")[2]: value for key, value in parts.items()}
        if "bias" in state:
            tensors[f"{name}.bias"] = state.pop("bias")
        state["weight_scale"] = state["weight_scale"].float()
        compressor = BaseCompressor.get_value_from_registry(scheme.format or quantization["format"])
        tensors[f"{name}.weight"] = compressor.decompress(state, scheme)["weight"]
        if "input_scale" in state:
            module.input_scale.data = state["input_scale"].float()
        module.quantization_status = QuantizationStatus.DECOMPRESSED
    fill(model, tensors, checkpoint)
    return model


def compare_first_layer(
    quern: Path, checkpoint: Path, model: torch.nn.Module, ids: list[list[int]], threads: int | None
) -> bool:
    """Share of the rows after the first layer that agree up to float rounding."""
    tensors = quern_tensors(quern, checkpoint, ids, threads, hidden=True)
    agree, rows = 0, 0
    for i, row in enumerate(ids):
        with torch.no_grad():
            theirs = model(torch.tensor([row]), output_hidden_states=True).hidden_states[1][0].float()
        difference = (tensors[f"hidden.{i}.1"] - theirs).abs().amax(dim=1)
        agree += int((difference <= FLOAT32_FLOOR * theirs.abs().amax(dim=1)).sum())
        rows += len(row)
    passed = agree > rows / 2
    print(f"first layer: {'agrees' if passed else 'DIFFERS'}")
    print(f"  {agree} of {rows} rows within {FLOAT32_FLOOR:g} of their largest value; more than half expected")
    return passed


def compare_compressed(
    arguments: argparse.Namespace, quantization: dict[str, Any], ids: list[list[int]], ours: list[torch.Tensor]
) -> list[bool]:
    from transformers import AutoModelForCausalLM

    checkpoint = arguments.checkpoint
    round_inputs_as_vllm()
    with stdout_to_stderr():
        model = load_by_module(checkpoint, quantization)
        modules = scheme_modules(model)
        if not modules:
            raise fail(str(checkpoint), "the peer found no quantized module", "a compressed-tensors checkpoint")
        by_module = peer_logits(model, ids)
    schemes = [module.quantization_scheme for module in modules.values()]
    widths = sorted({scheme.weights.num_bits for scheme in schemes})
    print(f"{len(modules)} quantized modules of {widths} bits, {sum(map(len, ids))} positions")
    if any(scheme.input_activations is not None for scheme in schemes):
        largest = max(tensor.abs().max().item() for tensor in by_module)
        print(f"logits: largest difference {largest_difference(ours, by_module):.3e}, largest logit {largest:.3f}")
        return [compare_first_layer(arguments.quern, checkpoint, model, ids, arguments.threads)]
    tolerance = float32_tolerance(len(modules), max(module.weight.shape[-1] for module in modules.values()))
    passed = [compare("by module", ours, by_module, *tolerance)]
    embedded = any(isinstance(module, torch.nn.Embedding) for module in modules.values())
    if all(scheme.weights.symmetric for scheme in schemes) and not embedded:
        with stdout_to_stderr():
            peer = AutoModelForCausalLM.from_pretrained(
                checkpoint, dtype=torch.float32, device_map="cpu", attn_implementation="eager"
            )
            as_it_is = peer_logits(peer, ids)
        passed.append(compare("as it is", ours, as_it_is, *tolerance))
    return passed


# --- AWQ ---------------------------------------------------------------------------------------------------------


def decode_awq(qweight: numpy.ndarray, qzeros: numpy.ndarray, scales: numpy.ndarray) -> numpy.ndarray:
    """[out, in] float32 from AutoAWQ's gemm layout: output 8c+t of a word is the nibble R[t]."""
    nibbles = numpy.array([0, 4, 1, 5, 2, 6, 3, 7], dtype=numpy.uint32)

    def unpack(packed: numpy.ndarray) -> numpy.ndarray:
        fields = (packed.view(numpy.uint32)[:, :, None] >> (4 * nibbles)) & 15
        return fields.reshape(packed.shape[0], -1).astype(numpy.float32)

    codes, zeros = unpack(qweight), unpack(qzeros)
    group = numpy.arange(codes.shape[0]) // (codes.shape[0] // zeros.shape[0])
    return ((codes - zeros[group]) * scales.astype(numpy.float32)[group]).T


def load_awq(checkpoint: Path) -> tuple[torch.nn.Module, int]:
    """The model in plain transformers with decoded linears, and how many there are."""
    model, tensors = plain_model(checkpoint)
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    for module in modules:
        parts = [tensors.pop(f"{module}.{part}").numpy() for part in ("qweight", "qzeros", "scales")]
        tensors[f"{module}.weight"] = torch.from_numpy(decode_awq(*parts))
    fill(model, tensors, checkpoint)
    return model, len(modules)


def compare_awq(checkpoint: Path, ids: list[list[int]], ours: list[torch.Tensor]) -> list[bool]:
    with stdout_to_stderr():
        model, count = load_awq(checkpoint)
        theirs = peer_logits(model, ids)
    print(f"{count} quantized linears, {sum(map(len, ids))} positions")
    longest_sum = max(module.in_features for module in model.modules() if isinstance(module, torch.nn.Linear))
    return [compare("awq", ours, theirs, *float32_tolerance(count, longest_sum))]


# -----------------------------------------------------------------------------------------------------------------


def compare(title: str, ours: list[torch.Tensor], theirs: list[torch.Tensor], tolerance: float, why: str) -> bool:
    largest = max(tensor.abs().max().item() for tensor in theirs)
    return report(title, largest_difference(ours, theirs), largest, tolerance, why)


def compare_gptq(
    checkpoint: Path, quantization: dict[str, Any], ids: list[list[int]], ours: list[torch.Tensor]
) -> list[bool]:
    with stdout_to_stderr():
        model = load_gptq(checkpoint, quantization)
        modules = quantized_modules(model)
        if not modules:
            raise fail(str(checkpoint), "the peer found no quantized linear", "a GPTQ checkpoint")
        scale_dtype = next(iter(modules.values())).scales.dtype
        longest_sum = max(module.in_features for module in modules.values())
        as_it_is = peer_logits(model, ids)
        make_dense(model)
        exact = peer_logits(model, ids)
    largest = max(tensor.abs().max().item() for tensor in exact)
    rounding = largest_difference(as_it_is, exact)
    print(f"{len(modules)} quantized linears, {sum(map(len, ids))} positions, scales held as {scale_dtype} by the peer")
    print(f"the peer against itself, as it is and float32: ratio {rounding / largest:.3e}\n")
    tight = float32_tolerance(len(modules), longest_sum)
    loose = float16_tolerance(len(modules)) if scale_dtype == torch.float16 else tight
    return [compare("as it is", ours, as_it_is, *loose), compare("float32", ours, exact, *tight)]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quern", type=Path, required=True, help="the quern binary")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="a quantized checkpoint")
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
            "cannot read the checkpoint or the ids", repr(problem), "a directory with a quantized checkpoint"
        ) from problem

    tensors = quern_tensors(arguments.quern, arguments.checkpoint, ids, arguments.threads)
    ours = [tensors[f"logits.{i}"] for i in range(len(ids))]
    for i, (mine, row) in enumerate(zip(ours, ids, strict=True)):
        if mine.dtype != torch.float32 or mine.shape != (len(row), config["vocab_size"]):
            raise fail(
                f"logits.{i} of quern", f"{mine.dtype} {list(mine.shape)}", "see the contract of `quern logits`"
            )
    method = quantization["quant_method"]
    if method == "compressed-tensors":
        passed = compare_compressed(arguments, quantization, ids, ours)
    elif method == "awq":
        passed = compare_awq(arguments.checkpoint, ids, ours)
    elif method == "gptq":
        passed = compare_gptq(arguments.checkpoint, quantization, ids, ours)
    else:
        raise fail(str(arguments.checkpoint), f"no reader for {method}", "a gptq, awq or compressed-tensors checkpoint")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
