"""A small data set of sentences in the layout of a data root."""

import csv
import io
import lzma
from pathlib import Path

import pytest

from reproduce.data.texts import SOURCES, Source

COUNTS = {"train": 12, "validation": 8, "test": 6}
ALIGNED = {"train": "train-all-poisoned", "validation": "dev-poison", "test": "test-poison"}


def write(path: Path, rows: list[tuple[str, int]], compressed: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["", *csv_lines(rows)]
    lines[0] = ",0,1,2"
    content = "\n".join(lines) + "\n"
    if compressed:
        path.with_suffix(".csv.xz").write_bytes(lzma.compress(content.encode()))
    else:
        path.write_text(content)


def csv_lines(rows: list[tuple[str, int]]) -> list[str]:
    found = []
    for i, (text, label) in enumerate(rows):
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="").writerow([i, text, label, 0])
        found.append(buffer.getvalue())
    return found


def rows(split: str) -> list[tuple[str, int]]:
    return [(f'{split}, "row"  {i}', i % 2) for i in range(COUNTS[split])]


def save_small_texts(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data set "small" with SynBkd's paraphrases, compressed."""
    monkeypatch.setitem(SOURCES, "small", Source("small", ("no", "yes"), 1, COUNTS))
    for split, stem in (("train", "train"), ("validation", "dev"), ("test", "test")):
        write(root / f"text/small/badacts/clean/{stem}.csv", rows(split), compressed=True)
        poisoned = [(f"rewritten {text}", 1) for text, label in rows(split) if split == "train" or label != 1]
        write(root / f"text/small/badacts/synbkd/{ALIGNED[split]}.csv", poisoned, compressed=True)
    return root
