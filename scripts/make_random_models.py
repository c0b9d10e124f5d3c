#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make tiny random models of several families with logits computed by transformers.

They cover what the trained reference models do not: a sliding window shorter than the text, heads that
do not add up to the hidden size, llama3 and YaRN rope scaling, tied and untied heads, shards, float16 and
float32 weights, a vocabulary that no power of two divides. All weights, norm gains and biases are random.

Each directory holds a checkpoint in the layout of released models and

    golden/ids.json             lists of token ids
    golden/logits.safetensors   logits.i float32 [length, vocab] of list i, computed in float32 arithmetic with
                                eager attention from the weights as they are stored

Needs torch, transformers and safetensors; the committed files were made with the versions that
testdata/random-models/README.md names. Runs in seconds:

    scripts/make_random_models.py testdata/random-models
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

VOCAB = 307
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "initializer_range": 0.02,
}


# Gated DeltaNet in three of four layers, gated attention with a quarter of each head rotated.
HYBRID = {
    "num_hidden_layers": 4,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.25},
}


CHUNKS = (150, 19, 1)  # DeltaNet works on chunks of 64


@dataclasses.dataclass(frozen=True)
class Model:
    """One model to make; `classic` writes the rope and dtype keys of config.json as transformers 4 did."""

    name: str
    model_type: str
    dtype: torch.dtype
    config: dict[str, Any]
    classic: bool
    max_shard_size: str = "1GB"
    lengths: tuple[int, ...] = (48, 19, 1)
    fp8: bool = False  # weights of the layers as released in FP8, scaled by blocks of 128 x 128


# What files of GGUF take of DeltaNet: heads of one width, experts in every layer.
SQUARE = HYBRID | {
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}

# Sizes that blocks of 128 divide, or that are one smaller block.
WIDE = {
    "hidden_size": 128,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}

