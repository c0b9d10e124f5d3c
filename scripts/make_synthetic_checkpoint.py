#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make a random checkpoint with the exact shapes, names and file layout of a released Qwen model.

For speed and memory measurements at real size where the real weights are not at hand: the numbers mean
nothing, but every tensor has the real shape and dtype, activations stay of order one through all layers,
routers spread their tokens unevenly, and the second moments that calibration sees are uneven, because norm
gains, `v_proj`, `up_proj` and DeltaNet's input rows have a log-normal spread and each norm has a few outlier
channels. Values are windows of one block of random numbers with a scale for each row, so that writing is bound
by the disk; memory stays below about 250 MB whatever the model's size. The output depends only on the options
and `--seed`.

Needs numpy only. Released configurations come from `testdata/configs`; --config takes any other one.

    scripts/make_synthetic_checkpoint.py OUT_DIR                               # Qwen3-0.6B
    scripts/make_synthetic_checkpoint.py OUT_DIR --layers 2 --seed 7           # two layers of it
    scripts/make_synthetic_checkpoint.py OUT_DIR --shape qwen3-1.7b --shard-size 1GB
    scripts/make_synthetic_checkpoint.py OUT_DIR --shape qwen3.5-122b-a10b --layers 2      # 13 GB
    scripts/make_synthetic_checkpoint.py OUT_DIR --shape qwen3.5-35b-a3b --layers 4 --vision --mtp
    scripts/make_synthetic_checkpoint.py OUT_DIR --shape qwen3.8-2.4t-a95b --layers 2 --experts 32
    scripts/make_synthetic_checkpoint.py OUT_DIR --tokenizer DIR_WITH_TOKENIZER_JSON
    scripts/make_synthetic_checkpoint.py --ids-out calib.safetensors --samples 64 --length 2048

A cut of a model with DeltaNet keeps the order of its layers and always has one with full attention, its last.

`--ids-out` writes calibration tokens (`input_ids` [samples, length]) that follow a Zipf-like law; without
OUT_DIR nothing else is written.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import shutil
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

CONFIGS = Path(__file__).resolve().parent.parent / "testdata" / "configs"
CHUNK_ELEMENTS = 1 << 20
POOL_ELEMENTS = 20 * CHUNK_ELEMENTS
SHARD_SIZE = 5_000_000_000  # of releases; a smaller model is one file
LINEAR_STD_GAIN = 0.64  # times 1/sqrt(fan-in): 0.02 at the 1,024 inputs of Qwen3-0.6B
ROUTER_STD_GAIN = 1.5
EMBEDDING_STD = 0.02
NORM_LOG_STD = 0.4
ROW_LOG_STD = 0.3
OUTLIERS_PER_NORM = 6
OUTLIER_FACTORS = (6.0, 16.0)
BIAS_STD = {"q_proj": 1.0, "k_proj": 2.0, "v_proj": 0.1}
DECAY_RATES = (1.0, 16.0)  # exp(A_log)
TIME_STEPS = (0.001, 0.1)  # softplus(dt_bias)
ZIPF_EXPONENT, ZIPF_OFFSET = 1.07, 2.7
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of one dense Qwen decoder whose configuration is put together here."""

    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    max_positions: int
    rope_theta: int = 1_000_000
    rms_eps: float = 1e-6


SHAPES = {
    "qwen3-0.6b": Shape("qwen3", 1024, 28, 16, 8, 128, 3072, 151936, True, 40960),
    "qwen3-1.7b": Shape("qwen3", 2048, 28, 16, 8, 128, 6144, 151936, True, 40960),
    "qwen2.5-0.5b": Shape("qwen2", 896, 24, 14, 2, 64, 4864, 151936, True, 32768),
}
RELEASED = {
    "qwen3-4b": "Qwen3-4B-2507",
    "qwen3-30b-a3b": "Qwen3-30B-A3B-Instruct-2507",
    "qwen3-next-80b-a3b": "Qwen3-Next-80B-A3B-Instruct",
    "qwen3.5-35b-a3b": "Qwen3.5-35B-A3B",
    "qwen3.5-122b-a10b": "Qwen3.5-122B-A10B",
    "qwen3.8-2.4t-a95b": "Qwen3.8-2.4T-A95B",
}
# Options that replace a key of the decoder's configuration.
OVERRIDES = {
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate": "intermediate_size",
    "vocab": "vocab_size",
    "experts": "num_experts",
    "expert_width": "moe_intermediate_size",
}
DENSE = ("qwen2", "qwen3")
HYBRID = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
MIXTURES = ("qwen3_moe", "qwen3_next", "qwen3_5_moe_text")
FUSED_EXPERTS = ("qwen3_5_moe_text",)  # two tensors a layer; else three for each expert


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One BF16 tensor to be written: name, shape, and what its values are (see `tensor_chunks`)."""

    name: str
    shape: tuple[int, ...]
    # "embedding", "linear", "spread_linear", "residual_linear", "router", "norm", "centred_norm" (stored as
    # gain - 1), "bias", "zeros", "log_decay", "time_step"
    kind: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return 2 * self.elements


