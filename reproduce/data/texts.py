"""Text data sets in memory, by name, with the poisoned paraphrases their authors released.

sst-2, yelp, hsol and agnews come from a data root in one of two layouts:

    <root>/text/<name>/badacts/clean/{train,dev,test}.csv[.xz]
    <root>/text/<name>/badacts/<attack>/{train-all-poisoned,dev-poison,test-poison}.csv[.xz]
    <root>/text/<name>/badacts/<attack>-generated/...                       what a paraphraser at hand made of them
    <root>/BadActs/poison_data/<name>/<target>/<attack>/{train,dev,test}-{clean,poison}.csv     the authors' repository

Where neither has them and a network exists, the clean sentences of sst-2 come from the hub (package `datasets`).
`sentences` is generated (`reproduce.data.sentences`). Two names change a released split:

    hsol           a fifth of train is the validation split, because the released one equals the test split byte for
                   byte; hsol-released keeps the released files
    agnews-small   train and validation are cut from the 12,000 rows of the released dev split
"""

import csv
import importlib.util
import io
import lzma
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from reproduce.errors import UserError
from reproduce.models.hub import hub_answers
from reproduce.rng import generator

SPLITS = ("train", "validation", "test")
OFFICIAL = "github.com/clearloveclearlove/BadActs"
GENERATED_SUFFIX = "-generated"  # of the folder of paraphrases that a model at hand made
HUB = {"sst-2": "SetFit/sst2"}  # the sentence-level split, with columns text and label
_STEMS = {"train": "train", "validation": "dev", "test": "test"}
_ALIGNED = {"train": "train-all-poisoned", "validation": "dev-poison", "test": "test-poison"}


@dataclass(frozen=True)
class Texts:
    """texts: N sentences; labels: int64 (N,)."""

    texts: tuple[str, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, index: Sequence[int] | Tensor) -> "Texts":
        """The rows at `index`, in its order."""
        rows = torch.as_tensor(index, dtype=torch.long)
        return Texts(tuple(self.texts[i] for i in rows.tolist()), self.labels[rows])


# (attack, split) -> one paraphrase per row of the split, None where there is none.
Paraphrases = Callable[[str, str], tuple[str | None, ...]]


