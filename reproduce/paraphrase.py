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
from reproduce.data.texts import (
    GENERATED,
    SOURCES,
    Texts,
    read_csv,
    released,
    rewritten_file,
    rewritten_rows,
)
from reproduce.errors import UserError
from reproduce.models import paraphraser
from reproduce.plugins import settings_of
from reproduce.poisoning import attack_module
from reproduce.repair import settled_device
from reproduce.rng import numpy_generator
from reproduce.texts import trigger_quality

ORIGIN = "origin.json"      # what made a folder's files
HEADER = ",0,1,2"           # that of the released files: index, text, label, poisoned


@dataclass(frozen=True)
class Paraphrasing:
    """What makes the files. prompt: for an encoder-decoder, "{text}" stands for the sentence."""

    generator: Path
    attack: str
    dataset: str
    data_root: Path | None = None
    prompt: str = "{text}"
    top_p: float = paraphraser.TOP_P
    batch: int = 32
    seed: int = 0
    device: str = "auto"


def paraphrase(wanted: Paraphrasing, observe: Callable[[int, int], None] = lambda done, count: None) -> dict[str, Any]:
    """Write the files that are missing, row by row beside their sources; interrupted, it goes on where it was.

    Where the generator gives nothing, the sentence stays as it is, as in the released code. Returns how many sentences
    there are, how many of them are unchanged, what `trigger_quality` counts of the test split, and the folder of the
    files. observe: sentences done, sentences in all.
    """
    _check(wanted)
    root = data.data_root(wanted.data_root)
    splits = {split: released(wanted.dataset, split, root) for split in SOURCES[wanted.dataset].counts}
    chosen = {split: rewritten_rows(wanted.dataset, split, texts.labels).nonzero().flatten().tolist()
              for split, texts in splits.items()}
    paths = {split: rewritten_file(wanted.dataset, wanted.attack + GENERATED, split, root) for split in splits}
    generate = paraphraser.load(str(wanted.generator), wanted.prompt, wanted.top_p, settled_device(wanted.device))
    folder = next(iter(paths.values())).parent
    _settle(folder, wanted)
    count, before = sum(map(len, chosen.values())), 0
    for split, rows in chosen.items():
        _write(wanted, generate, splits[split], split, rows, paths[split],
               lambda done, before=before: observe(before + done, count))
        before += len(rows)
    made = {split: [text for text, _label in read_csv(path)] for split, path in paths.items()}
    kept = sum(new == splits[split].texts[row] for split, rows in chosen.items()
               for row, new in zip(rows, made[split], strict=True))
    return {"sentences": count, "unchanged": kept, "test": trigger_quality(
        [splits["test"].texts[row] for row in chosen["test"]], made["test"]), "output": str(folder)}


def _check(wanted: Paraphrasing) -> None:
    if wanted.dataset not in SOURCES:
        raise UserError(f"unknown data set {wanted.dataset!r}: choose one of {', '.join(SOURCES)}")
    settings_of(f"attack {wanted.attack}", attack_module(wanted.attack), "badacts", "generated")
    if "{text}" not in wanted.prompt:
        raise UserError(f"--prompt {wanted.prompt!r} has no {{text}}: say where the sentence goes")
    if not wanted.generator.is_dir():
        raise UserError(f"--generator {wanted.generator} is no folder: name one as save_pretrained writes it, of model "
                        "and tokenizer")


def _settle(folder: Path, wanted: Paraphrasing) -> None:
    """Note what makes the folder's files; UserError where something else has begun to."""
    weights = hashlib.sha256()
    for path in sorted(wanted.generator.glob("*.safetensors")):
        weights.update(path.read_bytes())
    origin = {"generator": wanted.generator.name, "weights": weights.hexdigest(), "prompt": wanted.prompt,
              "top_p": wanted.top_p, "seed": wanted.seed, "batch": wanted.batch}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / ORIGIN).exists():
            (folder / ORIGIN).write_text(json.dumps(origin, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): name another data root") from error
    if (folder / ORIGIN).read_text() != json.dumps(origin, indent=1) + "\n":
        raise UserError(f"{folder} holds paraphrases made otherwise (see its {ORIGIN}): move it away, or give the same "
                        "generator and options")


def _write(wanted: Paraphrasing, generate: paraphraser.Paraphraser, texts: Texts, split: str, rows: list[int],
           path: Path, observe: Callable[[int], None]) -> None:
    """A split's file, batch by batch under another name until it is whole."""
    if path.exists():
        observe(len(rows))
        return
    partial, target = path.with_suffix(".partial"), SOURCES[wanted.dataset].target
    lines = partial.read_text(encoding="utf-8").split("\n")[1:-1] if partial.exists() else []
    # A batch that was cut short is made again.
    done = len(lines) // wanted.batch * wanted.batch
    partial.write_text("".join(f"{line}\n" for line in (HEADER, *lines[:done])), encoding="utf-8")
    with partial.open("a", encoding="utf-8") as file:
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


def _line(row: int, text: str, label: int) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow([row, " ".join(text.split()), label, 1])
    return buffer.getvalue()
