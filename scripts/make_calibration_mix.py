#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Builds data/calibration/default.jsonl, the calibration mix that is bundled with quern.

    scripts/make_calibration_mix.py DATA [-o FILE] [--seed N] [--sources COMMIT]

DATA is a folder with text/wikipedia/wikipedia_sample.txt, text/udhr/*.txt, text/wikitext-2-raw/*.raw
and tasks/. The hand-written parts lie in data/calibration/parts, quern's own sources come from
COMMIT of this repository, and the Python files from the standard library of the interpreter that
runs this script. The same inputs and seed give the same bytes.

No document may share 50 consecutive letters and digits with an evaluation text; such documents
are left out and named. What was compared, and the result, is printed at the end.
"""

import argparse
import collections
import csv
import hashlib
import json
import platform
import random
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ROOT / "data" / "calibration" / "parts"

SHORTEST = 500  # characters of a document
LONGEST = 4000
SHINGLE = 50  # letters and digits that a document and an evaluation text may not share

WIKIPEDIA_BYTES = 125_000
UDHR_CHARACTERS = {"cmn_hans": 1500, "cmn_hant": 800, "jpn": 1500, "kor": 1500}
UDHR_DEFAULT_CHARACTERS = 1100
QUERN_BYTES = 42_000
PYTHON_BYTES = 30_000

# Files of the standard library without a notice of another licence or author inside.
PYTHON_FILES = ["bisect.py", "heapq.py", "fractions.py", "graphlib.py", "json/encoder.py",
                "statistics.py", "queue.py", "contextlib.py"]

Document = collections.namedtuple("Document", "part body")  # body: what becomes the JSON line


def text_document(part, text, source, licence):
    return Document(part, {"text": text, "source": source, "licence": licence})


def cut(text, longest=LONGEST, shortest=SHORTEST):
    """Pieces of `text` of at most `longest` characters that end at line ends."""
    pieces, piece = [], ""
    for line in text.splitlines(keepends=True):
        if piece and len(piece) + len(line) > longest:
            pieces.append(piece)
            piece = ""
        piece += line
    pieces.append(piece)
    return [p.strip("\n") for p in pieces if shortest <= len(p.strip()) <= longest]


def wikipedia(data, rng):
    """Articles of prose, whole or their beginning, in a seeded order."""
    raw = (data / "text/wikipedia/wikipedia_sample.txt").read_text(encoding="utf-8")
    pattern = r'<doc id="(\d+)" url="[^"]*" title="([^"]*)">\n(.*?)</doc>'
    articles = re.findall(pattern, raw, re.DOTALL)
    rng.shuffle(articles)
    for number, title, text in articles:
        text = re.sub(r"\n{3,}", "\n\n", text.strip())
        body = [line for line in text.split("\n")[1:] if line]
        # Lists and tables that lost their markup make poor prose: most lines must be sentences.
        prose = sum(len(line) for line in body if len(line) > 120)
        if title.startswith("List of") or len(text) < SHORTEST or prose < 0.8 * len(text):
            continue
        pieces = cut(text)
        if pieces:
            source = f"English Wikipedia, \"{title}\", https://en.wikipedia.org/wiki?curid={number}"
            yield text_document("wikipedia", pieces[0], source, "CC BY-SA 3.0")


def udhr(data):
    """One passage in every language, from the articles rather than from the shared preamble."""
    for path in sorted((data / "text/udhr").glob("*.txt")):
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        lines = [line for line in lines if line]
        wanted = UDHR_CHARACTERS.get(path.stem, UDHR_DEFAULT_CHARACTERS)
        passage = []
        for line in lines[len(lines) // 4 :]:
            passage.append(line)
            if sum(map(len, passage)) >= wanted:
                break
        source = f"Universal Declaration of Human Rights ({path.stem}), UDHR in Unicode"
        yield text_document("udhr", "\n".join(passage), source, "public domain (United Nations)")


def quern_sources(commit, rng):
    def git(*arguments):
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    names = [n for n in git("ls-tree", "-r", "--name-only", commit, "src", "tests").splitlines()
             if n.endswith((".h", ".cpp"))]
    rng.shuffle(names)
    for name in names:
        for piece in cut(git("show", f"{commit}:{name}"))[:2]:
            yield text_document("quern", piece, f"quern, {name} at {commit}", "Apache-2.0")


def python_sources():
    folder = Path(sysconfig.get_path("stdlib"))
    version = platform.python_version()
    for name in PYTHON_FILES:
        text = (folder / name).read_text(encoding="utf-8")
        for piece in cut(text)[:1]:
            source = f"CPython {version}, Lib/{name}, (c) Python Software Foundation"
            yield text_document("python", piece, source, "PSF-2.0")


def snippets():
    for path in sorted((PARTS / "snippets").iterdir()):
        for piece in cut(path.read_text(encoding="utf-8")):
            source = f"written for quern, parts/snippets/{path.name}"
            yield text_document("snippets", piece, source, "Apache-2.0")


def dialogues():
    for path in sorted(PARTS.glob("dialogues-*.txt")):
        name, messages = None, []
        for line in path.read_text(encoding="utf-8").splitlines() + ["=== "]:
            if line.startswith("=== "):
                if messages:
                    for message in messages:
                        message["content"] = message["content"].strip("\n")
                    yield Document("dialogues", {
                        "messages": messages,
                        "source": f"written for quern, {name}",
                        "licence": "Apache-2.0",
                    })
                name, messages = line[4:], []
            elif line in ("@system", "@user", "@assistant", "@tool"):
                messages.append({"role": line[1:], "content": ""})
            else:
                messages[-1]["content"] += line + "\n"


def first_bytes(documents, limit):
    """The leading documents that fit into `limit` bytes."""
    used = 0
    for document in documents:
        size = len(document.body["text"].encode())
        if used + size > limit:
            continue
        used += size
        yield document


def content(document):
    if "text" in document.body:
        return document.body["text"]
    return "\n".join(message["content"] for message in document.body["messages"])


def squeeze(text):
    """Letters and digits only, folded: wikitext's " @-@ " and other spacing must not hide a copy."""
    return re.sub(r"[\W_]+", "", text).casefold()


def strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(item)


def evaluation_texts(data):
    """(file, text) for every evaluation text; the strings of one row are joined."""
    files = sorted((data / "text/wikitext-2-raw").glob("*.raw"))
    files += sorted(p for p in (data / "tasks").rglob("*") if p.is_file())
    for path in files:
        name = path.relative_to(data).as_posix()
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".jsonl":
                for line in file:
                    yield name, " ".join(strings(json.loads(line)))
            elif path.suffix == ".csv":
                for row in csv.reader(file):
                    yield name, " ".join(row)
            else:
                yield name, file.read()


def overlaps(documents, data):
    """Index of document -> evaluation file that shares a shingle; and the numbers compared."""
    owners = {}
    for index, document in enumerate(documents):
        text = squeeze(content(document))
        for start in range(len(text) - SHINGLE + 1):
            owners.setdefault(text[start : start + SHINGLE], index)
    hits, files, compared = {}, set(), 0
    for name, text in evaluation_texts(data):
        files.add(name)
        text = squeeze(text)
        compared += max(0, len(text) - SHINGLE + 1)
        for start in range(len(text) - SHINGLE + 1):
            index = owners.get(text[start : start + SHINGLE])
            if index is not None:
                hits.setdefault(index, name)
    return hits, len(files), len(owners), compared


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("data", type=Path, help="folder with text/ and tasks/")
    parser.add_argument("-o", "--output", type=Path, default=PARTS.parent / "default.jsonl")
    parser.add_argument("--seed", type=int, default=20250917)
    parser.add_argument("--sources", default="580adff", help="commit of quern's own sources")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)

    # Wikipedia articles are compared before the budget is filled, so that a rejected one is
    # replaced by the next.
    articles = list(first_bytes(wikipedia(arguments.data, rng), 2 * WIKIPEDIA_BYTES))
    others = list(udhr(arguments.data))
    others += first_bytes(quern_sources(arguments.sources, rng), QUERN_BYTES)
    others += first_bytes(python_sources(), PYTHON_BYTES)
    others += snippets()
    others += dialogues()
    candidates = articles + others
    hits, files, mine, compared = overlaps(candidates, arguments.data)
    for index, name in sorted(hits.items()):
        print(f"left out: {candidates[index].body['source']} (shares text with {name})")
    kept = [d for i, d in enumerate(candidates) if i not in hits]
    chosen = list(first_bytes((d for d in kept if d.part == "wikipedia"), WIKIPEDIA_BYTES))
    chosen += [d for d in kept if d.part != "wikipedia"]
    # Shuffled, so that the first n documents are a mix as well.
    rng.shuffle(chosen)

    remaining, *_ = overlaps(chosen, arguments.data)
    if remaining:
        sys.exit(f"{len(remaining)} documents still overlap")
    lines = [json.dumps(d.body, ensure_ascii=False) + "\n" for d in chosen]
    arguments.output.write_text("".join(lines), encoding="utf-8")

    total = sum(len(content(d).encode()) for d in chosen)
    for part in sorted({d.part for d in chosen}):
        sizes = [len(content(d).encode()) for d in chosen if d.part == part]
        print(f"{part:10} {len(sizes):4} documents {sum(sizes):7} bytes {sum(sizes) / total:6.1%}")
    digest = hashlib.sha256(arguments.output.read_bytes()).hexdigest()
    print(f"{len(chosen)} documents, {total} bytes of text, file {arguments.output.stat().st_size} "
          f"bytes, sha256 {digest}")
    print(f"overlap: 0 of {mine} shingles of {SHINGLE} letters and digits occur among "
          f"{compared} in {files} evaluation files ({len(hits)} candidates were left out)")


if __name__ == "__main__":
    main()
