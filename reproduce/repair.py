"""Somebody's own checkpoint: how good is it, how backdoored, and what does a defense make of it?"""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from reproduce import data, models
from reproduce.cells import NONE
from reproduce.data import Dataset
from reproduce.data.folder import load_folder
from reproduce.defending import Clean, clean_subset, defense_module
from reproduce.engine import default_devices
from reproduce.errors import UserError
from reproduce.evaluation import TestSet, evaluate
from reproduce.images import prepare, triggered_test_set
from reproduce.metrics import metrics
from reproduce.models.checkpoints import load_checkpoint
from reproduce.plugins import plugins, settings_of
from reproduce.poisoning import attack_module
from reproduce.processor import repeatable
from reproduce.store import damage

CLEAN_FRACTION = 0.05   # of the training images


@dataclass(frozen=True)
class Suspect:
    """A checkpoint and how to test it. attack None: clean accuracy only; normalize: what its images were normalised
    with, None for what goes with the architecture and the data set; clean_model: a clean checkpoint of the same
    architecture, for attacks and teachers that need one; trigger: the attack's state as a victim's run folder holds it,
    None to prepare it from the seed."""

    checkpoint: Path
    model: str
    dataset: str
    data_root: Path | None = None
    attack: str | None = None
    paper: str = "nad"
    variant: str = "released"
    target: int | None = None
    normalize: str | None = None
    clean_model: Path | None = None
    trigger: Path | None = None
    seed: int = 0
    device: str = "auto"
    threads: int = 1

    @property
    def root(self) -> Path:
        return data.data_root(self.data_root)


@dataclass(frozen=True)
class Repair:
    """Which defense, on which clean data: a share of the data set's training images or of its validation sentences
    (None: 5 % of the images, all of the sentences), or a folder of images."""

    defense: str
    output: Path
    defense_variant: str | None = None
    clean_fraction: float | None = None
    images: Path | None = None


def evaluate_suspect(suspect: Suspect) -> dict[str, Any]:
    """acc, acc_nontarget, asr, base_rate, ra in percent, n_clean, n_nontarget; without an attack acc and n_clean."""
    check_used(suspect)
    loaded = data.load(suspect.dataset, suspect.root)
    network, clean_model = _networks(suspect, loaded)
    return _measured(network, _test_set(suspect, loaded, clean_model))


def repair_suspect(suspect: Suspect, repair: Repair) -> dict[str, Any]:
    """Write the repaired weights; `before` and `after` as `evaluate_suspect`, and the seconds the defense took."""
    check_weights_output(repair.output, suspect)
    if repair.images and repair.clean_fraction is not None:
        raise UserError("--clean-fraction is a share of the data set's images, of --images all are used: leave one out")
    module = defense_module(repair.defense)
    check_modality(f"defense {repair.defense}", module, suspect.dataset)
    config = _defense_settings(repair, module, suspect)
    check_used(suspect, told=getattr(config, "target", None) is not None)
    loaded = data.load(suspect.dataset, suspect.root)
    network, clean_model = _networks(suspect, loaded)
    if "clean-model" in module.requires(config) and clean_model is None:
        raise UserError(f"defense {repair.defense} with these settings needs a clean model: name a --clean-model")
    test = _test_set(suspect, loaded, clean_model)
    clean = _clean_images(suspect, repair, loaded, next(network.parameters()).device)
    before = _measured(network, test)
    started = time.monotonic()
    defended = module.defend(network, clean, config, suspect.seed, clean_model=clean_model)
    repaired = defended.model
    seconds = round(time.monotonic() - started, 2)
    found = {"before": before, "after": _measured(repaired, test), "seconds": seconds, "defense": repair.defense,
             "clean_images": len(clean.images), "info": defended.info}
    return written(repaired.state_dict(), repair.output, found)


def written(weights: dict[str, Tensor], path: Path, found: dict[str, Any]) -> dict[str, Any]:
    """`found` with the file that the weights are in now; UserError with `found` where they cannot be written."""
    content = save({name: value.cpu().contiguous() for name, value in weights.items()})
    try:
        write_output(path, content)
    except UserError as error:
        raise UserError(str(error), {**found, "output": None}) from error
    return {**found, "output": str(path)}


def write_output(path: Path, content: bytes) -> None:
    """All of it or, if there is no room, what was there before; UserError then. Links and devices are written through.
    """
    partial = _written_first(path)
    try:
        partial.write_bytes(content)
        if partial != path:
            partial.replace(path)
    except OSError as error:
        if partial != path:
            partial.unlink(missing_ok=True)
        raise UserError(f"--output {path} cannot be written ({error.strerror}): make room there, or name another "
                        "file") from error


