"""Every attack and defense runs on a device that is not the CPU: nothing is left behind on the wrong side."""

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import attacks
import defenses
from benchmarks.bench import measure
from benchmarks.limits import clock, peak
from benchmarks.stages import ON_GPU, QUICK, STAGES, Bench
from reproduce import data
from reproduce.cells import Cell, Victim
from reproduce.cli import main
from reproduce.data.augment import Augment
from reproduce.defending import defense_module
from reproduce.finetuning import TextRecipe
from reproduce.models import build
from reproduce.models.encoder import TINY
from reproduce.plugins import names
from reproduce.poisoning import attack_module
from reproduce.runner import Runner
from reproduce.store import Store
from reproduce.training import Recipe, train
from tests import pretend
from tests.attacks.test_attack_conformance import quick
from tests.defenses.shortened import shortened
from tests.defenses.text_victim import save_suspect
from tests.pretend import DEVICE, Pretending

NOWHERE = Path("no-data-needed")
# What only rewrites pixels or sentences never leaves the CPU; its victims are trained as the others are.
REWRITING = {"blend", "sig", "refool", "addsent", "stylebkd", "synbkd"}
ATTACKS = sorted(set(names(Path(attacks.__file__).parent)) - REWRITING)
DEFENSES = names(Path(defenses.__file__).parent)
# FMP prunes one map in p, and these convolutions have fewer than 64; t-SNE asks for as many steps; one epoch is enough.
NEEDED = {"fmp": {"p": 8}, "cube": {"iterations": 250}, "input_aware": {"mask_epochs": 1}}


def victim(attack: str) -> Victim:
    """One of the attack's, briefly trained, in the first of its settings that needs no file."""
    module = attack_module(attack)
    config = next(config for config in module.SETTINGS.values() if "arrays" not in module.requires(config))
    config = replace(quick(config), **NEEDED.get(attack, {}))
    if hasattr(module, "MODALITY"):
        return Victim("sentences", TINY, TextRecipe(epochs=1, rate=2e-3, warmup=1, batch=32), 0, attack, config)
    return Victim("digits", "wrn-10-0.5", Recipe(epochs=1, rates=((0, 0.1),)), 0, attack, config)


@pytest.fixture(scope="module", autouse=True)
def few() -> Iterator[None]:
    """A third of the digits: what stays behind on the wrong side does so with few images too."""
    digits = data.load("digits", NOWHERE)
    third = replace(digits, **{name: getattr(digits, name)[::3].contiguous(memory_format=torch.channels_last)
                               if name.endswith("images") else getattr(digits, name)[::3]
                               for name in ("train_images", "train_labels", "test_images", "test_labels")})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(data, "load", lambda name, root: third)
        yield


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """With what the defenses are tried on, computed on the CPU."""
    runner = Runner(Store(tmp_path_factory.mktemp("here")), NOWHERE, torch.device("cpu"))
    for attack in ("badnets", "badnets_words"):
        runner.run(victim(attack))
    return runner


