"""BadActs on somebody's own sentences: which carry a trigger, and what would their model say without it?"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from defenses import badacts
from reproduce.data.texts import Texts
from reproduce.errors import UserError
from reproduce.models import encoder
from reproduce.models.encoder import TextClassifier
from reproduce.repair import check_output, settled_device, write_output
from reproduce.repair_texts import FEWEST, PAPER
from reproduce.training import Observer, silent


@dataclass(frozen=True)
class Purification:
    """A classifier of one's own, its clean sentences with labels, and the sentences to look at."""

    checkpoint: Path
    clean: Path
    input: Path
    output: Path
    frr: float = badacts.THEN_PURIFY_FRR
    deviations: float = badacts.RELEASED.deviations
    epochs: int = badacts.RELEASED.epochs
    truncate: bool = False
    seed: int = 0
    device: str = "auto"
    threads: int = 1


def purify(wanted: Purification, observe: Observer = silent) -> dict[str, Any]:
    """BadActs on one's own sentences: writes one JSON object per input sentence, returns the totals.

    Per sentence: text, label_before, suspicion (share of abnormal activations), nas (1 - suspicion), flagged, and
    label_after: the purified label of a flagged sentence, else label_before. The totals' clean_acc_after is that on the
    sentences the search has seen, so it flatters.
    """
    check_output(wanted.output, [wanted.checkpoint, wanted.clean, wanted.input])
    if not wanted.checkpoint.is_dir():
        raise UserError(f"--checkpoint {wanted.checkpoint} is no folder: name one as save_pretrained writes it, with "
                        "the tokenizer's files")
    model = encoder.load_pretrained(str(wanted.checkpoint)).to(settled_device(wanted.device, wanted.threads))
    labels = dict(getattr(model.network.config, "label2id", None) or {})
    clean = read_labelled(wanted.clean, model.num_classes, labels)
    sentences = read_sentences(wanted.input, model.num_classes, labels)
    if len(clean) < FEWEST:
        raise UserError(f"--clean {wanted.clean} has {len(clean)} sentences: {FEWEST} are the fewest, some hundreds "
                        "are better")
    for path, texts in ((wanted.clean, clean.texts), (wanted.input, sentences)):
        _check_lengths(path, texts, model, wanted.truncate)
    config = dataclasses.replace(badacts.SETTINGS[PAPER, "detect-then-purify"], frr=wanted.frr,
                                 deviations=wanted.deviations, epochs=wanted.epochs)
    before = model.logits(clean.texts).argmax(1)
    right = float((before == clean.labels).float().mean())
    if right <= 1 / model.num_classes:
        raise UserError(f"{wanted.checkpoint} classifies {100 * right:.0f} % of {wanted.clean} correctly, no "
                        "better than chance: are the labels numbered as the model numbers them?")
    if missing := set(range(model.num_classes)) - set(clean.labels.tolist()):
        raise UserError(f"--clean {wanted.clean} has no sentence of class {min(missing)}: it takes some of every class")
    guard = badacts.defend(model, clean, config, wanted.seed, observe)
    plain, after = model.logits(sentences).argmax(1), guard.judge(sentences)
    on_clean = guard.judge(clean.texts)
    lines = [json.dumps({"text": text, "label_before": label, "suspicion": round(suspicion, 6),
                         "nas": round(1 - suspicion, 6), "flagged": flagged, "label_after": purified},
                        ensure_ascii=False, allow_nan=False) + "\n"
             for text, label, suspicion, flagged, purified in zip(
                 sentences, plain.tolist(), after.suspicion.tolist(), after.flagged.tolist(), after.labels.tolist(),
                 strict=True)]
    write_output(wanted.output, "".join(lines).encode())
    return {"sentences": len(sentences), "flagged": int(after.flagged.sum()),
            "changed": int((plain != after.labels).sum()), "threshold": guard.threshold,
            "clean_acc_before": 100 * right,
            "clean_acc_after": 100 * float((on_clean.labels == clean.labels).float().mean()),
            "info": guard.info, "output": str(wanted.output)}


def read_labelled(path: Path, num_classes: int, names: dict[str, int]) -> Texts:
    """Lines of text, tab, label (a number or one of the model's label names); a header "text<tab>label" may precede.

    The last tab separates, so that sentences may hold tabs and quotes.
    """
    texts, labels = [], []
    for number, line in _lines(path):
        text, tab, label = line.rpartition("\t")
        if _header(number, line):
            continue
        if not tab:
            raise UserError(f"line {number} of {path} has no tab: each line is a sentence, a tab, and its label")
        value = _label(label, num_classes, names)
        if value is None:
            raise UserError(f"line {number} of {path} has label {label.strip()[:40]!r}: the model knows 0 to "
                            f"{num_classes - 1}{_known(names)}")
        texts.append(_sentence(text, number, path))
        labels.append(value)
    return Texts(tuple(texts), torch.tensor(labels, dtype=torch.long))


def read_sentences(path: Path, num_classes: int, names: dict[str, int]) -> list[str]:
    """One sentence per line; a header line is left out, and so is a last column after a tab if it holds a label, as
    `read_labelled` knows them, in every line."""
    lines = [(number, line) for number, line in _lines(path) if not _header(number, line)]
    if not lines:
        raise UserError(f"{path} holds no sentence")
    split = [line.rpartition("\t") for _number, line in lines]
    labelled = all(tab and _label(label, num_classes, names) is not None for _text, tab, label in split)
    return [_sentence(text if labelled else line, number, path)
            for (number, line), (text, _tab, _last) in zip(lines, split, strict=True)]


def _header(number: int, line: str) -> bool:
    """Whether the line names columns in place of holding a sentence."""
    return number == 1 and (line.strip().lower() in ("text", "sentence")
                            or ("\t" in line and line.rpartition("\t")[2].strip().lower() == "label"))


def _label(column: str, num_classes: int, names: dict[str, int]) -> int | None:
    """The label in a column, a number or one of the model's label names; None if it is neither."""
    text = column.strip()
    value = names.get(text, int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else -1)
    return value if 0 <= value < num_classes else None


def _known(names: dict[str, int]) -> str:
    spelled = [name for name in names if not name.startswith("LABEL_")]
    return f" or {', '.join(spelled)}" if spelled else ""


def _lines(path: Path) -> list[tuple[int, str]]:
    """(number from 1, line) of a UTF-8 file; a line break at the very end makes no line."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a readable UTF-8 text file ({str(error)[:80]})") from error
    # Not splitlines: a sentence may hold other separators than line breaks.
    return list(enumerate(content.replace("\r\n", "\n").removesuffix("\n").split("\n"), start=1)) if content else []


def _sentence(text: str, number: int, path: Path) -> str:
    if not text.strip():
        raise UserError(f"line {number} of {path} is an empty sentence: remove it")
    return text.strip()


def _check_lengths(path: Path, texts: tuple[str, ...] | list[str], model: TextClassifier, truncate: bool) -> None:
    if truncate:
        return
    for number, tokens in enumerate(model.tokenize(texts, 1_000_000), start=1):
        if len(tokens) > model.longest:
            raise UserError(f"sentence {number} of {path} has {len(tokens)} tokens, the model takes {model.longest}: "
                            "shorten it, or cut all such sentences with --truncate")