def _written_first(path: Path) -> Path:
    """Where an output is written before it gets its name."""
    through = path.is_symlink() or (path.exists() and not path.is_file())       # /dev/stdout is both, for one
    return path if through else path.with_name(f".{os.getpid()}.partial")


def check_used(suspect: Suspect, told: bool = False) -> None:
    """UserError for an option that nothing would use: a paper or a variant that no attack and no defense has settings
    of; without an attack a trigger, or a target label, unless a defense is told it."""
    known = {key for package in ("attacks", "defenses") for module in plugins(package) for key in module.SETTINGS}
    for option, given, place in (("--paper", suspect.paper, 0), ("--variant", suspect.variant, 1)):
        if given not in (there := {key[place] for key in known}):
            raise UserError(f"unknown {option} {given}: choose one of {', '.join(sorted(there))}")
    for option, given in (("--trigger", suspect.trigger), ("--target", None if told else suspect.target)):
        if given is not None and suspect.attack is None:
            raise UserError(f"{option} without --attack tests nothing; name the attack")


def check_modality(what: str, module: ModuleType, dataset: str) -> None:
    """UserError where an attack or a defense is for other things than the data set holds."""
    made_for, held = getattr(module, "MODALITY", data.IMAGE), data.modality(dataset)
    if made_for != held:
        raise UserError(f"{what} is for {made_for}s, {dataset} holds {held}s: choose another")


def check_weights_output(path: Path, suspect: Suspect) -> None:
    """UserError unless weights can be written there without losing any."""
    if path.suffix != ".safetensors":
        raise UserError(f"--output {path}: repaired weights are written as .safetensors; name such a file")
    check_output(path, [given for given in (suspect.checkpoint, suspect.clean_model, suspect.trigger) if given])


def check_output(path: Path, inputs: Sequence[Path]) -> None:
    """UserError unless the file can be written, which is tried before hours are spent, and is none of the inputs, nor
    in a folder that is one."""
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: the folder {path.parent} does not exist")
    try:
        there = path.exists()
        if path.exists() and any(given.exists() and path.samefile(given) for given in inputs):
            raise UserError(f"--output {path} is one of the inputs and would be overwritten: name another file")
        if any(given.is_dir() and path.resolve().is_relative_to(given.resolve()) for given in inputs):
            raise UserError(f"--output {path} is inside a folder that is an input: name a file elsewhere")
        path.open("ab").close()
        partial = _written_first(path)
        partial.open("ab").close()
    except OSError as error:
        raise UserError(f"--output {path} cannot be written ({error.strerror}): name another file") from error
    if partial != path:
        partial.unlink()
    if not there:
        path.resolve().unlink()


def check_whole(folder: Path) -> None:
    """UserError where the folder is a run's, and something in it is not what it was when the run ended."""
    if all((folder / name).is_file() for name in ("done", "manifest.json")) and (reason := damage(folder)):
        raise UserError(f"{folder} is a damaged run ({reason}): compute it again, or take another copy")


def usable_devices(choice: str) -> tuple[str, ...]:
    """Devices for "auto", "cpu" or "cuda"; UserError where there is no CUDA device."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable CUDA device; leave --device out or say cpu")
    return default_devices(choice)


def settled_device(choice: str, threads: int) -> torch.device:
    """The one device that a command for somebody's own checkpoint runs on, with arithmetic that repeats."""
    torch.set_num_threads(threads)
    device = torch.device(usable_devices(choice)[0])
    repeatable(device)
    return device


def _networks(suspect: Suspect, loaded: Dataset) -> tuple[nn.Module, nn.Module | None]:
    """The checkpoint and, where one is named, the clean model, on the device."""
    place = settled_device(suspect.device, suspect.threads)

    def load(path: Path) -> nn.Module:
        check_whole(path.parent)
        network = load_checkpoint(path, suspect.model, loaded.num_classes, loaded.name)
        if suspect.normalize is not None:
            models.normalise_inputs(network, suspect.normalize)
        return network.to(place)

    return load(suspect.checkpoint), load(suspect.clean_model) if suspect.clean_model else None


