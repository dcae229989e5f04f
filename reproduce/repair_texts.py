"""Somebody's own text classifier: how good is it, how backdoored, and what does a defense make of it and its input?"""

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from defenses import badacts
from reproduce import data
from reproduce.cells import NONE
from reproduce.data.texts import TextDataset, Texts
from reproduce.defending import clean_texts, defense_module
from reproduce.errors import UserError
from reproduce.metrics import metrics
from reproduce.models import encoder
from reproduce.models.encoder import TextClassifier
from reproduce.plugins import settings_of
from reproduce.poisoning import attack_module
from reproduce.repair import Repair, Suspect, check_modality, check_output, usable_devices
from reproduce.texts import TextTestSet, judge_both, triggered_test_set
from reproduce.training import Observer, silent

PAPER = "badacts"
FEWEST = 20     # clean sentences: ten to fit on, ten to find a threshold on; far too few to be good


def evaluate_text_suspect(suspect: Suspect) -> dict[str, Any]:
    """acc, acc_nontarget, asr, ra in percent, n_clean, n_nontarget; without an attack acc and n_clean."""
    _dataset, model, test = _suspect(suspect)
    return _measured(test, *(model.logits(texts).argmax(1) for texts in (test.clean.texts, test.triggered)))


def repair_text_suspect(suspect: Suspect, repair: Repair) -> dict[str, Any]:
    """Write the repaired weights, or what the guard needs (intervals, statistics).

    `before` and `after` as `evaluate_text_suspect`, where a rejected sentence counts as an error; `flagged`: what share
    is; the seconds the defense took.
    """
    check_output(repair.output)
    if repair.images:
        raise UserError(f"--images are pictures, {suspect.dataset} holds texts: the clean sentences are its validation "
                        "split; for sentences of your own use the command purify")
    module = defense_module(repair.defense)
    check_modality(f"defense {repair.defense}", module, suspect.dataset)
    config = settings_of(f"defense {repair.defense}", module, PAPER, repair.defense_variant or suspect.variant)
    if "training-data" in module.requires(config):
        raise UserError(f"defense {repair.defense} cleans the training set and trains anew: it cannot repair a "
                        "checkpoint")
    dataset, model, test = _suspect(suspect)
    if getattr(config, "target", None) is not None:
        config = dataclasses.replace(config, target=_target(suspect, dataset))
    fraction = 1.0 if repair.clean_fraction is None else repair.clean_fraction
    clean = clean_texts(dataset.validation, fraction, suspect.seed)
    if len(clean) < FEWEST:
        raise UserError(f"--clean-fraction {fraction} of {len(dataset.validation)} sentences is "
                        f"{len(clean)}: raise it to {FEWEST} or more")
    before = _measured(test, *(model.logits(texts).argmax(1) for texts in (test.clean.texts, test.triggered)))
    started = time.monotonic()
    guard = module.defend(model, clean, config, suspect.seed)
    seconds = round(time.monotonic() - started, 2)
    on_clean, on_triggered = judge_both(guard, test)
    found = {"before": before, "after": _measured(test, on_clean.labels, on_triggered.labels), "seconds": seconds,
             "defense": repair.defense, "clean_sentences": len(clean), "info": guard.info}
    if on_clean.flagged is not None:
        found["flagged"] = {"clean": 100 * float(on_clean.flagged.float().mean())}
        if len(test.triggered):
            found["flagged"]["triggered"] = 100 * float(on_triggered.flagged.float().mean())
    kept = guard.model.network.state_dict() if guard.model else guard.tensors
    if kept:
        save_file({name: value.cpu().contiguous() for name, value in kept.items()}, repair.output)
        found["output"] = str(repair.output)
    return found


def _suspect(suspect: Suspect) -> tuple[TextDataset, TextClassifier, TextTestSet]:
    for option, given in (("--normalize", suspect.normalize != "none"), ("--clean-model", suspect.clean_model),
                          ("--trigger", suspect.trigger)):
        if given:
            raise UserError(f"{option} is for images, {suspect.dataset} holds texts: leave it out")
    dataset = data.load_text(suspect.dataset, suspect.root)
    settings = None
    if suspect.attack:
        module = attack_module(suspect.attack)
        check_modality(f"attack {suspect.attack}", module, suspect.dataset)
        settings = dataclasses.replace(settings_of(f"attack {suspect.attack}", module, PAPER, suspect.variant),
                                       target=_target(suspect, dataset))
    test = triggered_test_set(dataset, suspect.attack or NONE, settings, suspect.seed)
    return dataset, load_classifier(suspect.checkpoint, suspect.model, dataset, suspect), test


def _target(suspect: Suspect, dataset: TextDataset) -> int:
    target = dataset.target if suspect.target is None else suspect.target
    if not 0 <= target < dataset.num_classes:
        raise UserError(f"--target {target}: {dataset.name} has labels 0 to {dataset.num_classes - 1}")
    return target