class Decoder:
    """The tensors of a decoder, from its configuration (`text_config` of a multimodal one)."""

    def __init__(self, text: dict[str, Any], prefix: str) -> None:
        self.text = text
        self.prefix = prefix
        self.type = text["model_type"]
        self.hidden = text["hidden_size"]
        self.norm_kind = "centred_norm" if self.type in HYBRID else "norm"

    def tensors(self, tied: bool) -> list[Tensor]:
        """All of them, in the order of the files."""
        vocab = self.text["vocab_size"]
        tensors = [Tensor(f"{self.prefix}embed_tokens.weight", (vocab, self.hidden), "embedding")]
        for layer, kind in enumerate(layer_types(self.text)):
            tensors += self.layer(f"{self.prefix}layers.{layer}.", kind)
        tensors.append(Tensor(f"{self.prefix}norm.weight", (self.hidden,), self.norm_kind))
        if not tied:
            tensors.append(Tensor("lm_head.weight", (vocab, self.hidden), "embedding"))
        return tensors

    def mtp(self) -> list[Tensor]:
        """The head that predicts one token more: one layer with full attention, and what joins its inputs."""
        norms = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
        return [
            Tensor("mtp.fc.weight", (self.hidden, 2 * self.hidden), "linear"),
            *(Tensor(f"mtp.{name}.weight", (self.hidden,), self.norm_kind) for name in norms),
            *self.layer("mtp.layers.0.", "full_attention"),
        ]

    def layer(self, prefix: str, kind: str) -> list[Tensor]:
        norms = ("input_layernorm", "post_attention_layernorm")
        return [
            *(Tensor(f"{prefix}{name}.weight", (self.hidden,), self.norm_kind) for name in norms),
            *(self.delta_net(prefix) if kind == "linear_attention" else self.attention(prefix)),
            *(self.mixture(prefix + "mlp.") if self.type in MIXTURES else self.mlp(prefix + "mlp.")),
        ]

    def attention(self, prefix: str) -> list[Tensor]:
        text, base = self.text, prefix + "self_attn."
        dim = head_dim(text)
        q_size, kv_size = text["num_attention_heads"] * dim, text["num_key_value_heads"] * dim
        q_rows = 2 * q_size if self.type in HYBRID else q_size  # a gate beside each head's query
        tensors = [
            Tensor(base + "k_proj.weight", (kv_size, self.hidden), "linear"),
            Tensor(base + "o_proj.weight", (self.hidden, q_size), "residual_linear"),
            Tensor(base + "q_proj.weight", (q_rows, self.hidden), "linear"),
            Tensor(base + "v_proj.weight", (kv_size, self.hidden), "spread_linear"),
        ]
        if self.type == "qwen2":
            sizes = {"k_proj": kv_size, "q_proj": q_size, "v_proj": kv_size}
            return tensors + [Tensor(f"{base}{name}.bias", (size,), "bias") for name, size in sizes.items()]
        return tensors + [Tensor(f"{base}{name}_norm.weight", (dim,), self.norm_kind) for name in "kq"]

    def delta_net(self, prefix: str) -> list[Tensor]:
        text, base = self.text, prefix + "linear_attn."
        heads, values = text["linear_num_value_heads"], text["linear_num_value_heads"] * text["linear_value_head_dim"]
        keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
        channels = 2 * keys + values
        if self.type == "qwen3_next":
            inputs = [("in_proj_qkvz", channels + values, "spread_linear"), ("in_proj_ba", 2 * heads, "linear")]
        else:
            inputs = [
                ("in_proj_qkv", channels, "spread_linear"),
                ("in_proj_z", values, "linear"),
                ("in_proj_b", heads, "linear"),
                ("in_proj_a", heads, "linear"),
            ]
        return [
            *(Tensor(f"{base}{name}.weight", (rows, self.hidden), kind) for name, rows, kind in inputs),
            Tensor(base + "conv1d.weight", (channels, 1, text["linear_conv_kernel_dim"]), "linear"),
            Tensor(base + "A_log", (heads,), "log_decay"),
            Tensor(base + "dt_bias", (heads,), "time_step"),
            Tensor(base + "norm.weight", (text["linear_value_head_dim"],), "norm"),
            Tensor(base + "out_proj.weight", (self.hidden, values), "residual_linear"),
        ]

    def mlp(self, base: str, width: int | None = None) -> list[Tensor]:
        width = width or self.text["intermediate_size"]
        return [
            Tensor(base + "down_proj.weight", (self.hidden, width), "residual_linear"),
            Tensor(base + "gate_proj.weight", (width, self.hidden), "linear"),
            Tensor(base + "up_proj.weight", (width, self.hidden), "spread_linear"),
        ]

    def mixture(self, base: str) -> list[Tensor]:
        experts, width = self.text["num_experts"], self.text["moe_intermediate_size"]
        tensors = [Tensor(base + "gate.weight", (experts, self.hidden), "router")]
        if shared := self.text.get("shared_expert_intermediate_size"):
            tensors.append(Tensor(base + "shared_expert_gate.weight", (1, self.hidden), "linear"))
            tensors += self.mlp(base + "shared_expert.", shared)
        if self.type in FUSED_EXPERTS:
            return [
                *tensors,
                Tensor(base + "experts.down_proj", (experts, self.hidden, width), "residual_linear"),
                Tensor(base + "experts.gate_up_proj", (experts, 2 * width, self.hidden), "spread_linear"),
            ]
        for expert in range(experts):
            tensors += self.mlp(f"{base}experts.{expert}.", width)
        return tensors


