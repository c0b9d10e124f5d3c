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
    golden/mtp.safetensors      of models with a draft layer: draft_logits.i float32 [length - 1, vocab], row t of
                                tokens 0 to t + 1 for token t + 2; chained_logits.i float32 [4, vocab], where each
                                row takes the likeliest token of the one before (the first: the last of
                                draft_logits.i) and its row in the place of a hidden state

The model with a vision tower has images/ of every form that is decoded, and besides

    golden/images.json          the images of each list of ids, in which one image token stands for an image
    golden/vision.safetensors   pixel_values.i and image_features.i of list i; rgb.NAME, an image as Pillow decodes it,
                                and scaled.NAME, as transformers' image processor scales it with torchvision

Needs torch, transformers, safetensors and Pillow; the committed files were made with the versions that
transformers loads no draft layers of these families, but has a generic one (MtpLayer), which is run here with the
family's own decoder layer. Needs torch, transformers and safetensors; the committed files were made with the versions that
testdata/random-models/README.md names. Runs in seconds:

    scripts/make_random_models.py testdata/random-models
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import random
import struct
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import safetensors.torch
import torch
import transformers
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.modeling_layers import MtpLayer

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


# As in configurations of Qwen3.5; those of Qwen3-Next do not mention the draft layer.
MTP = {"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False}
CHAINED_DRAFTS = 4

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
    vision: dict[str, Any] | None = None
    draft_layer: bool = False
    fused_draft_experts: bool = False  # the other form than the experts of the other layers
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
        draft_layer=True,
        fused_draft_experts=True,
    ),
    Model(
        "qwen3.5",
        "qwen3_5_text",
        torch.bfloat16,
        HYBRID | MTP | {"intermediate_size": 96, "tie_word_embeddings": True},
        classic=False,
        lengths=CHUNKS,
        draft_layer=True,
    ),
    Model(
        "qwen3.5-moe",
        "qwen3_5_moe_text",
        torch.bfloat16,
        HYBRID
        | MTP
        | {
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": False,
        },
        classic=False,
        lengths=CHUNKS,
        draft_layer=True,
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
    Model(
        "qwen3.5-vision",
        "qwen3_5",
        torch.bfloat16,
        HYBRID
        | {
            "intermediate_size": 96,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_interleaved": True,
                "mrope_section": [4, 2, 2],  # 8 pairs turn by t h w t h w t t
            },
        },
        classic=False,
        vision={
            "depth": 2,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_heads": 4,
            "num_position_embeddings": 25,
            "out_hidden_size": 64,
            "patch_size": 8,
        },
    ),
)

IMAGE_TOKEN, START_TOKEN, END_TOKEN = 300, 301, 302
# As preprocessor_config.json; small, so that the golden files are.
PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "size": {"shortest_edge": 1024, "longest_edge": 4096},
    "patch_size": 8,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.45, 0.4],
    "image_std": [0.5, 0.25, 0.3],
}
# Of each list of ids: numbers are lengths of text, names are images.
IMAGE_ROWS = (
    (5, "rgb.png", 4, "progressive.jpg", 9),
    ("lossy.webp", 6),
    (11,),
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
        elif "embed_tokens" not in name and "pos_embed" not in name:
            gain = 2.0 if "q_proj" in name or "k_proj" in name or ".qkv." in name else 1.0
            values *= gain / math.sqrt(parameter.numel() / parameter.shape[0])
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


def write_png(path: Path, pixels: np.ndarray, color_type: int, *, interlaced: bool = False) -> None:
    """A PNG of forms that Pillow does not write: 16 bits a channel, Adam7. `pixels` [height, width, channels]."""
    height, width, _ = pixels.shape
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    big_endian = pixels.astype(pixels.dtype.newbyteorder(">"))
    rows = b""
    for top, left, down, right in passes:
        part = big_endian[top::down, left::right]
        rows += b"".join(b"\0" + row.tobytes() for row in part if row.size > 0)
    header = struct.pack(">IIBBBBB", width, height, pixels.dtype.itemsize * 8, color_type, 0, 0, int(interlaced))
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")):
            file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))


