#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Converts models of testdata/models with llama.cpp's own script and keeps what a test compares:

    make_gguf_reference.py LLAMA_CPP OUTPUT_DIRECTORY

LLAMA_CPP is a source tree of llama.cpp (vendor/llama.cpp of the llama-cpp-python source package). For
each model OUTPUT_DIRECTORY gets

    MODEL.gguf   the metadata of the converted file, byte for byte, with no tensors
    MODEL.json   its tensors in order: name, type, extents, values or SHA-256 of the bytes

The scripts tell split patterns apart by hashes of ids, which they do not have for these models: it is
named here.
"""
import hashlib
import json
import pathlib
import struct
import sys
import tempfile

MODELS = {"tiny-qwen3": "qwen2", "tiny-qwen2.5": "qwen2", "tiny-llama3": "qwen2"}
ROOT = pathlib.Path(__file__).resolve().parent.parent


def convert(llama_cpp, model, target):
    import conversion.base

    conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: MODELS[model]
    script = llama_cpp / "convert_hf_to_gguf.py"
    sys.argv = ["convert", str(ROOT / "testdata/models" / model), "--outfile", str(target), "--outtype", "bf16"]
    exec(compile(script.read_text(), str(script), "exec"), {"__name__": "__main__", "__file__": str(script)})


def content(tensor):
    """Few values as they are, many as a hash."""
    if tensor.n_elements <= 64:
        return {"values": [float(value) for value in tensor.data]}
    return {"sha256": hashlib.sha256(tensor.data.tobytes()).hexdigest()}


def main(llama_cpp, output):
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    import gguf

    for model in MODELS:
        with tempfile.TemporaryDirectory() as directory:
            path = pathlib.Path(directory) / "model.gguf"
            convert(llama_cpp, model, path)
            reader = gguf.GGUFReader(path)
            first_info = min(tensor.field.offset for tensor in reader.tensors)
            head = bytearray(path.read_bytes()[:first_info])
            struct.pack_into("<q", head, 8, 0)
            (output / f"{model}.gguf").write_bytes(head)
            tensors = [{"name": t.name, "type": t.tensor_type.name, "ne": [int(n) for n in t.shape],
                        **content(t)} for t in reader.tensors]
            (output / f"{model}.json").write_text(json.dumps(tensors, indent=1) + "\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2]).resolve())