def _test_set(suspect: Suspect, loaded: Dataset, clean_model: nn.Module | None) -> TestSet:
    """The data set's test images, and their triggered copies where an attack is named."""
    images, labels, classes = loaded.test_images, loaded.test_labels, loaded.num_classes
    if suspect.attack is None:
        return triggered_test_set(images, labels, classes, NONE, None, {}, suspect.seed)
    module = attack_module(suspect.attack)
    check_modality(f"attack {suspect.attack}", module, suspect.dataset)
    settings = settings_of(f"attack {suspect.attack}", module, suspect.paper, suspect.variant)
    if suspect.target is not None:
        if not 0 <= suspect.target < classes:
            raise UserError(f"--target {suspect.target}: {loaded.name} has labels 0 to {classes - 1}")
        settings = dataclasses.replace(settings, target=suspect.target)
    if "clean-model" in module.requires(settings) and clean_model is None and not suspect.trigger:
        raise UserError(f"attack {suspect.attack} {suspect.variant} builds its trigger on a clean model: name one with "
                        "--clean-model")
    if suspect.trigger:
        return _with_trigger(suspect.trigger, loaded, suspect.attack, settings, suspect.seed)
    if hasattr(module, "implant"):
        raise UserError(f"attack {suspect.attack} makes its trigger together with the victim: name the victim's with "
                        "--trigger (trigger.safetensors in its run folder)")
    state = prepare(suspect.attack, settings, loaded, suspect.seed, suspect.root, clean_model)
    return triggered_test_set(images, labels, classes, suspect.attack, settings, state, suspect.seed)


def _with_trigger(path: Path, loaded: Dataset, attack: str, settings: Any, seed: int) -> TestSet:
    """The test images and their copies with the trigger of `path`, which may be another attack's or another size's."""
    check_whole(path.parent)
    theirs = attack
    with contextlib.suppress(OSError, ValueError, AttributeError):      # a file that came without its run
        theirs = json.loads((path.parent / "config.json").read_text()).get("attack", attack)
    if theirs != attack:
        raise UserError(f"--trigger {path} is that of attack {theirs}, not of {attack}: name the one in the victim's "
                        "run folder")
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--trigger {path} is not a readable .safetensors file ({error})") from error
    images = loaded.test_images
    try:
        return triggered_test_set(images, loaded.test_labels, loaded.num_classes, attack, settings, state, seed)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise UserError(f"--trigger {path} is no trigger of attack {attack} for images of {tuple(images.shape[1:])} "
                        f"({error}): name the one in the victim's run folder") from error


def _defense_settings(repair: Repair, module: ModuleType, suspect: Suspect) -> Any:
    """Those of --paper if it has the defense, else those of the first paper that has this variant of it.

    A defense that is told the target label is told --target, else the label of the attack's settings.
    """
    variant = repair.defense_variant or suspect.variant
    paper = next((p for p, v in sorted(module.SETTINGS, key=lambda key: key[0] != suspect.paper) if v == variant),
                 suspect.paper)
    config = settings_of(f"defense {repair.defense}", module, paper, variant, "--defense-variant")
    if getattr(config, "target", None) is None:
        return config
    if suspect.target is None and suspect.attack is None:
        raise UserError(f"defense {repair.defense} {variant} is told the target label: name it with --target, or "
                        "choose a variant that finds it (--defense-variant described)")
    target = suspect.target
    if target is None:
        target = settings_of(f"attack {suspect.attack}", attack_module(suspect.attack), suspect.paper,
                           suspect.variant).target
    return dataclasses.replace(config, target=target)


def _clean_images(suspect: Suspect, repair: Repair, loaded: Dataset, place: torch.device) -> Clean:
    """What the defense may see, on the device."""
    if repair.images:
        clean = load_folder(repair.images, loaded.num_classes, loaded.train_images.shape[-1])
    else:
        fraction = CLEAN_FRACTION if repair.clean_fraction is None else repair.clean_fraction
        clean = clean_subset(loaded.train_images, loaded.train_labels, fraction, suspect.seed, loaded.num_classes)
    if not len(clean.images):
        raise UserError(f"--clean-fraction {repair.clean_fraction} of {len(loaded.train_images)} images is none: "
                        "raise it")
    return dataclasses.replace(clean, images=clean.images.to(place), labels=clean.labels.to(place))


def _measured(network: nn.Module, test: TestSet) -> dict[str, Any]:
    """The metrics that apply: without an attack, clean accuracy only."""
    values = metrics(evaluate(network, test))
    return values if len(test.index) else {name: values[name] for name in ("acc", "n_clean")}
