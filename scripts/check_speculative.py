#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Check that drafts change no token: greedy and sampled continuations with and without `--speculative mtp`.

Prompts are pieces of a text, evenly spread, 8 to 64 words long. Each is continued without drafts and with each
number of them; any difference is an error (exit 1). Prints for each number how many drafts were accepted, and how
many tokens the model gave each time that it ran.

    scripts/check_speculative.py --quern build/release/quern MODEL_DIR TEXT_FILE

Needs a model with a draft layer (Qwen3-Next, Qwen3.5 and later) and Python's standard library.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

MIN_WORDS = 8
MAX_WORDS = 64


def prompts_of(text: str, count: int) -> list[str]:
    """Pieces of whole words whose lengths go through all from MIN_WORDS to MAX_WORDS."""
    words = text.split()
    if len(words) < 2 * MAX_WORDS:
        raise SystemExit(f"error: the text has {len(words)} words, which is too few")
    step = (len(words) - MAX_WORDS) / count
    lengths = range(MIN_WORDS, MAX_WORDS + 1)
    starts = [int(i * step) for i in range(count)]
    return [" ".join(words[at : at + lengths[i % len(lengths)]]) for i, at in enumerate(starts)]


def generate(arguments: argparse.Namespace, prompt: str, *more: str) -> dict[str, Any]:
    command = [arguments.quern, "generate", arguments.model, "--prompt", prompt, "--json", "--quiet"]
    command += ["--max-tokens", str(arguments.max_tokens), "--temperature", str(arguments.temperature), *more]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise SystemExit(f"error: quern generate ended with {run.returncode}\n{run.stderr}")
    return json.loads(run.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL_DIR")
    parser.add_argument("text", type=Path, metavar="TEXT_FILE")
    parser.add_argument("--quern", default="build/release/quern", metavar="PROGRAM")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--drafts", default="1,2,3,4", help="numbers of drafts at a time (default: %(default)s)")
    arguments = parser.parse_args()

    prompts = prompts_of(arguments.text.read_text(encoding="utf-8"), arguments.prompts)
    plain = [generate(arguments, prompt) for prompt in prompts]
    tokens = sum(len(result["ids"]) for result in plain)
    print(f"{len(prompts)} prompts, {tokens} tokens, temperature {arguments.temperature}")
    differing = 0
    for drafts in arguments.drafts.split(","):
        drafted = accepted = same = steps = 0
        for prompt, expected in zip(prompts, plain):
            found = generate(arguments, prompt, "--speculative", "mtp", "--draft-tokens", drafts)
            same += all(found[key] == expected[key] for key in ("prompt_ids", "ids", "text", "finish_reason"))
            drafted += found["drafted_tokens"]
            accepted += found["accepted_draft_tokens"]
            steps += len(found["ids"]) - found["accepted_draft_tokens"]
        differing += len(prompts) - same
        print(
            f"{drafts} drafts: {same} of {len(prompts)} identical, {accepted} of {drafted} drafts accepted "
            f"({accepted / max(drafted, 1):.1%}), {tokens / max(steps, 1):.2f} tokens a run of the model"
        )
    if differing:
        print(f"error: {differing} continuations differ", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