def load_classifier(checkpoint: Path, name: str, dataset: TextDataset, suspect: Suspect) -> TextClassifier:
    """A folder as `save_pretrained` writes it, or the model.safetensors of a victim's run folder for encoder `name`."""
    place = usable_devices(suspect.device)[0]
    torch.set_num_threads(1)  # a second thread beside any busy process costs more than it brings
    if checkpoint.is_dir() and (checkpoint / "config.json").is_file() and not (checkpoint / "done").is_file():
        model = encoder.load_pretrained(str(checkpoint))
        if model.num_classes != dataset.num_classes:
            raise UserError(f"{checkpoint} tells {model.num_classes} classes apart, {dataset.name} has "
                            f"{dataset.num_classes}")
        return model.to(place)
    path = checkpoint / "model.safetensors" if checkpoint.is_dir() else checkpoint
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    model = encoder.build(name, dataset.num_classes, 0, suspect.root)
    try:
        model.network.load_state_dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable .safetensors file ({str(error)[:100]})") from error
    except RuntimeError as error:
        raise UserError(f"{path} is not a {name} with {dataset.num_classes} classes: choose the right --model or "
                        "--dataset") from error
    return model.eval().to(place)


def _measured(test: TextTestSet, on_clean: torch.Tensor, on_triggered: torch.Tensor) -> dict[str, Any]:
    """The metrics that apply: without an attack, clean accuracy only."""
    values = metrics(test.predictions(on_clean, on_triggered))
    return values if len(test.triggered) else {name: values[name] for name in ("acc", "n_clean")}


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


def purify(wanted: Purification, observe: Observer = silent) -> dict[str, Any]:
    """BadActs on one's own sentences: writes one JSON object per input sentence, returns the totals.

    Per sentence: text, label_before, suspicion (share of abnormal activations), nas (1 - suspicion), flagged, and
    label_after: the purified label of a flagged sentence, else label_before.
    """
    if not wanted.output.parent.is_dir():
        raise UserError(f"--output {wanted.output}: the folder {wanted.output.parent} does not exist")
    if not wanted.checkpoint.is_dir():
        raise UserError(f"--checkpoint {wanted.checkpoint} is no folder: name one as save_pretrained writes it, with "
                        "the tokenizer's files")
    torch.set_num_threads(1)
    model = encoder.load_pretrained(str(wanted.checkpoint)).to(usable_devices(wanted.device)[0])
    labels = dict(getattr(model.network.config, "label2id", None) or {})
    clean = read_labelled(wanted.clean, model.num_classes, labels)
    sentences = read_sentences(wanted.input)
    for path, texts in ((wanted.clean, clean.texts), (wanted.input, sentences)):
        _check_lengths(path, texts, model, wanted.truncate)
    if len(clean) < FEWEST:
        raise UserError(f"--clean {wanted.clean} has {len(clean)} sentences: {FEWEST} are the fewest, some hundreds "
                        "are better")
    config = dataclasses.replace(badacts.SETTINGS[PAPER, "detect-then-purify"], frr=wanted.frr,
                                 deviations=wanted.deviations, epochs=wanted.epochs)
    before = model.logits(clean.texts).argmax(1)
    right = float((before == clean.labels).float().mean())
    if right <= 1 / model.num_classes:
        raise UserError(f"{wanted.checkpoint} classifies {100 * right:.0f} % of {wanted.clean} correctly, no "
                        "better than chance: are the labels numbered as the model numbers them?")
    guard = badacts.defend(model, clean, config, wanted.seed, observe)
    plain, after = model.logits(sentences).argmax(1), guard.judge(sentences)
    on_clean = guard.judge(clean.texts)
    with wanted.output.open("w", encoding="utf-8") as file:
        for text, label, suspicion, flagged, purified in zip(
                sentences, plain.tolist(), after.suspicion.tolist(), after.flagged.tolist(), after.labels.tolist(),
                strict=True):
            file.write(json.dumps({"text": text, "label_before": label, "suspicion": round(suspicion, 6),
                                   "nas": round(1 - suspicion, 6), "flagged": flagged, "label_after": purified},
                                  ensure_ascii=False) + "\n")
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
        if number == 1 and label.strip().lower() == "label":
            continue
        if not tab:
            raise UserError(f"line {number} of {path} has no tab: each line is a sentence, a tab, and its label")
        value = names.get(label.strip(), int(label) if label.strip().isdigit() else -1)
        if not 0 <= value < num_classes:
            raise UserError(f"line {number} of {path} has label {label.strip()!r}: the model knows 0 to "
                            f"{num_classes - 1}{_known(names)}")
        texts.append(_sentence(text, number, path))
        labels.append(value)
    return Texts(tuple(texts), torch.tensor(labels, dtype=torch.long))


def read_sentences(path: Path) -> list[str]:
    """One sentence per line; a last column after a tab that is a label is left out, and so is a header line."""
    found = []
    for number, line in _lines(path):
        text, tab, label = line.rpartition("\t")
        if number == 1 and line.strip().lower() in ("text", "text\tlabel", "sentence", "sentence\tlabel"):
            continue
        found.append(_sentence(text if tab and label.strip().isdigit() else line, number, path))
    if not found:
        raise UserError(f"{path} holds no sentence")
    return found


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