def head_dim(text: dict[str, Any]) -> int:
    return text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]


def layer_types(text: dict[str, Any]) -> list[str]:
    """The kind of every layer; the last one of a cut that would have no attention is one."""
    layers = text["num_hidden_layers"]
    if text["model_type"] not in HYBRID:
        return ["full_attention"] * layers
    interval = text.get("full_attention_interval", 4)
    released = text.get("layer_types") or [
        "linear_attention" if (i + 1) % interval else "full_attention" for i in range(layers)
    ]
    kinds = [released[i % len(released)] for i in range(layers)]
    if "full_attention" not in kinds:
        kinds[-1] = "full_attention"
    return kinds


def vision_tensors(vision: dict[str, Any]) -> list[Tensor]:
    """The tower of Qwen3.5, under `model.visual.`."""
    width, inner = vision["hidden_size"], vision["intermediate_size"]
    merged = width * vision["spatial_merge_size"] ** 2
    patch = (vision["in_channels"], vision["temporal_patch_size"], vision["patch_size"], vision["patch_size"])

    def linear(name: str, rows: int, columns: tuple[int, ...], kind: str = "linear") -> list[Tensor]:
        return [Tensor(name + ".weight", (rows, *columns), kind), Tensor(name + ".bias", (rows,), "zeros")]

    def norm(name: str) -> list[Tensor]:
        return [Tensor(name + ".weight", (width,), "norm"), Tensor(name + ".bias", (width,), "zeros")]

    base = "model.visual."
    tensors = [
        *linear(base + "patch_embed.proj", width, patch),
        Tensor(base + "pos_embed.weight", (vision["num_position_embeddings"], width), "embedding"),
    ]
    for index in range(vision["depth"]):
        block = f"{base}blocks.{index}."
        tensors += [
            *norm(block + "norm1"),
            *norm(block + "norm2"),
            *linear(block + "attn.qkv", 3 * width, (width,)),
            *linear(block + "attn.proj", width, (width,), "residual_linear"),
            *linear(block + "mlp.linear_fc1", inner, (width,)),
            *linear(block + "mlp.linear_fc2", width, (inner,), "residual_linear"),
        ]
    return [
        *tensors,
        *norm(base + "merger.norm"),
        *linear(base + "merger.linear_fc1", merged, (merged,)),
        *linear(base + "merger.linear_fc2", vision["out_hidden_size"], (merged,)),
    ]


def text_of(config: dict[str, Any]) -> dict[str, Any]:
    return config.get("text_config", config)