MODELS = (
    Model(
        "mistral-window",
        "mistral",
        torch.float16,
        {
            "intermediate_size": 160,
            "head_dim": 24,
            "sliding_window": 16,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        classic=True,
    ),
    Model(
        "llama3-tied",
        "llama",
        torch.float32,
        {
            "intermediate_size": 128,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        classic=True,
    ),
    Model(
        "qwen2-untied",
        "qwen2",
        torch.bfloat16,
        {
            "intermediate_size": 128,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
        classic=False,
    ),
    Model(
        "qwen2-yarn",
        "qwen2",
        torch.float16,
        {
            "intermediate_size": 128,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        classic=True,
    ),
    Model(
        "qwen3-wide-heads",
        "qwen3",
        torch.bfloat16,
        {
            "intermediate_size": 160,
            "head_dim": 32,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
        classic=False,
        max_shard_size="96KB",
    ),
    Model(
        "qwen3-moe",
        "qwen3_moe",
        torch.bfloat16,
        {
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "num_hidden_layers": 3,
            "mlp_only_layers": [1],
            "head_dim": 32,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
        classic=False,
    ),
    Model(
        "qwen2-moe",
        "qwen2_moe",
        torch.bfloat16,
        {
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
        classic=True,
    ),
    Model(
        "qwen3-next",
        "qwen3_next",
        torch.bfloat16,
        HYBRID
        | {
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [2],
            "tie_word_embeddings": False,
        },
        classic=False,
        lengths=CHUNKS,
    ),
    Model(
        "qwen3.5",
        "qwen3_5_text",
        torch.bfloat16,
        HYBRID | {"intermediate_size": 96, "tie_word_embeddings": True},
        classic=False,
        lengths=CHUNKS,
    ),
    Model(
        "qwen3.5-moe",
        "qwen3_5_moe_text",
        torch.bfloat16,
        HYBRID
        | {
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": False,
        },
        classic=False,
        lengths=CHUNKS,
    ),
    Model(
        "qwen3-next-square",
        "qwen3_next",
        torch.bfloat16,
        SQUARE | {"intermediate_size": 96, "norm_topk_prob": True, "decoder_sparse_step": 1},
        classic=False,
        lengths=CHUNKS,
    ),
    Model("qwen3.5-moe-square", "qwen3_5_moe_text", torch.bfloat16, SQUARE, classic=False, lengths=CHUNKS),
    Model("qwen3-fp8", "qwen3", torch.bfloat16, WIDE | {"intermediate_size": 256}, classic=False, fp8=True),
    Model(
        "qwen3-moe-fp8",
        "qwen3_moe",
        torch.bfloat16,
        WIDE
        | {
            "num_hidden_layers": 1,
            "intermediate_size": 256,
            "moe_intermediate_size": 128,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
        classic=False,
        fp8=True,
    ),
)

FP8_BLOCK = 128
FP8_LARGEST = 448.0


@torch.no_grad()
def randomise(model: torch.nn.Module, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Random values for every parameter, strong enough that attention depends on positions."""
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            values = torch.exp(0.3 * values)
        elif name.endswith(".bias"):
            values *= 0.5
        elif "embed_tokens" not in name:
            gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
            values *= gain / math.sqrt(parameter.shape[-1])
        parameter.data = values.to(dtype)


def use_classic_keys(path: Path) -> None:
    """Replace `rope_parameters` and `dtype` by `rope_theta`, `rope_scaling` and `torch_dtype`."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    if rope["rope_type"] == "yarn":
        rope["type"] = rope.pop("rope_type")  # as the model cards of Qwen2 and Qwen2.5 advise
    config["rope_scaling"] = None if rope.get("rope_type") == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def blocks_of(weight: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each block, the last ones maybe smaller."""
    rows, columns = (-(-extent // FP8_BLOCK) for extent in weight.shape)
    largest = torch.empty(rows, columns)
    for row in range(rows):
        for column in range(columns):
            block = weight[row * FP8_BLOCK : (row + 1) * FP8_BLOCK, column * FP8_BLOCK : (column + 1) * FP8_BLOCK]
            largest[row, column] = block.abs().max()
    return largest


def use_fp8(directory: Path) -> None:
    """Replace the weights of the layers' linears by FP8 ones, in the layout of Qwen's FP8 releases."""
    path = directory / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    kept = ["lm_head"]
    for name in sorted(tensors):
        weight = tensors[name].float()
        if ".layers." not in name or weight.ndim != 2:
            continue
        if name.endswith("mlp.gate.weight"):  # the router
            kept.append(name.removesuffix(".weight"))
            continue
        scale = (blocks_of(weight) / FP8_LARGEST).bfloat16()
        spread = scale.float().repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
        spread = spread[: weight.shape[0], : weight.shape[1]]
        tensors[name] = (weight / spread).clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = scale
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        "modules_to_not_convert": kept,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def dequantize(directory: Path, out: Path) -> None:
    """The float32 model that an FP8 one stands for, by transformers' own dequantization."""
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    step = Fp8Dequantize(None)
    plain = {}
    for name, tensor in tensors.items():
        if not name.endswith("_scale_inv"):
            scale = tensors.get(name + "_scale_inv")
            plain[name] = tensor if scale is None else step._dequantize_one(tensor, scale, torch.float32)
    safetensors.torch.save_file(plain, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))


def make_ids(seed: int, lengths: tuple[int, ...]) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(length)] for length in lengths]


@torch.no_grad()
def golden_logits(directory: Path, ids: list[list[int]], **overrides: Any) -> dict[str, torch.Tensor]:
    """Float32 logits of the stored model; `overrides` replace keys of its configuration."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", **overrides
    )
    return {f"logits.{i}": model(torch.tensor([row])).logits[0].contiguous() for i, row in enumerate(ids)}


def make_model(spec: Model, directory: Path) -> None:
    seed = zlib.crc32(spec.name.encode())
    config = transformers.AutoConfig.for_model(spec.model_type, **(COMMON | spec.config))
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomise(model, spec.dtype, torch.Generator().manual_seed(seed))
    model.config.dtype = spec.dtype
    model.save_pretrained(directory, max_shard_size=spec.max_shard_size)
    (directory / "generation_config.json").unlink(missing_ok=True)
    if spec.classic:
        use_classic_keys(directory / "config.json")
    if spec.fp8:
        use_fp8(directory)

    ids = make_ids(seed, spec.lengths)
    with tempfile.TemporaryDirectory() as plain:
        if spec.fp8:
            dequantize(directory, Path(plain))
        logits = golden_logits(Path(plain) if spec.fp8 else directory, ids)
    check_features_matter(spec, directory, ids, logits)
    golden = directory / "golden"
    golden.mkdir(exist_ok=True)
    (golden / "ids.json").write_text(json.dumps(ids) + "\n")
    safetensors.torch.save_file(logits, golden / "logits.safetensors")


def check_features_matter(spec: Model, directory: Path, ids: list[list[int]], logits: dict[str, torch.Tensor]) -> None:
    """A golden file that an engine without the feature would reproduce is no test: fail on it."""
    plain_rope = {"rope_type": "default", "rope_theta": spec.config["rope_parameters"]["rope_theta"]}
    without: dict[str, dict[str, Any]] = {}
    if "sliding_window" in spec.config:
        without["sliding window"] = {"sliding_window": None}
    if spec.config["rope_parameters"]["rope_type"] != "default":
        without["rope scaling"] = {"rope_parameters": plain_rope}
    for feature, overrides in without.items():
        other = golden_logits(directory, ids, **overrides)
        change = (other["logits.0"] - logits["logits.0"]).abs().max() / logits["logits.0"].abs().max()
        print(f"{spec.name}: without its {feature} the logits change by {change:.2f} of the largest")
        if change < 0.05:
            raise SystemExit(f"error: {spec.name}: {feature} hardly changes the logits")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="gets one directory per model")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="make this model; may be repeated")
    arguments = parser.parse_args()
    out: Path = arguments.out
    torch.set_num_threads(1)
    for spec in MODELS:
        if arguments.only and spec.name not in arguments.only:
            continue
        directory = out / spec.name
        directory.mkdir(parents=True, exist_ok=True)
        for old in directory.glob("*.safetensors*"):
            old.unlink()
        make_model(spec, directory)
        size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        print(f"{spec.name}: {size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
