#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Gradients of reference models, computed by torch's autograd, for the tests of quern's backward pass.

    scripts/make_gradient_golden.py testdata testdata/golden/gradients

reads the checkpoints of TESTDATA and writes OUT/<model>.safetensors, which holds

    ids                    int32 [sequences, length]
    loss                   float64 [1]: mean cross entropy of the next tokens, nats
    M.delta_square         float64 [out] of linear module M: sum over all tokens of (dloss/dy_i)^2
    M.input_square         float64 [in]: sum over all tokens of x_j^2
    M.bias                 float64 [out]: dloss/db, where M has a bias
    M.weight               float32 [out, in]: dloss/dW, of a few linears
    M.fisher               float32 [out, in]: sum over all tokens of (dloss/dy_i x_j)^2, of a few

The head is called lm_head, tied or not. Weights as they are stored, arithmetic in float64; but transformers
computes norms, softmax of attention and rotation angles in float32 whatever the model's type is. How far
the same pass in float32 is from the files is printed: that is what rounding alone does.

Needs torch, transformers and safetensors; the committed files were made with the versions that
testdata/README.md names.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import safetensors.torch
import torch
import transformers


@dataclasses.dataclass(frozen=True)
class Golden:
    """What to store of one model; without a text the ids are those of its golden/ids.json."""

    model: str
    text: bool
    sequences: int
    length: int
    weights: tuple[str, ...] = ()
    fishers: tuple[str, ...] = ()


GOLDEN = (
    Golden(
        "models/tiny-qwen2.5",
        text=True,
        sequences=2,
        length=64,
        weights=(
            "model.layers.0.self_attn.q_proj",
            "model.layers.2.self_attn.k_proj",
            "model.layers.3.mlp.down_proj",
        ),
        fishers=("model.layers.1.self_attn.v_proj",),
    ),
    Golden("models/tiny-qwen3", text=True, sequences=2, length=64),
    Golden("models/tiny-llama3", text=True, sequences=2, length=64),
    Golden("random-models/mistral-window", text=False, sequences=1, length=48),
    Golden("random-models/qwen2-yarn", text=False, sequences=1, length=48),
)


def token_ids(spec: Golden, testdata: Path) -> torch.Tensor:
    directory = testdata / spec.model
    if spec.text:
        text = (testdata / "text/wiki.test.raw").read_text(encoding="utf-8")[:20000]
        ids = transformers.AutoTokenizer.from_pretrained(directory)(text)["input_ids"]
    else:
        ids = json.loads((directory / "golden/ids.json").read_text())[0]
    return torch.tensor(ids[: spec.sequences * spec.length]).reshape(spec.sequences, spec.length)


def gradients(spec: Golden, directory: Path, ids: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Everything that is stored, in float64."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
    linears = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    inputs: dict[str, torch.Tensor] = {}
    deltas: dict[str, torch.Tensor] = {}

    def observe(name: str):
        def hook(_module, arguments, output):
            inputs[name] = arguments[0].detach().double().flatten(0, 1)
            output.register_hook(lambda delta: deltas.__setitem__(name, delta.double().flatten(0, 1)))

        return hook

    for name, module in linears.items():
        module.register_forward_hook(observe(name))
    logits = model(ids).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()

    stored = {"loss": loss.detach().double().reshape(1)}
    for name, module in linears.items():
        stored[f"{name}.delta_square"] = deltas[name].square().sum(0)
        stored[f"{name}.input_square"] = inputs[name].square().sum(0)
        if module.bias is not None:
            stored[f"{name}.bias"] = module.bias.grad.double()
    for name in spec.weights:
        stored[f"{name}.weight"] = linears[name].weight.grad.double()
    for name in spec.fishers:
        stored[f"{name}.fisher"] = deltas[name].square().T @ inputs[name].square()
    return stored


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Of the largest value of each tensor."""
    return max((((a[name] - b[name]).abs().max() / b[name].abs().max()).item(), name) for name in b)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("testdata", type=Path, metavar="TESTDATA")
    parser.add_argument("out", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for spec in GOLDEN:
        directory = arguments.testdata / spec.model
        ids = token_ids(spec, arguments.testdata)
        stored = gradients(spec, directory, ids, torch.float64)
        difference, where = largest_difference(gradients(spec, directory, ids, torch.float32), stored)
        print(f"{spec.model}: loss {stored['loss'].item():.6f}; float32 differs by {difference:.1e} in {where}")
        for name in stored:
            if name.endswith((".weight", ".fisher")):
                stored[name] = stored[name].float()
        stored["ids"] = ids.to(torch.int32)
        file = arguments.out / f"{directory.name}.safetensors"
        safetensors.torch.save_file({name: value.contiguous() for name, value in stored.items()}, file)
        print(f"{file}: {file.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
