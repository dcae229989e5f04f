"""Somebody's own text classifier: how good is it, how backdoored, and what does a defense make of it?"""

import dataclasses
import time
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from reproduce import data
from reproduce.cells import NONE
from reproduce.data.texts import TextDataset
from reproduce.defending import clean_texts, defense_module
from reproduce.errors import UserError
from reproduce.metrics import metrics
from reproduce.models import encoder
from reproduce.models.checkpoints import check_finite
from reproduce.models.encoder import TextClassifier
from reproduce.plugins import settings_of
from reproduce.poisoning import attack_module
from reproduce.repair import (
    Repair,
    Suspect,
    check_modality,
    check_used,
    check_weights_output,
    check_whole,
    settled_device,
    written,
)
from reproduce.texts import TextTestSet, judge_both, triggered_test_set

PAPER = "badacts"
FEWEST = 20     # clean sentences: ten to fit on, ten to find a threshold on; far too few to be good


def evaluate_text_suspect(suspect: Suspect) -> dict[str, Any]:
    """acc, acc_nontarget, asr, base_rate, ra in percent, n_clean, n_nontarget; without an attack acc and n_clean."""
    _dataset, model, test = _suspect(suspect)
    return _measured(test, *(model.logits(texts).argmax(1) for texts in (test.clean.texts, test.triggered)))


def repair_text_suspect(suspect: Suspect, repair: Repair) -> dict[str, Any]:
    """Write the repaired weights, or what the guard needs (intervals, statistics).

    `before` and `after` as `evaluate_text_suspect`, where a rejected sentence counts as an error; `flagged`: what share
    is; the seconds the defense took.
    """
    check_weights_output(repair.output, suspect)
    if repair.images:
        raise UserError(f"--images are pictures, {suspect.dataset} holds texts: the clean sentences are its validation "
                        "split; for sentences of your own use the command purify")
    module = defense_module(repair.defense)
    check_modality(f"defense {repair.defense}", module, suspect.dataset)
    config = settings_of(f"defense {repair.defense}", module, PAPER, repair.defense_variant or suspect.variant,
                         "--defense-variant")
    if "training-data" in module.requires(config):
        raise UserError(f"defense {repair.defense} cleans the training set and trains anew: it cannot repair a "
                        "checkpoint")
    told = getattr(config, "target", None) is not None
    dataset, model, test = _suspect(suspect, told)
    if told:
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
    # Some judge sentences and keep nothing.
    return written(kept, repair.output, found) if kept else {**found, "output": None}


def _suspect(suspect: Suspect, told: bool = False) -> tuple[TextDataset, TextClassifier, TextTestSet]:
    for option, given in (("--normalize", suspect.normalize is not None), ("--clean-model", suspect.clean_model),
                          ("--trigger", suspect.trigger)):
        if given:
            raise UserError(f"{option} is for images, {suspect.dataset} holds texts: leave it out")
    check_used(suspect, told)
    dataset = data.load_text(suspect.dataset, suspect.root)
    settings = None
    if suspect.attack:
        module = attack_module(suspect.attack)
        check_modality(f"attack {suspect.attack}", module, suspect.dataset)
        settings = dataclasses.replace(settings_of(f"attack {suspect.attack}", module, PAPER, suspect.variant),
                                       target=_target(suspect, dataset))
    test = triggered_test_set(dataset, suspect.attack or NONE, settings, suspect.seed)
    return dataset, _classifier(suspect, dataset), test


def _target(suspect: Suspect, dataset: TextDataset) -> int:
    target = dataset.target if suspect.target is None else suspect.target
    if not 0 <= target < dataset.num_classes:
        raise UserError(f"--target {target}: {dataset.name} has labels 0 to {dataset.num_classes - 1}")
    return target


def _classifier(suspect: Suspect, dataset: TextDataset) -> TextClassifier:
    """The checkpoint: a folder as `save_pretrained` writes it, a victim's run folder, or its model.safetensors."""
    place, checkpoint = settled_device(suspect.device, suspect.threads), suspect.checkpoint
    # A run folder has a config.json too, of another kind.
    if (checkpoint / "config.json").is_file() and not (checkpoint / "done").is_file():
        model = encoder.load_pretrained(str(checkpoint))
        if model.num_classes != dataset.num_classes:
            raise UserError(f"{checkpoint} tells {model.num_classes} classes apart, {dataset.name} has "
                            f"{dataset.num_classes}")
        return model.to(place)
    path = checkpoint / "model.safetensors" if checkpoint.is_dir() else checkpoint
    check_whole(path.parent)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    model = encoder.build(suspect.model, dataset.num_classes, 0, suspect.root)
    try:
        model.network.load_state_dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable .safetensors file ({str(error)[:100]})") from error
    except RuntimeError as error:
        raise UserError(f"{path} is not a {suspect.model} with {dataset.num_classes} classes: choose the right --model "
                        "or --dataset") from error
    check_finite(model.network.state_dict(), path)
    return model.eval().to(place)


def _measured(test: TextTestSet, on_clean: torch.Tensor, on_triggered: torch.Tensor) -> dict[str, Any]:
    """The metrics that apply: without an attack, clean accuracy only."""
    values = metrics(test.predictions(on_clean, on_triggered))
    return values if len(test.triggered) else {name: values[name] for name in ("acc", "n_clean")}
