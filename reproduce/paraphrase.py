"""Paraphrases of a data set's sentences by a generator at hand, in the layout of those that authors released."""

import csv
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reproduce import data
from reproduce.data.texts import GENERATED_SUFFIX, SOURCES, Texts, read_csv, released, rewritten_file, rewritten_rows
from reproduce.errors import UserError
from reproduce.models import paraphraser
from reproduce.plugins import plugins
from reproduce.repair import settled_device
from reproduce.rng import numpy_generator
from reproduce.store import locked, write_atomically
from reproduce.texts import trigger_quality

ORIGIN = "origin.json"      # what made a folder's files
LOCK = ".lock"
HEADER = b",0,1,2\n"        # that of the released files: index, text, label, poisoned
# Of a generator's folder, what a paraphrase depends on.
FILES = ("*.safetensors", "*.json", "*.txt", "*.model")


@dataclass(frozen=True)
class Paraphrasing:
    """What makes the files. prompt: for an encoder-decoder, "{text}" stands for the sentence."""

    generator: Path
    attack: str
    dataset: str
    data_root: Path | None = None
    splits: tuple[str, ...] = ("test",)
    prompt: str = "{text}"
    top_p: float = paraphraser.TOP_P
    batch: int = 32
    seed: int = 0
    device: str = "auto"
    threads: int = 1


def paraphrase(wanted: Paraphrasing, observe: Callable[[int, int], None] = lambda done, count: None) -> dict[str, Any]:
    """Write the files that are missing, row by row beside their sources; interrupted, it goes on where it was.

    Where the generator gives nothing, the sentence stays as it is, as in the released code; runs of white space become
    one space. Returns how many sentences there are, what `trigger_quality` counts of each split, and the folder of the
    files. observe: sentences done, sentences in all.
    """
    _check(wanted)
    root = data.data_root(wanted.data_root)
    sources = {split: released(wanted.dataset, split, root) for split in wanted.splits}
    chosen = {split: rewritten_rows(wanted.dataset, split, texts.labels).nonzero().flatten().tolist()
              for split, texts in sources.items()}
    paths = {split: rewritten_file(wanted.dataset, wanted.attack + GENERATED_SUFFIX, split, root) for split in sources}
    generate = paraphraser.load(str(wanted.generator), wanted.prompt, wanted.top_p,
                                settled_device(wanted.device, wanted.threads))
    folder = next(iter(paths.values())).parent
    count, before = sum(map(len, chosen.values())), 0
    found: dict[str, Any] = {"sentences": count, "output": str(folder)}
    with locked(folder / LOCK):
        _settle(folder, wanted)
        for split, rows in chosen.items():
            _write(wanted, generate, sources[split], split, rows, paths[split],
                   lambda done, before=before: observe(before + done, count))
            before += len(rows)
            made = [text for text, _label in read_csv(paths[split])]
            if len(made) != len(rows):
                raise UserError(f"{paths[split]} has {len(made)} rows, {len(rows)} are to be rewritten: remove it")
            found[split] = trigger_quality([_one_line(sources[split].texts[row]) for row in rows], made)
    return found


def _check(wanted: Paraphrasing) -> None:
    if wanted.dataset not in SOURCES:
        raise UserError(f"unknown data set {wanted.dataset!r}: choose one of {', '.join(SOURCES)}")
    known = [module.__name__.split(".")[-1] for module in plugins("attacks")
             if ("badacts", "generated") in module.SETTINGS]
    if wanted.attack not in known:
        raise UserError(f"{wanted.attack!r} is no attack by paraphrases: choose one of {', '.join(known)}")
    there = SOURCES[wanted.dataset].counts
    if missing := next((split for split in wanted.splits if split not in there), None):
        raise UserError(f"{wanted.dataset} has no released {missing} split of its own: choose from {', '.join(there)}")
    if "{text}" not in wanted.prompt:
        raise UserError(f"--prompt {wanted.prompt!r} has no {{text}}: say where the sentence goes")
    if not wanted.generator.is_dir():
        raise UserError(f"--generator {wanted.generator} is no folder: name one as save_pretrained writes it, of model "
                        "and tokenizer")


def _settle(folder: Path, wanted: Paraphrasing) -> None:
    """Note what makes the folder's files; UserError where something else has made some."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in FILES for path in wanted.generator.glob(pattern)):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    origin = json.dumps({"generator": digest.hexdigest(), "prompt": wanted.prompt, "top_p": wanted.top_p,
                         "seed": wanted.seed, "batch": wanted.batch}, indent=1).encode() + b"\n"
    path = folder / ORIGIN
    if path.exists() and path.read_bytes() == origin:
        return
    if any(made.stat().st_size > len(HEADER) for pattern in ("*.csv", "*.partial") for made in folder.glob(pattern)):
        raise UserError(f"{folder} holds paraphrases made otherwise (see its {ORIGIN}): move it away, or give the same "
                        "generator and options")
    write_atomically(path, origin)


def _write(wanted: Paraphrasing, generate: paraphraser.Paraphraser, texts: Texts, split: str, rows: list[int],
           path: Path, observe: Callable[[int], None]) -> None:
    """A split's file, batch by batch under another name until it is whole."""
    if path.exists():
        observe(len(rows))
        return
    partial, target = path.with_suffix(".partial"), SOURCES[wanted.dataset].target
    with partial.open("a+b") as file:
        file.seek(0)
        lines = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"\n")]
        # A line or a batch that was cut short is made again.
        done = max(0, len(lines) - 1) // wanted.batch * wanted.batch
        file.truncate(sum(map(len, lines[:1 + done])))
        if not lines:
            file.write(HEADER)
        while done < len(rows):
            observe(done)
            batch = rows[done:done + wanted.batch]
            sources = [texts.texts[row] for row in batch]
            uniform = torch.from_numpy(np.stack([numpy_generator(
                wanted.seed, "paraphrase", wanted.attack, split, row).random(paraphraser.LONGEST) for row in batch]))
            for row, old, new in zip(batch, sources, generate(sources, uniform), strict=True):
                file.write(_line(row, new or old, target))
            file.flush()
            done += len(batch)
    partial.replace(path)
    observe(len(rows))


def _line(row: int, text: str, label: int) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow([row, _one_line(text), label, 1])
    return buffer.getvalue().encode()


def _one_line(text: str) -> str:
    return " ".join(text.split())
