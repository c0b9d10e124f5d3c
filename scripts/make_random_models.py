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
import sys
import zlib
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
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
    draft_layer: bool = False
    fused_draft_experts: bool = False  # the other form than the experts of the other layers


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
)


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
    config = transformers.AutoConfig.for_model(spec.model_type, **(COMMON | spec.config))
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomise(model, spec.dtype, torch.Generator().manual_seed(seed))
    model.config.dtype = spec.dtype
    model.save_pretrained(directory, max_shard_size=spec.max_shard_size)
    (directory / "generation_config.json").unlink(missing_ok=True)
    if spec.classic:
        use_classic_keys(directory / "config.json")

    ids = make_ids(seed, spec.lengths)
    logits = golden_logits(directory, ids)
    check_features_matter(spec, directory, ids, logits)
    golden = directory / "golden"
    golden.mkdir(exist_ok=True)
    (golden / "ids.json").write_text(json.dumps(ids) + "\n")
    safetensors.torch.save_file(logits, golden / "logits.safetensors")
    if spec.draft_layer:
        safetensors.torch.save_file(add_draft_layer(spec, directory, ids), golden / "mtp.safetensors")


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
    out: Path = parser.parse_args().out
    torch.set_num_threads(1)
    for spec in MODELS:
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