def scene(seed: int, width: int, height: int, channels: int) -> np.ndarray:
    """Smooth waves and some noise, [height, width, channels] from 0 to 1."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = [np.sin(rng.uniform(3, 25) * x + rng.uniform(3, 25) * y + rng.uniform(0, 6)) for _ in range(channels)]
    values = 0.5 + 0.45 * np.stack(waves, axis=-1) + rng.normal(0, 0.05, (height, width, channels))
    return np.clip(values, 0, 1)


def make_images(directory: Path) -> None:
    """Images of every form, of sizes that are scaled up, down, or that leave a side as it is."""

    def pixels(seed: int, width: int, height: int, channels: int) -> np.ndarray:
        return np.round(scene(seed, width, height, channels) * 255).astype(np.uint8)

    def picture(*arguments: int) -> PIL.Image.Image:
        values = pixels(*arguments)
        return PIL.Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values)

    def deep(*arguments: int) -> np.ndarray:
        return np.round(scene(*arguments) * 65535).astype(np.uint16)

    picture(1, 90, 53, 3).save(directory / "rgb.png")
    picture(2, 37, 50, 1).save(directory / "grey.png")
    picture(3, 19, 19, 1).convert("1").save(directory / "bits.png")
    picture(4, 40, 30, 3).quantize(13).save(directory / "palette.png", transparency=2)
    picture(5, 31, 64, 4).save(directory / "rgba.png")
    picture(6, 30, 20, 2).save(directory / "grey-alpha.png")
    write_png(directory / "rgb16.png", deep(7, 23, 17, 3), 2)
    write_png(directory / "grey16.png", (deep(8, 25, 18, 1) // 150).astype(np.uint16), 0)  # Pillow clips at 255
    write_png(directory / "interlaced.png", pixels(9, 29, 21, 3), 2, interlaced=True)
    picture(10, 100, 20, 3).save(directory / "420.jpg", quality=90)
    picture(11, 48, 77, 3).save(directory / "progressive.jpg", quality=80, progressive=True, subsampling=1)
    picture(12, 26, 26, 1).save(directory / "grey.jpg")
    picture(13, 27, 22, 4).convert("RGBA").convert("CMYK").save(directory / "cmyk.jpg", quality=95)
    for orientation in range(2, 9):
        exif = PIL.Image.Exif()
        exif[0x112] = orientation
        extension = {2: "png", 3: "webp"}.get(orientation, "jpg")
        picture(20 + orientation, 17, 10, 3).save(directory / f"turned{orientation}.{extension}", exif=exif)
    picture(30, 70, 33, 3).save(directory / "lossy.webp", quality=70)
    picture(31, 24, 24, 4).save(directory / "lossless-alpha.webp", lossless=True)
    picture(32, 32, 16, 4).save(directory / "lossy-alpha.webp", quality=60)
    picture(33, 48, 48, 3).save(directory / "whole.png")


def decoded(path: Path) -> torch.Tensor:
    """[height, width, 3] as transformers' load_image gives it."""
    image = PIL.ImageOps.exif_transpose(PIL.Image.open(path)).convert("RGB")
    return torch.from_numpy(np.array(image))


def scaled(rgb: torch.Tensor) -> torch.Tensor:
    """[3, height, width] as torchvision's resize, which needs no more than this for bytes on a CPU, gives it."""
    factor = PROCESSOR["patch_size"] * PROCESSOR["merge_size"]
    size = PROCESSOR["size"]
    height, width = smart_resize(*rgb.shape[:2], factor, size["shortest_edge"], size["longest_edge"])
    pixels = rgb.permute(2, 0, 1).contiguous()[None]
    return torch.nn.functional.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)[0]


