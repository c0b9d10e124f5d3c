# SPDX-License-Identifier: Apache-2.0
"""What the quality benches share: a setting is quantized and compared with the original, once."""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile


def run(command: list[str]) -> dict:
    """The JSON that a verb prints."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout)


def linear_bits(made: dict) -> float:
    """Bits that the tensors of the quantized linears take per weight."""
    weights = sum(row["shape"][0] * row["shape"][1] for row in made["linears"])
    if made["format"].startswith("gguf"):  # the tokenizer is in the file too
        return 8 * sum(row["bytes"] for row in made["linears"]) / weights
    return 8 * (made["bytes"] - sum(row["bytes"] for row in made["kept"])) / weights


def peers_of(model: pathlib.Path, folder: pathlib.Path | None) -> list[dict]:
    """Other tools' figures on the same model, text and calibration tokens."""
    path = folder / f"{model.name}.json" if folder else model / "golden" / "peers.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def arguments_of(doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=pathlib.Path)
    parser.add_argument("--quern", default="build/release/quern")
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--peers", type=pathlib.Path, help="folder of NAME.json (default: MODEL/golden/peers.json)")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--samples", type=int, help="calibration sequences (default: all of the file)")
    parser.add_argument("--results", type=pathlib.Path, help="kept here, so that a run cut short goes on")
    return parser


class Bench:
    def __init__(self, arguments):
        self.arguments = arguments
        self.path = arguments.results
        self.known = json.loads(self.path.read_text()) if self.path and self.path.exists() else {}

    def measure(self, model: pathlib.Path, options: list[str]) -> dict:
        """Quantizes with `options` and evaluates against the original."""
        samples = ["--samples", str(self.arguments.samples)] if self.arguments.samples else []
        options = [*options, *samples]
        key = " ".join([model.name, *options, str(self.arguments.windows)])
        if key not in self.known:
            with tempfile.TemporaryDirectory() as folder:
                out = f"{folder}/out.gguf" if any(word.startswith("gguf") for word in options) else f"{folder}/out"
                made = run([self.arguments.quern, "quantize", str(model), "-o", out, *options,
                            "--calibration", self.arguments.calibration, "--json", "--quiet"])
                judged = run([self.arguments.quern, "eval", out, "--reference", str(model), "--perplexity",
                              self.arguments.text, "--windows", str(self.arguments.windows), "--json", "--quiet"])
            divergence = next(iter(judged["divergence"].values()))
            self.known[key] = {
                "bits": linear_bits(made), "model_bits": made["bits_per_weight"],
                "ppl": next(iter(judged["perplexity"].values()))["ppl"],
                "kl": divergence["kl_mean"], "kl_stderr": divergence["kl_stderr"],
                "top1": divergence["top1_agreement"], "seconds": made["seconds"],
                "cpu_seconds": made["cpu_seconds"], "peak_rss_bytes": made["peak_rss_bytes"],
                "exact": made["predicted"]["bytes"] == made["bytes"],
                "predicted": made["predicted"].get("kl"), "planning": made.get("planning")}
            if self.path:
                self.path.write_text(json.dumps(self.known, indent=1))
        return self.known[key]
