#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes testdata/golden/gguf/quantize_reference.safetensors: rows of weights, importances, and the
weighted errors that ggml's own quantizers reach on them.

    make_ggml_reference.py OUTPUT    needs numpy, safetensors, gguf and llama-cpp-python (its libggml)

x           F32 [kinds * 4, 512]  four rows each of: normal, Student t4, Laplace with a mean, columns of
            uneven scale, and three matrices of testdata/models
importance  F32 [kinds, 512]      log-normal
TYPE        F64 [kinds, 3]        sum over the four rows of w (x - q)^2 with
            0: w = ggml's weights made of the importance, 1: w = importance (both quantized with it),
            2: w = 1, quantized without importance
"""
import ctypes
import pathlib
import sys

import gguf
import llama_cpp
import numpy as np
from safetensors.numpy import save_file
from safetensors import safe_open

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIBRARY = pathlib.Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"
TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
ROWS, COLUMNS = 4, 512


def rows_of_model(model, name):
    with safe_open(ROOT / "testdata/models" / model / "model.safetensors", "pt") as file:
        return file.get_tensor(name).float().numpy()[17:17 + ROWS, :COLUMNS]


def kinds(random):
    yield random.normal(0, 0.02, (ROWS, COLUMNS))
    yield random.standard_t(4, (ROWS, COLUMNS)) * 0.02
    yield random.laplace(0.01, 0.02, (ROWS, COLUMNS))
    yield random.normal(0, 0.02, (ROWS, COLUMNS)) * np.exp(random.normal(0, 1, COLUMNS))
    for model in ("tiny-qwen3", "tiny-qwen2.5", "tiny-llama3"):
        yield rows_of_model(model, "model.layers.2.mlp.down_proj.weight")


def ggml_weights(name, x, importance):
    squares = x.astype(np.float64) ** 2
    if name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        sigma2 = squares.mean(1, keepdims=True)
    elif name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "IQ4_XS"):
        factor = 1 if name == "Q2_K" else 2
        sigma2 = factor * squares.reshape(len(x), -1, 256).mean(2).repeat(256, 1)
    elif name == "IQ4_NL":
        sigma2 = 2 * squares.reshape(len(x), -1, 32).mean(2).repeat(32, 1)
    else:
        return np.broadcast_to(importance, x.shape)
    return importance * np.sqrt(sigma2 + squares)


def quantized(library, name, x, importance):
    type_id = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[type_id]
    out = np.zeros((len(x), COLUMNS // block * size), np.uint8)
    pointer = None if importance is None else importance.ctypes.data
    library.ggml_quantize_chunk(int(type_id), x.ctypes.data, out.ctypes.data, 0, len(x), COLUMNS, pointer)
    return gguf.quants.dequantize(out, type_id).astype(np.float64)


def main(output):
    library = ctypes.CDLL(str(LIBRARY))
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    random = np.random.default_rng(7)
    xs = [np.ascontiguousarray(x, np.float32) for x in kinds(random)]
    importances = [np.exp(random.normal(0, 1.5, COLUMNS)).astype(np.float32) for _ in xs]
    tensors = {"x": np.concatenate(xs), "importance": np.stack(importances)}
    for name in TYPES:
        errors = []
        for x, importance in zip(xs, importances):
            difference = (quantized(library, name, x, importance) - x) ** 2
            plain = (quantized(library, name, x, None) - x) ** 2
            errors.append([(ggml_weights(name, x, importance) * difference).sum(),
                           (importance * difference).sum(), plain.sum()])
        tensors[name] = np.array(errors)
    save_file(tensors, output)


if __name__ == "__main__":
    main(sys.argv[1])