@pytest.fixture
def pretending(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Autocast, which is off, and the fused Adam, which GPUs have, know no such device."""
    optimizer = import_module("torch.optim.optimizer")
    autocast, fused = torch.autocast, optimizer._get_fused_kernels_supported_devices
    monkeypatch.setattr(torch, "autocast", lambda device, *rest, **options: autocast(
        "cpu" if device == DEVICE.type else device, *rest, **options))
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: [*fused(), DEVICE.type])
    with Pretending():
        yield


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack(attack: str, here: Runner, pretending: None, tmp_path: Path) -> None:
    task = victim(attack)
    found = Runner(Store(tmp_path), NOWHERE, DEVICE).run(task)
    if there := here.store.find(task.name):
        # A GPU's batches are larger, and products are summed in another order.
        assert found.predictions().agreement(there.predictions()) > 99


@pytest.mark.parametrize("defense", DEFENSES)
def test_defense(defense: str, here: Runner, pretending: None) -> None:
    module = defense_module(defense)
    config = replace(shortened(next(iter(module.SETTINGS.values()))), **NEEDED.get(defense, {}))
    attack = "badnets_words" if getattr(module, "MODALITY", None) == data.TEXT else "badnets"
    found = Runner(here.store, NOWHERE, DEVICE).run(Cell(victim(attack), defense, config, 0.15))
    assert found.json("metrics")["n_clean"] > 0


SUSPECT = "--checkpoint suspect.pth.tar --model wrn-10-1 --dataset digits --attack badnets --paper nad --target 5"


@pytest.mark.parametrize("command", [
    f"evaluate {SUSPECT}",
    f"defend {SUSPECT} --defense ft --output repaired.safetensors",
    "purify --checkpoint model --clean clean.tsv --input input.txt --output purified.jsonl --epochs 1"])
def test_command(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.chdir(tmp_path)
    if "suspect" in command:
        torch.save({"state_dict": build("wrn-10-1", 10, 0).state_dict()}, "suspect.pth.tar")
    else:
        save_suspect(tmp_path)
    monkeypatch.setattr("reproduce.repair.default_devices", lambda choice: (str(DEVICE),))
    request.getfixturevalue("pretending")
    done = CliRunner().invoke(main, [*command.split(), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output


def test_an_epoch_is_sent_over_at_once(pretending: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy to a GPU waits for all that was started there, so how many there are must not grow with the batches."""
    sent = []
    copied = pretend._run

    def counted(func: Any, args: tuple, kwargs: dict) -> Any:
        if func in pretend.ACROSS and kwargs.get("device") == DEVICE and not isinstance(args[0], pretend.Elsewhere):
            sent.append(args[0].shape)
        return copied(func, args, kwargs)

    monkeypatch.setattr(pretend, "_run", counted)
    images, labels = torch.zeros(60, 3, 16, 16, dtype=torch.uint8).to(DEVICE), (torch.arange(60) % 10).to(DEVICE)
    for batch in (30, 5):
        model = build("wrn-10-0.5", 10, 0).to(DEVICE)
        sent.clear()
        train(model, images, labels, Recipe(epochs=1, rates=((0, 0.01),), batch=batch, augment=Augment(crop=2)), 0,
              phase="v")
        assert sent == [(60, 5), (60,)]


@pytest.mark.parametrize("name", ON_GPU)
def test_benchmark(name: str, pretending: None) -> None:
    stage, = STAGES[name](Bench(QUICK, device=DEVICE))
    rows = measure(replace(stage, ours={"fp32": stage.ours["fp32"]}), 1, clock(DEVICE),
                   peak_of=lambda precision: peak(DEVICE, precision, 64))
    assert rows[0].limit and rows[0].our_rate > 0


def test_a_gpu_repeats_itself_in_full_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                request: pytest.FixtureRequest) -> None:
    # So that all is as before afterwards.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    for name in ("cpu", "cuda"):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
        Runner(Store(tmp_path), NOWHERE, torch.device(name))
        assert torch.are_deterministic_algorithms_enabled() == (name == "cuda") != torch.backends.cudnn.allow_tf32


def test_the_pretended_device_refuses_what_a_gpu_does(pretending: None) -> None:
    there = torch.tensor([1.0, 2.0, 3.0], device=DEVICE)
    assert there.device == DEVICE and (2 * there).sum().item() == 12
    assert there[torch.tensor([2])].tolist() == [3.0]
    there[[0, 1]] = torch.zeros(2).to(DEVICE)
    assert there.cpu().equal(torch.tensor([0.0, 0.0, 3.0]))
    assert (there * torch.tensor(2.0)).tolist() == [0.0, 0.0, 6.0]
    for mixed in (lambda: there + torch.ones(3), lambda: there[:2].add_(torch.ones(2)),
                  lambda: torch.stack([there[0], torch.tensor(1.0)]), lambda: there.numpy()):
        with pytest.raises((RuntimeError, TypeError)):
            mixed()