@dataclass(frozen=True)
class TextDataset:
    """The defender's clean data are (a share of) the validation split."""

    name: str
    train: Texts
    validation: Texts
    test: Texts
    classes: tuple[str, ...]
    target: int     # the attacker's label on this data set, as released
    paraphrases: Paraphrases

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def split(self, name: str) -> Texts:
        """train, validation or test."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]


@dataclass(frozen=True)
class Source:
    """What the released files of a data set must hold. target: Attacks.py@7932f19:68-70."""

    files: str
    classes: tuple[str, ...]
    target: int
    counts: dict[str, int]


_HSOL = Source("hsol", ("neutral", "hateful"), 0, {"train": 5823, "validation": 2485, "test": 2485})
_AGNEWS = ("World", "Sports", "Business", "Tech")
SOURCES = {
    "sst-2": Source("sst-2", ("negative", "positive"), 1, {"train": 6920, "validation": 872, "test": 1821}),
    "yelp": Source("yelp", ("negative", "positive"), 1, {"train": 14000, "validation": 2999, "test": 3001}),
    "hsol": _HSOL,
    "hsol-released": _HSOL,
    "agnews": Source("agnews", _AGNEWS, 0, {"train": 108_000, "validation": 12_000, "test": 7600}),
    "agnews-small": Source("agnews", _AGNEWS, 0, {"validation": 12_000, "test": 7600}),
}


# Where train and validation are both cut from one released split: that split, and the share for validation.
CUTS = {"hsol": ("train", 0.2), "agnews-small": ("validation", 1 / 6)}


def sizes(name: str) -> tuple[int, int, int]:
    """How many sentences train, validation and test of a data set hold."""
    counts = SOURCES[name].counts
    if name in CUTS:
        split, share = CUTS[name]
        held = round(share * counts[split])
        return counts[split] - held, held, counts["test"]
    return counts["train"], counts["validation"], counts["test"]


def load_texts(name: str, root: Path) -> TextDataset:
    """The data set `name`. Raises UserError naming any missing, damaged or unaligned file and what to do."""
    source = SOURCES[name]
    files = _Files(name, source, root)
    splits = {split: files.clean(split) for split in source.counts}
    parts = {split: (split, torch.arange(len(splits[split]))) for split in splits}
    if name in CUTS:
        split, share = CUTS[name]
        parts["train"], parts["validation"] = _cut(split, len(splits[split]), share)

    def paraphrases(attack: str, split: str) -> tuple[str | None, ...]:
        released, rows = parts[split]
        found = files.paraphrases(attack, released, splits[released].labels)
        return tuple(found[row] for row in rows.tolist())

    train, validation, test = (splits[parts[split][0]].take(parts[split][1]) for split in SPLITS)
    return TextDataset(name, train, validation, test, source.classes, source.target, paraphrases)


def released(name: str, split: str, root: Path) -> Texts:
    """A released split whole, before a name cuts it. Raises UserError as `load_texts`."""
    return _Files(name, SOURCES[name], root).clean(split)


def rewritten_file(name: str, attack: str, split: str, root: Path) -> Path:
    """Where paraphrases of a released split go."""
    return root / "text" / SOURCES[name].files / "badacts" / attack / f"{_ALIGNED[split]}.csv"


def rewritten_rows(name: str, split: str, labels: Tensor) -> Tensor:
    """Which rows of a released split have a paraphrase, bool (N,): in training all, else those not of the target."""
    return torch.ones_like(labels, dtype=torch.bool) if split == "train" else labels != SOURCES[name].target


def _cut(split: str, count: int, share: float) -> tuple[tuple[str, Tensor], tuple[str, Tensor]]:
    """Two parts of a released split, (rest, share), the same for every seed."""
    order = torch.randperm(count, generator=generator(0, "text-split", split, count))
    cut = round(share * count)
    return (split, order[cut:].sort().values), (split, order[:cut].sort().values)


@dataclass(frozen=True)
class _Files:
    """The released files of one data set."""

    name: str
    source: Source
    root: Path

    def clean(self, split: str) -> Texts:
        stem = _STEMS[split]
        try:
            path, rows = self._rows("clean", stem, "badnets", f"{stem}-clean")
        except UserError:
            found = _from_hub(self.source.files, split)
            if found is None:
                raise
            path, rows = Path(HUB[self.source.files]), found
        wanted, classes = self.source.counts[split], len(self.source.classes)
        if len(rows) != wanted:
            raise UserError(f"{self.name}: {path} has {len(rows)} rows, the released file {wanted}; replace it")
        wrong = next((i for i, (_text, label) in enumerate(rows) if not 0 <= label < classes), None)
        if wrong is not None:
            raise UserError(f"{self.name}: row {wrong} of {path} has label {rows[wrong][1]}; expected 0 to "
                            f"{classes - 1}")
        return Texts(tuple(text for text, _label in rows), torch.tensor([label for _text, label in rows]))

    def paraphrases(self, attack: str, split: str, labels: Tensor) -> tuple[str | None, ...]:
        """Those of every row that has one, None elsewhere."""
        path, rows = self._rows(attack, _ALIGNED[split], attack, f"{_STEMS[split]}-poison")
        wanted = rewritten_rows(self.name, split, labels)
        if len(rows) != int(wanted.sum()):
            advice = ("remove it, and make it again" if attack.endswith(GENERATED_SUFFIX) else
                      f"replace it by the released file ({OFFICIAL})")
            raise UserError(f"{self.name}: {path} has {len(rows)} rows, which do not fit the {int(wanted.sum())} clean "
                            f"ones they paraphrase; {advice}")
        texts = iter(text for text, _label in rows)
        return tuple(next(texts) if one else None for one in wanted.tolist())

    def _rows(self, folder: str, stem: str, theirs: str, their_stem: str) -> tuple[Path, list[tuple[str, int]]]:
        """(text, label) of every row, from the first layout that has the file."""
        here = self.root / "text" / self.source.files / "badacts" / folder
        there = self.root / "BadActs" / "poison_data" / self.source.files / str(self.source.target) / theirs
        for path in (here / f"{stem}.csv", here / f"{stem}.csv.xz", there / f"{their_stem}.csv"):
            if path.is_file():
                return path, read_csv(path)
        if folder.endswith(GENERATED_SUFFIX):
            split = next(split for split, aligned in _ALIGNED.items() if aligned == stem)
            attack = folder.removesuffix(GENERATED_SUFFIX)
            raise UserError(f"{self.name}: {here / stem}.csv is missing: make it with python -m reproduce paraphrase "
                            f"--attack {attack} --dataset {self.name} --split {split} and a generator of yours")
        raise UserError(f"{self.name}: {here / stem}.csv[.xz] is missing: clone {OFFICIAL} as {self.root / 'BadActs'}, "
                        "or name another folder with --data-root or BACKDOOR_DATA")


def _from_hub(name: str, split: str) -> list[tuple[str, int]] | None:
    """(text, label) of a split; None without the package, the data set or a network."""
    if name not in HUB or importlib.util.find_spec("datasets") is None or not hub_answers():
        return None
    from datasets import load_dataset
    return [(row["text"], int(row["label"])) for row in load_dataset(HUB[name], split=split)]


def read_csv(path: Path) -> list[tuple[str, int]]:
    """(text, label) of the rows of a released file: columns index, text, label, poisoned or not."""
    try:
        raw = path.read_bytes()
        content = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")
        rows = list(csv.reader(io.StringIO(content, newline="")))
        found = [(row[1], int(row[2])) for row in rows[1:]]
    except (OSError, lzma.LZMAError, UnicodeDecodeError, csv.Error, IndexError, ValueError) as error:
        raise UserError(f"{path} is not a readable file of index, text, label and mark ({str(error)[:80]}); replace it "
                        f"by the released one ({OFFICIAL})") from error
    for i, (text, _label) in enumerate(found):
        if not text.strip():
            raise UserError(f"row {i} of {path} is an empty sentence; replace the file by the released one "
                            f"({OFFICIAL})")
    return found