def is_tied(config: dict[str, Any]) -> bool:
    return bool(config.get("tie_word_embeddings", text_of(config).get("tie_word_embeddings", False)))


def model_tensors(config: dict[str, Any]) -> list[Tensor]:
    """Every tensor of the checkpoint, in the order of the files."""
    prefix = "model.language_model." if "text_config" in config else "model."
    decoder = Decoder(text_of(config), prefix)
    tensors = decoder.tensors(is_tied(config))
    if "vision_config" in config:
        tensors += vision_tensors(config["vision_config"])
    if text_of(config).get("mtp_num_hidden_layers"):
        tensors += decoder.mtp()
    return tensors


def norm_gains(count: int, rng: np.random.Generator) -> np.ndarray:
    """Log-normal gains with a few outlier channels, of root mean square one."""
    gains = np.exp(NORM_LOG_STD * rng.standard_normal(count))
    outliers = rng.choice(count, size=min(OUTLIERS_PER_NORM, count // 32), replace=False)
    gains[outliers] *= rng.uniform(*OUTLIER_FACTORS, size=outliers.size)
    return (gains / np.sqrt(np.mean(gains**2))).astype(np.float32)


def vector_values(tensor: Tensor, rng: np.random.Generator) -> np.ndarray:
    count = tensor.elements
    if tensor.kind in ("norm", "centred_norm"):
        return norm_gains(count, rng) - np.float32(tensor.kind == "centred_norm")
    if tensor.kind == "bias":
        return BIAS_STD[tensor.name.split(".")[-2]] * rng.standard_normal(count, dtype=np.float32)
    if tensor.kind == "log_decay":
        return np.log(rng.uniform(*DECAY_RATES, size=count)).astype(np.float32)
    if tensor.kind == "time_step":
        return np.log(np.expm1(np.exp(rng.uniform(*np.log(TIME_STEPS), size=count)))).astype(np.float32)
    return np.zeros(count, dtype=np.float32)


def matrix_std(tensor: Tensor, columns: int, layers: int) -> float:
    if tensor.kind == "embedding":
        return EMBEDDING_STD
    gain = ROUTER_STD_GAIN if tensor.kind == "router" else LINEAR_STD_GAIN
    depth = 2 * layers if tensor.kind == "residual_linear" else 1
    return gain / math.sqrt(columns * depth)


def tensor_chunks(tensor: Tensor, pool: np.ndarray, layers: int, seed: int) -> Iterator[np.ndarray]:
    """The float32 values of a tensor, some rows at a time; they depend on the seed and the tensor alone."""
    rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(tensor.name.encode())]))
    if len(tensor.shape) == 1:
        yield vector_values(tensor, rng)
        return
    # A matrix, a stack of them, or the filters of a convolution: the rows of each output.
    convolution = len(tensor.shape) > 3 or "conv1d" in tensor.name
    columns = math.prod(tensor.shape[1:]) if convolution else tensor.shape[-1]
    rows = tensor.elements // columns
    std = matrix_std(tensor, columns, layers)
    rows_per_chunk = max(1, CHUNK_ELEMENTS // columns)
    for first in range(0, rows, rows_per_chunk):
        count = min(rows_per_chunk, rows - first)
        scales = np.full((count, 1), std, dtype=np.float32)
        if tensor.kind == "spread_linear":
            scales *= np.exp(ROW_LOG_STD * rng.standard_normal((count, 1), dtype=np.float32))
        offset = rng.integers(pool.size - count * columns + 1)
        yield pool[offset : offset + count * columns].reshape(count, columns) * scales


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The BF16 bit patterns of finite float32 values, rounded to nearest, in the place of `values`."""
    bits = values.view(np.uint32)
    bits += 0x8000
    return np.ascontiguousarray(values.view("<u2")[..., 1::2])


def write_header(file: BinaryIO, entries: list[tuple[str, str, tuple[int, ...], int]]) -> None:
    """Write a safetensors header for (name, dtype, shape, bytes) entries stored back to back."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape, size in entries:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)))
    file.write(text)


def write_weights(path: Path, tensors: list[Tensor], pool: np.ndarray, layers: int, seed: int) -> None:
    with path.open("wb") as file:
        write_header(file, [(t.name, "BF16", t.shape, t.bytes) for t in tensors])
        for tensor in tensors:
            for values in tensor_chunks(tensor, pool, layers, seed):
                file.write(to_bfloat16(values).data)


def split_shards(tensors: list[Tensor], limit: int) -> list[list[Tensor]]:
    """Consecutive runs of tensors of at most `limit` bytes; a larger tensor gets a shard of its own."""
    shards: list[list[Tensor]] = [[]]
    used = 0
    for tensor in tensors:
        if shards[-1] and used + tensor.bytes > limit:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.bytes
    return shards


def write_checkpoint(out: Path, config: dict[str, Any], tensors: list[Tensor], seed: int, shard_size: int) -> None:
    layers = text_of(config)["num_hidden_layers"]
    pool = np.random.Generator(np.random.SFC64([seed])).standard_normal(POOL_ELEMENTS, dtype=np.float32)
    shards = split_shards(tensors, shard_size)
    if len(shards) == 1:
        write_weights(out / "model.safetensors", tensors, pool, layers, seed)
    else:
        weight_map = {}
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            write_weights(out / name, shard, pool, layers, seed)
            weight_map |= {tensor.name: name for tensor in shard}
        metadata = {"total_size": sum(tensor.bytes for tensor in tensors)}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def dense_config(shape: Shape) -> dict[str, Any]:
    """config.json in the style of the released models."""
    qwen3 = shape.model_type == "qwen3"
    only_qwen3 = {"attention_bias": False, "head_dim": shape.head_dim, "rope_scaling": None}
    values = {
        "architectures": ["Qwen3ForCausalLM" if qwen3 else "Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.max_positions,
        "max_window_layers": shape.layers,
        "model_type": shape.model_type,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": shape.rms_eps,
        "rope_theta": shape.rope_theta,
        "sliding_window": None if qwen3 else shape.max_positions,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": shape.vocab,
    }
    return dict(sorted((values | (only_qwen3 if qwen3 else {})).items()))


def adapted_config(config: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """The configuration of what is written: sizes replaced, parts that are left out taken out."""
    text = text_of(config)
    for option, key in OVERRIDES.items():
        value = getattr(arguments, option)
        if value is None:
            continue
        if key not in text:
            raise SystemExit(f"error: --{option.replace('_', '-')} does not apply: the model has no {key}")
        text[key] = value
    if arguments.tied is not None:
        config["tie_word_embeddings"] = arguments.tied
    if "max_window_layers" in text:
        text["max_window_layers"] = text["num_hidden_layers"]
    for key in ("bos_token_id", "eos_token_id"):
        if isinstance(text.get(key), int):
            text[key] = min(text[key], text["vocab_size"] - 1)
    if "num_experts" in text:
        text["num_experts_per_tok"] = min(text["num_experts_per_tok"], text["num_experts"])
    if text["model_type"] in HYBRID:
        text["layer_types"] = layer_types(text)
    if arguments.mtp:
        text["mtp_num_hidden_layers"] = 1
    elif "mtp_num_hidden_layers" in text:
        text["mtp_num_hidden_layers"] = 0
    if arguments.vision and "vision_config" not in config:
        raise SystemExit("error: --vision does not apply: the model has no vision_config")
    if not arguments.vision:
        for key in [key for key in config if key.startswith(("vision_", "image_", "video_"))]:
            del config[key]
    elif arguments.hidden is not None:
        config["vision_config"]["out_hidden_size"] = arguments.hidden
    return config


def check_config(config: dict[str, Any], mtp: bool) -> None:
    text = text_of(config)
    model_type = text.get("model_type")
    if model_type not in (*DENSE, *HYBRID, *MIXTURES):
        raise SystemExit(f"error: model_type {model_type!r} is none of {', '.join((*DENSE, *HYBRID, *MIXTURES))}")
    if text["num_attention_heads"] % text["num_key_value_heads"] or head_dim(text) % 2:
        raise SystemExit("error: --heads must be a multiple of --kv-heads and --head-dim must be even")
    if model_type == "qwen2" and text["num_attention_heads"] * head_dim(text) != text["hidden_size"]:
        raise SystemExit("error: a qwen2 shape needs heads * head_dim = hidden")
    if mtp and model_type not in HYBRID:
        raise SystemExit(f"error: --mtp does not apply: {model_type} has none")


def read_config(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.config is not None:
        path = arguments.config / "config.json" if arguments.config.is_dir() else arguments.config
        return json.loads(path.read_text())
    if arguments.shape in RELEASED:
        return json.loads((CONFIGS / RELEASED[arguments.shape] / "config.json").read_text())
    config = dense_config(SHAPES[arguments.shape])
    # Qwen2 derives it, and a replaced one has to be a key.
    if arguments.head_dim is not None:
        config["head_dim"] = arguments.head_dim
    return config


def tokenizer_files(source: Path) -> list[Path]:
    found = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not any(path.name in ("tokenizer.json", "vocab.json") for path in found):
        raise SystemExit(
            f"error: no tokenizer in {source}\nreason: expected tokenizer.json or vocab.json\n"
            "try: --tokenizer with the directory of a model"
        )
    return found


def write_ids(path: Path, vocab: int, samples: int, length: int, dtype: str, seed: int) -> None:
    """Token ids with probability proportional to 1 / (id + 2.7)^1.07: low ids are the frequent ones."""
    rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(b"input_ids")]))
    cumulative = np.cumsum((np.arange(vocab) + ZIPF_OFFSET) ** -ZIPF_EXPONENT)
    draws = rng.random((samples, length)) * cumulative[-1]
    ids = np.minimum(np.searchsorted(cumulative, draws, side="right"), vocab - 1)
    data = ids.astype("<i4" if dtype == "int32" else "<i8")
    with path.open("wb") as file:
        write_header(file, [("input_ids", "I32" if dtype == "int32" else "I64", data.shape, data.nbytes)])
        file.write(data.data)


def byte_size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text, re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"not a size: {text!r} (examples: 500MB, 1.5GiB)")
    number, prefix, binary = match.groups()
    size = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))
    if size == 0:
        raise argparse.ArgumentTypeError("the size must be above zero")
    return size


def positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be above zero: {text}")
    return value


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT_DIR", help="the checkpoint directory to make")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--shape", choices=[*SHAPES, *RELEASED], default="qwen3-0.6b", help="default: %(default)s")
    model.add_argument("--config", type=Path, metavar="PATH", help="another config.json, or its directory")
    for option, key in OVERRIDES.items():
        parser.add_argument("--" + option.replace("_", "-"), type=positive, help=f"replaces {key}")
    parser.add_argument("--tied", action=argparse.BooleanOptionalAction, help="replaces tie_word_embeddings")
    parser.add_argument("--vision", action="store_true", help="with the vision tower")
    parser.add_argument("--mtp", action="store_true", help="with the multi-token prediction head")
    parser.add_argument(
        "--shard-size", type=byte_size, default=SHARD_SIZE, metavar="SIZE", help="of a file; default: 5GB"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="copy the tokenizer's files from here")
    parser.add_argument("--ids-out", type=Path, metavar="FILE", help="write calibration tokens (.safetensors)")
    parser.add_argument("--samples", type=positive, default=64, help="of --ids-out; default: %(default)s")
    parser.add_argument("--length", type=positive, default=2048, help="of --ids-out; default: %(default)s")
    parser.add_argument("--ids-dtype", choices=("int32", "int64"), default="int32")
    arguments = parser.parse_args()
    if arguments.out is None and arguments.ids_out is None:
        parser.error("nothing to do: give OUT_DIR, --ids-out or both")
    if arguments.seed < 0:
        parser.error("--seed must not be negative")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    config = adapted_config(read_config(arguments), arguments)
    check_config(config, arguments.mtp)
    if arguments.out is not None:
        tokenizer = tokenizer_files(arguments.tokenizer) if arguments.tokenizer is not None else []
        tensors = model_tensors(config)
        size = sum(tensor.bytes for tensor in tensors)
        arguments.out.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(arguments.out).free < size:
            raise SystemExit(f"error: {arguments.out} has no room for {size / 1e9:.1f} GB\ntry: fewer --layers")
        write_checkpoint(arguments.out, config, tensors, arguments.seed, arguments.shard_size)
        for path in tokenizer:
            shutil.copyfile(path, arguments.out / path.name)
        print(f"{arguments.out}: {size / 2e6:.1f} M parameters, {size / 1e9:.2f} GB", file=sys.stderr)
    if arguments.ids_out is not None:
        vocab = text_of(config)["vocab_size"]
        write_ids(arguments.ids_out, vocab, arguments.samples, arguments.length, arguments.ids_dtype, arguments.seed)
        print(f"{arguments.ids_out}: {arguments.samples} x {arguments.length} ids", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
