#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes testdata/golden/billm/reference.safetensors: BiLLM as published, on one small matrix.

    scripts/make_billm_golden.py [-o FILE]

The algorithm of arXiv 2402.04291 as its authors' repository has it (Aaronhuang-778/BiLLM: bigptq.py,
binary.py, utils/structure.py, utils/autosearch.py), written again in numpy: saliency
w^2 / diag(U)^2, the number of salient columns and the threshold searched on the saliencies, plain
means, error feedback between blocks of 128 columns only.

    W         [rows, n]   weights
    H         [n, n]      second moments of the inputs
    plain     [rows, n]   binarised without error feedback
    fed       [rows, n]   with it
    salient   [blocks]    salient columns of each block, without error feedback

Needs numpy and safetensors. The same versions give the same bytes.
"""

import argparse
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
BLOCK = 128
MOST_SALIENT = 50  # exclusive, as in the published call
DAMPING = 0.01


def binarise(x, mask, order):
    """sum over `order` passes of mean + sign * mean |x - mean|, rows apart, inside the mask."""
    total = np.zeros_like(x)
    count = np.maximum(mask.sum(axis=1, keepdims=True), 1)
    for _ in range(order):
        residual = np.where(mask, x - total, 0.0)
        mean = residual.sum(axis=1, keepdims=True) / count
        centred = np.where(mask, residual - mean, 0.0)
        scale = np.abs(centred).sum(axis=1, keepdims=True) / count
        total = total + np.where(mask, np.sign(centred) * scale + mean, 0.0)
    return total


def search_structure(saliency):
    """Salient columns and the threshold of the rest, both judged on the saliencies."""
    ranked = np.argsort(-np.abs(saliency).sum(axis=0), kind="stable")
    best, count = np.inf, 0
    for k in range(1, min(MOST_SALIENT, saliency.shape[1])):
        mask = np.zeros(saliency.shape, dtype=bool)
        mask[:, ranked[:k]] = True
        error = np.mean((saliency - binarise(saliency, mask, 2) - binarise(saliency, ~mask, 2)) ** 2)
        if error < best:
            best, count = error, k
    salient = np.zeros(saliency.shape, dtype=bool)
    salient[:, ranked[:count]] = True
    twice = binarise(saliency, salient, 2)
    rest = np.abs(saliency * ~salient)
    best, threshold = np.inf, 0.0
    for candidate in np.quantile(rest, np.linspace(0.1, 0.9, 81)):
        high = (rest >= candidate) & ~salient
        low = (rest < candidate) & ~salient
        error = np.mean((saliency - twice - binarise(saliency, low, 1) - binarise(saliency, high, 1)) ** 2)
        if error < best:
            best, threshold = error, candidate
    return salient, threshold


def billm(weights, moments, feedback):
    n = weights.shape[1]
    damped = moments + DAMPING * np.mean(np.diag(moments)) * np.eye(n)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T  # inverse = upper^T upper
    w = weights.copy()
    q = np.zeros_like(w)
    counts = []
    for begin in range(0, n, BLOCK):
        end = min(begin + BLOCK, n)
        block = w[:, begin:end].copy()
        diagonal = np.diag(upper)[begin:end]
        saliency = block**2 / diagonal**2
        salient, threshold = search_structure(saliency)
        high = (np.abs(saliency * ~salient) >= threshold) & ~salient
        low = ~high & ~salient
        q[:, begin:end] = binarise(block, low, 1) + binarise(block, high, 1) + binarise(block, salient, 2)
        counts.append(int(salient[0].sum()))
        if feedback:
            errors = (block - q[:, begin:end]) / diagonal
            w[:, end:] -= errors @ upper[begin:end, end:]
    return q, counts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-o", default=str(ROOT / "testdata/golden/billm/reference.safetensors"))
    arguments = parser.parse_args()
    random = np.random.default_rng(7)
    rows, n, tokens = 24, 176, 1200
    mixing = random.normal(size=(n // 2, n)) / np.sqrt(n // 2)
    sizes = np.exp(0.8 * random.normal(size=n))
    inputs = sizes * (random.normal(size=(tokens, n // 2)) @ mixing + 0.4 * random.normal(size=(tokens, n)))
    weights = (0.02 * random.standard_t(8, size=(rows, n))).astype(np.float32).astype(np.float64)
    moments = (inputs.T @ inputs / tokens).astype(np.float32).astype(np.float64)
    plain, counts = billm(weights, moments, False)
    fed, _ = billm(weights, moments, True)
    for name, q in (("plain", plain), ("fed", fed)):
        error = weights - q
        print(name, np.sum((error @ moments) * error) / np.sum((weights @ moments) * weights), counts)
    Path(arguments.o).parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {
            "W": weights.astype(np.float32),
            "H": moments.astype(np.float32),
            "plain": plain.astype(np.float32),
            "fed": fed.astype(np.float32),
            "salient": np.array(counts, dtype=np.int64),
        },
        arguments.o,
    )


if __name__ == "__main__":
    main()
