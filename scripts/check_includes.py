#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Holds the #include lines of src/ to the dependency table: dependencies point down only.

    check_includes.py [SOURCE_DIRECTORY]   default: src/ beside this script's folder
    check_includes.py --self-test          proves that forged offenders are found

Exit codes: 0 clean, 1 offenders (one per line, file:line: reason), 2 usage.
"""

import pathlib
import re
import sys
import tempfile

# A folder may include itself, its entries here, and what those may include.
MAY_INCLUDE = {
    "base": [],
    "tensor": ["base"],
    "kernels": ["base"],
    "image": ["base"],
    "tokenizer": ["base"],
    "quant": ["tensor", "kernels"],
    "format": ["model", "quant", "tensor", "tokenizer"],
    "model": ["tensor", "quant"],
    "report": ["base", "tensor", "quant", "model"],
    "nn": ["model", "quant", "kernels", "image"],
    "calib": ["nn", "tokenizer"],
    "eval": ["nn", "tokenizer"],
    "serve": ["nn", "tokenizer"],
    "plan": ["model", "quant"],
    "pipeline": ["calib", "eval", "plan", "quant", "format", "report"],
}
MAY_INCLUDE["cli"] = list(MAY_INCLUDE)

# Folders that are no part of src/: public and generated headers.
PUBLIC = {"quern"}

# Files built for one instruction set: what they may include at all, system headers too, so that no
# inline function of a library is compiled for that set (scripts/check_leaked_symbols.sh).
WIDE_FILES = re.compile(r"kernels/(avx[^/]*/.*|(simd|quant)_body\.inl)$")
WIDE_MAY_INCLUDE = {
    "kernels/kernel_ops.h",
    "kernels/model_ops.def",
    "kernels/quant_ops.def",
    "kernels/ops.def",
    "kernels/simd_body.inl",
    "kernels/quant_body.inl",
    "kernels/quant_columns.h",
    "immintrin.h",
    "stdint.h",
}

INCLUDE = re.compile(r'^\s*#\s*include\s*(?P<open>["<])(?P<path>[^">]+)[">]')
SUFFIXES = {".h", ".cpp", ".inl", ".def", ".cu", ".cuh"}


def reachable(folder):
    """The folders that `folder` may include, itself among them."""
    found = set()
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting.extend(MAY_INCLUDE[current])
    return found


def reason_against(file, opening, included):
    """Why `file` (relative to src/) must not include `included`; None when it may."""
    if WIDE_FILES.search(file) and included not in WIDE_MAY_INCLUDE:
        return f"a file built for one instruction set may not include {included}"
    if opening == "<" or "/" not in included:
        return None
    folder = file.split("/")[0]
    target = included.split("/")[0]
    if folder not in MAY_INCLUDE:
        return f"folder {folder} is not in the dependency table"
    if target in PUBLIC:
        return None
    if target not in MAY_INCLUDE:
        return f"folder {target} is not in the dependency table"
    if target not in reachable(folder):
        return f"{folder} may not include {target}"
    return None


def offenders(source):
    """Yields "file:line: reason" for every line of `source` that breaks the table."""
    for path in sorted(source.rglob("*")):
        if path.suffix not in SUFFIXES or not path.is_file():
            continue
        file = path.relative_to(source).as_posix()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            match = INCLUDE.match(line)
            if match:
                reason = reason_against(file, match["open"], match["path"])
                if reason:
                    yield f"{source.name}/{file}:{number}: {reason}"


FORGED = {
    # file: (content, offending lines)
    "base/error.h": ('#include <string>\n#include "base/json.h"\n', []),
    "base/up.h": ('#pragma once\n#include "tensor/tensor.h"\n', [2]),
    "tensor/checkpoint.h": ('#include "quant/packed_linear.h"\n', [1]),
    "kernels/kernels.cpp": ('#include "base/cpu.h"\n  #  include "tensor/tensor.h"\n', [2]),
    "kernels/avx2/avx2.cpp": (
        '#include "kernels/kernel_ops.h"\n#include <immintrin.h>\n#include <vector>\n'
        '#include "base/half.h"\n', [3, 4]),
    "quant/gptq.cpp": ('#include "base/error.h"\n#include "model/graph.h"\n', [2]),
    "model/graph.h": ('#include "quant/scheme.h"\n#include "format/gptq.h"\n', [2]),
    "nn/block.cpp": ('#include "tensor/tensor.h"\n#include "calib/capture.h"\n', [2]),
    "pipeline/job.cpp": ('#include "nn/block.h"\n#include "format/f.h"\n#include "cli/a.h"\n', [3]),
    "cli/main.cpp": ('#include "pipeline/job.h"\n#include "serve/http.h"\n'
                     '#include "quern/version.h"\n', []),
    "serve/engine.cpp": ('// #include "pipeline/job.h"\n#include "../pipeline/job.h"\n', [2]),
    "novel/thing.cpp": ('#include "base/error.h"\n', [1]),
}


def self_test():
    with tempfile.TemporaryDirectory() as directory:
        source = pathlib.Path(directory) / "src"
        expected = []
        for file, (content, lines) in FORGED.items():
            path = source / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
            expected += [f"src/{file}:{line}" for line in lines]
        found = [":".join(text.split(":")[:2]) for text in offenders(source)]
    if sorted(found) != sorted(expected):
        print(f"self-test failed\n  expected {sorted(expected)}\n  found    {sorted(found)}",
              file=sys.stderr)
        return 1
    print(f"self-test: {len(expected)} forged offenders found, nothing else")
    return 0


def main(arguments):
    if arguments == ["--self-test"]:
        return self_test()
    source = pathlib.Path(__file__).resolve().parent.parent / "src"
    if arguments:
        source = pathlib.Path(arguments[0])
    if len(arguments) > 1 or not source.is_dir():
        print(__doc__, file=sys.stderr)
        return 2
    found = list(offenders(source))
    for text in found:
        print(text)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