def patches(pixels: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Pixel values and grid, as Qwen2VLImageProcessor makes them."""
    side, merge = PROCESSOR["patch_size"], PROCESSOR["merge_size"]
    mean, std = (torch.tensor(PROCESSOR[key]) * 255.0 for key in ("image_mean", "image_std"))
    values = (pixels.float() - mean[:, None, None]) / std[:, None, None]
    rows, columns = values.shape[1] // side, values.shape[2] // side
    values = values.reshape(3, rows // merge, merge, side, columns // merge, merge, side).permute(1, 4, 2, 5, 0, 3, 6)
    values = values.unsqueeze(5).expand(-1, -1, -1, -1, -1, PROCESSOR["temporal_patch_size"], -1, -1)
    return values.reshape(rows * columns, -1), [1, rows, columns]


@torch.no_grad()
def vision_golden(spec: Model, directory: Path) -> None:
    """Images, their decoded and scaled forms, and the logits of IMAGE_ROWS."""
    images = directory / "images"
    images.mkdir(exist_ok=True)
    make_images(images)
    (directory / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2) + "\n")
    tensors = {}
    for path in sorted(images.iterdir()):
        rgb = decoded(path)
        tensors[f"rgb.{path.name}"] = rgb
        tensors[f"scaled.{path.name}"] = scaled(rgb).permute(1, 2, 0).contiguous()
    # In float32 the reference's own error reaches 7e-5 of the largest logit.
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float64, attn_implementation="eager"
    )
    rng = random.Random(zlib.crc32(spec.name.encode()))
    ids, names, logits = [], [], {}
    for i, row in enumerate(IMAGE_ROWS):
        ids.append([])
        names.append([f"images/{part}" for part in row if isinstance(part, str)])
        expanded, inputs = [], [patches(scaled(decoded(directory / name))) for name in names[-1]]
        counts = iter(grid[1] * grid[2] // PROCESSOR["merge_size"] ** 2 for _, grid in inputs)
        for part in row:
            if isinstance(part, str):
                ids[-1] += [START_TOKEN, IMAGE_TOKEN, END_TOKEN]
                expanded += [START_TOKEN] + [IMAGE_TOKEN] * next(counts) + [END_TOKEN]
            else:
                text = [rng.randrange(IMAGE_TOKEN) for _ in range(part)]
                ids[-1] += text
                expanded += text
        given: dict[str, torch.Tensor] = {}
        if inputs:
            given["pixel_values"] = torch.cat([values for values, _ in inputs]).double()
            given["image_grid_thw"] = torch.tensor([grid for _, grid in inputs])
            given["mm_token_type_ids"] = torch.tensor([[int(token == IMAGE_TOKEN) for token in expanded]])
            tensors[f"pixel_values.{i}"] = given["pixel_values"].float()
            features = model.model.get_image_features(given["pixel_values"], given["image_grid_thw"]).pooler_output
            tensors[f"image_features.{i}"] = torch.cat(tuple(features)).float().contiguous()
        logits[f"logits.{i}"] = model(torch.tensor([expanded]), **given).logits[0].float().contiguous()
        if inputs:
            plain = torch.arange(len(expanded)).expand(3, 1, -1)
            other = {
                "M-RoPE": model(torch.tensor([expanded]), **given, position_ids=plain).logits[0],
                "images": model(torch.tensor([expanded])).logits[0],
            }
            for feature, values in other.items():
                require_change(f"{spec.name} list {i}", feature, values, logits[f"logits.{i}"])
    golden = directory / "golden"
    golden.mkdir(exist_ok=True)
    (golden / "ids.json").write_text(json.dumps(ids) + "\n")
    (golden / "images.json").write_text(json.dumps(names) + "\n")
    safetensors.torch.save_file(logits, golden / "logits.safetensors")
    safetensors.torch.save_file(tensors, golden / "vision.safetensors")


def make_config(spec: Model) -> transformers.PretrainedConfig:
    if spec.vision is None:
        return transformers.AutoConfig.for_model(spec.model_type, **(COMMON | spec.config))
    return transformers.AutoConfig.for_model(
        spec.model_type,
        text_config=COMMON | spec.config,
        vision_config=spec.vision,
        image_token_id=IMAGE_TOKEN,
        vision_start_token_id=START_TOKEN,
        vision_end_token_id=END_TOKEN,
        video_token_id=END_TOKEN + 1,
        tie_word_embeddings=spec.config["tie_word_embeddings"],
    )
class DraftLayer:
    """The draft layer of a model: transformers' own, with the names that released checkpoints have."""

    NAMES = {
        "enorm": "pre_fc_norm_embedding",
        "hnorm": "pre_fc_norm_hidden",
        "eh_proj": "fc",
        "mtp_block": "layers.0",
        "post_norm": "norm",
    }

    def __init__(self, model: torch.nn.Module) -> None:
        config = copy.deepcopy(model.config)
        config.layer_types = ["full_attention"]
        config.mlp_only_layers = []
        config._attn_implementation = "eager"
        decoder = model.get_decoder()
        self.model = model
        self.layer = MtpLayer(config, type(decoder.layers[-1]), type(decoder.norm), 0)

    def tensors(self, fused_experts: bool) -> dict[str, torch.Tensor]:
        """The weights as a checkpoint stores them."""
        out: dict[str, torch.Tensor] = {}
        for name, values in self.layer.state_dict().items():
            part, rest = name.split(".", 1)
            name = f"mtp.{self.NAMES[part]}.{rest}"
            if ".experts." not in name or fused_experts:
                out[name] = values
                continue
            base, kind = name.rsplit(".", 1)
            kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
            for expert, matrices in enumerate(values):
                for kind, matrix in zip(kinds, matrices.chunk(len(kinds))):
                    out[f"{base}.{expert}.{kind}.weight"] = matrix.contiguous()
        return out

    @torch.no_grad()
    def rows(self, hidden: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        """Normed rows of the slots of `hidden` [1, n, width], whose tokens are followed by `following` [1, n]."""
        count = following.shape[1]
        positions = torch.arange(count)[None]
        decoder = self.model.get_decoder()
        return self.layer(
            decoder.embed_tokens(following),
            hidden,
            position_embeddings=decoder.rotary_emb(hidden, positions),
            attention_mask=torch.full((count, count), -math.inf).triu(1)[None, None],
            position_ids=positions,
            past_key_values=None,
        )

    @torch.no_grad()
    def golden(self, ids: list[list[int]]) -> dict[str, torch.Tensor]:
        """Draft logits, and those of drafts after drafts."""
        out: dict[str, torch.Tensor] = {}
        for i, text in enumerate(ids):
            if len(text) < 2:
                continue
            tokens = torch.tensor([text])
            hidden = self.model.get_decoder()(tokens).last_hidden_state[:, :-1]
            following = tokens[:, 1:]
            rows = self.rows(hidden, following)
            out[f"draft_logits.{i}"] = self.model.lm_head(rows)[0].contiguous()
            chained = [out[f"draft_logits.{i}"][-1]]
            for _ in range(CHAINED_DRAFTS):
                best = torch.topk(chained[-1], 2)
                if best.values[0] - best.values[1] < 1e-2:
                    raise SystemExit("error: two drafts are about as likely: take another seed")
                hidden = torch.cat([hidden, rows[:, -1:]], 1)
                following = torch.cat([following, best.indices[None, :1]], 1)
                rows = self.rows(hidden, following)
                chained.append(self.model.lm_head(rows)[0, -1])
            out[f"chained_logits.{i}"] = torch.stack(chained[1:])
        return out


def add_draft_layer(spec: Model, directory: Path, ids: list[list[int]]) -> dict[str, torch.Tensor]:
    """Add a random draft layer to the stored model; its golden logits."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    draft = DraftLayer(model)
    randomise(draft.layer, spec.dtype, torch.Generator().manual_seed(zlib.crc32(spec.name.encode()) + 1))
    path = directory / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors |= draft.tensors(spec.fused_draft_experts)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    draft.layer.float()
    return draft.golden(ids)


def make_model(spec: Model, directory: Path) -> None:
    seed = zlib.crc32(spec.name.encode())
    config = make_config(spec)
    auto_class = transformers.AutoModelForCausalLM if spec.vision is None else transformers.AutoModelForImageTextToText
    model = auto_class.from_config(config)
    randomise(model, spec.dtype, torch.Generator().manual_seed(seed))
    model.config.dtype = spec.dtype
    model.save_pretrained(directory, max_shard_size=spec.max_shard_size)
    (directory / "generation_config.json").unlink(missing_ok=True)
    if spec.classic:
        use_classic_keys(directory / "config.json")
    if spec.fp8:
        use_fp8(directory)

    if spec.vision is not None:
        vision_golden(spec, directory)
        return
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
    if spec.draft_layer:
        safetensors.torch.save_file(add_draft_layer(spec, directory, ids), golden / "mtp.safetensors")


def require_change(name: str, feature: str, other: torch.Tensor, logits: torch.Tensor) -> None:
    change = (other - logits).abs().max() / logits.abs().max()
    print(f"{name}: without its {feature} the logits change by {change:.2f} of the largest")
    if change < 0.05:
        raise SystemExit(f"error: {name}: {feature} hardly changes the logits")


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
        require_change(spec.name, feature, other["logits.0"], logits["logits.0"])


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
