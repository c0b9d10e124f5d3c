#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make a random checkpoint with the exact shapes, names and file layout of a released Qwen model.

For speed and memory measurements at real size where the real weights are not at hand: the numbers mean
nothing, but every tensor has the real shape and dtype, activations stay of order one through all layers,
and the second moments that calibration sees are uneven, because norm gains, `v_proj` and `up_proj` rows
have a log-normal spread and each norm has a few outlier channels. Tensors are streamed to disk in chunks:
memory stays below about 250 MB whatever the model's size. The output depends only on the options and `--seed`.

Needs numpy only.

    scripts/make_synthetic_checkpoint.py OUT_DIR                               # Qwen3-0.6B
    scripts/make_synthetic_checkpoint.py OUT_DIR --layers 2 --seed 7           # two layers of it
    scripts/make_synthetic_checkpoint.py OUT_DIR --shape qwen3-1.7b --shard-size 1GB
    scripts/make_synthetic_checkpoint.py OUT_DIR --tokenizer DIR_WITH_TOKENIZER_JSON
    scripts/make_synthetic_checkpoint.py --ids-out calib.safetensors --samples 64 --length 2048

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

CHUNK_ELEMENTS = 1 << 22
LINEAR_STD_GAIN = 0.64  # times 1/sqrt(fan-in): 0.02 at the 1,024 inputs of Qwen3-0.6B
EMBEDDING_STD = 0.02
NORM_LOG_STD = 0.4
ROW_LOG_STD = 0.3
OUTLIERS_PER_NORM = 6
OUTLIER_FACTORS = (6.0, 16.0)
BIAS_STD = {"q_proj": 1.0, "k_proj": 2.0, "v_proj": 0.1}
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
    """The sizes of one dense Qwen decoder."""

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


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One BF16 tensor to be written: name, shape, and what its values are (see `tensor_chunks`)."""

    name: str
    shape: tuple[int, ...]
    kind: str  # "embedding", "linear", "spread_linear", "residual_linear", "norm", "bias"

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return 2 * self.elements


def model_tensors(shape: Shape) -> list[Tensor]:
    """Every tensor of the checkpoint, in the order of the files."""
    q_size, kv_size = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tensors = [Tensor("model.embed_tokens.weight", (shape.vocab, shape.hidden), "embedding")]
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        tensors += [
            Tensor(prefix + "input_layernorm.weight", (shape.hidden,), "norm"),
            Tensor(mlp + "down_proj.weight", (shape.hidden, shape.intermediate), "residual_linear"),
            Tensor(mlp + "gate_proj.weight", (shape.intermediate, shape.hidden), "linear"),
            Tensor(mlp + "up_proj.weight", (shape.intermediate, shape.hidden), "spread_linear"),
            Tensor(prefix + "post_attention_layernorm.weight", (shape.hidden,), "norm"),
            Tensor(attention + "k_proj.weight", (kv_size, shape.hidden), "linear"),
            Tensor(attention + "o_proj.weight", (shape.hidden, q_size), "residual_linear"),
            Tensor(attention + "q_proj.weight", (q_size, shape.hidden), "linear"),
            Tensor(attention + "v_proj.weight", (kv_size, shape.hidden), "spread_linear"),
        ]
        if shape.model_type == "qwen3":
            tensors += [Tensor(f"{attention}{n}_norm.weight", (shape.head_dim,), "norm") for n in "kq"]
        else:
            sizes = {"k_proj": kv_size, "q_proj": q_size, "v_proj": kv_size}
            tensors += [Tensor(f"{attention}{n}.bias", (size,), "bias") for n, size in sizes.items()]
    tensors.append(Tensor("model.norm.weight", (shape.hidden,), "norm"))
    if not shape.tied:
        tensors.append(Tensor("lm_head.weight", (shape.vocab, shape.hidden), "embedding"))
    return tensors


def norm_gains(count: int, rng: np.random.Generator) -> np.ndarray:
    """Log-normal gains with a few outlier channels, of root mean square one."""
    gains = np.exp(NORM_LOG_STD * rng.standard_normal(count))
    outliers = rng.choice(count, size=min(OUTLIERS_PER_NORM, count // 32), replace=False)
    gains[outliers] *= rng.uniform(*OUTLIER_FACTORS, size=outliers.size)
    return (gains / np.sqrt(np.mean(gains**2))).astype(np.float32)


def tensor_chunks(tensor: Tensor, layers: int, seed: int) -> Iterator[np.ndarray]:
    """The float32 values of a tensor, some rows at a time; they depend on the seed and the tensor alone."""
    rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(tensor.name.encode())]))
    if tensor.kind == "norm":
        yield norm_gains(tensor.elements, rng)
        return
    if tensor.kind == "bias":
        std = BIAS_STD[tensor.name.split(".")[-2]]
        yield std * rng.standard_normal(tensor.elements, dtype=np.float32)
        return
    rows, columns = tensor.shape
    std = EMBEDDING_STD if tensor.kind == "embedding" else LINEAR_STD_GAIN / math.sqrt(columns)
    if tensor.kind == "residual_linear":
        std /= math.sqrt(2 * layers)
    rows_per_chunk = max(1, CHUNK_ELEMENTS // columns)
    for first in range(0, rows, rows_per_chunk):
        count = min(rows_per_chunk, rows - first)
        values = rng.standard_normal((count, columns), dtype=np.float32)
        values *= np.float32(std)
        if tensor.kind == "spread_linear":
            values *= np.exp(ROW_LOG_STD * rng.standard_normal((count, 1), dtype=np.float32))
        yield values


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The BF16 bit patterns of finite float32 values, rounded to nearest even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


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


def write_weights(path: Path, tensors: list[Tensor], layers: int, seed: int) -> None:
    with path.open("wb") as file:
        write_header(file, [(t.name, "BF16", t.shape, t.bytes) for t in tensors])
        for tensor in tensors:
            for values in tensor_chunks(tensor, layers, seed):
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


def write_checkpoint(out: Path, shape: Shape, seed: int, shard_size: int | None) -> None:
    tensors = model_tensors(shape)
    shards = split_shards(tensors, shard_size) if shard_size else [tensors]
    if len(shards) == 1:
        write_weights(out / "model.safetensors", tensors, shape.layers, seed)
    else:
        weight_map = {}
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            write_weights(out / name, shard, shape.layers, seed)
            weight_map |= {tensor.name: name for tensor in shard}
        metadata = {"total_size": sum(tensor.bytes for tensor in tensors)}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (out / "config.json").write_text(json.dumps(config(shape), indent=2) + "\n")


def config(shape: Shape) -> dict[str, Any]:
    """config.json in the style of the released models."""
    qwen3 = shape.model_type == "qwen3"
    only_qwen3 = {"attention_bias": False, "head_dim": shape.head_dim, "rope_scaling": None}
    values = {
        "architectures": ["Qwen3ForCausalLM" if qwen3 else "Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": min(151643, shape.vocab - 1),
        "eos_token_id": min(151645, shape.vocab - 1),
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


def copy_tokenizer(source: Path, out: Path) -> None:
    found = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not any(path.name in ("tokenizer.json", "vocab.json") for path in found):
        raise SystemExit(
            f"error: no tokenizer in {source}\nreason: expected tokenizer.json or vocab.json\n"
            "try: --tokenizer with the directory of a model"
        )
    for path in found:
        shutil.copyfile(path, out / path.name)


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
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b", help="default: %(default)s")
    for field in ("hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "vocab"):
        parser.add_argument("--" + field.replace("_", "-"), type=positive, help="replaces the shape's own")
    parser.add_argument("--tied", action=argparse.BooleanOptionalAction, help="replaces the shape's own")
    parser.add_argument("--shard-size", type=byte_size, metavar="SIZE", help="e.g. 500MB; default: one file")
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
    shape = SHAPES[arguments.shape]
    overrides = {field.name: getattr(arguments, field.name, None) for field in dataclasses.fields(Shape)}
    shape = dataclasses.replace(shape, **{name: value for name, value in overrides.items() if value is not None})
    if shape.heads % shape.kv_heads or shape.head_dim % 2:
        raise SystemExit("error: --heads must be a multiple of --kv-heads and --head-dim must be even")
    if shape.model_type == "qwen2" and shape.heads * shape.head_dim != shape.hidden:
        raise SystemExit("error: a qwen2 shape needs heads * head_dim = hidden")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_checkpoint(arguments.out, shape, arguments.seed, arguments.shard_size)
        if arguments.tokenizer is not None:
            copy_tokenizer(arguments.tokenizer, arguments.out)
        parameters = sum(tensor.elements for tensor in model_tensors(shape))
        print(f"{arguments.out}: {parameters / 1e6:.1f} M parameters", file=sys.stderr)
    if arguments.ids_out is not None:
        write_ids(
            arguments.ids_out, shape.vocab, arguments.samples, arguments.length, arguments.ids_dtype, arguments.seed
        )
        print(f"{arguments.ids_out}: {arguments.samples} x {arguments.length} ids", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
