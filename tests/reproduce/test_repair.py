"""evaluate and defend on a checkpoint of the user's own."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from attacks import badnets
from reproduce import data, models
from reproduce.cli import main
from reproduce.models import build
from reproduce.protocols.nad import RELEASED
from reproduce.repair import settled_device
from reproduce.store import Store
from reproduce.training import Recipe, predict, train

COMMON = ["--model", "wrn-10-0.5", "--dataset", "digits"]
ATTACK = ["--attack", "badnets", "--paper", "nad", "--variant", "released", "--target", "3"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backdoored digit classifier, saved as the papers' scripts save theirs."""
    digits = data.load("digits", Path())
    settings = badnets.Config(target=3)
    poisoned = badnets.poison(digits.train_images, digits.train_labels, settings, {}, 0, 10)
    model = build("wrn-10-0.5", 10, 0)
    recipe = replace(RELEASED, epochs=6, rates=((0, 0.1), (4, 0.01)))
    train(model, poisoned.images, poisoned.labels, recipe, 0, phase="victim")
    path = tmp_path_factory.mktemp("own") / "own.pth.tar"
    torch.save({"state_dict": model.state_dict(), "epoch": 4}, path)
    return path


def call(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, arguments)
    return result.exit_code, result.output


def test_evaluate_prints_the_promised_json(checkpoint: Path) -> None:
    code, out = call("evaluate", "--checkpoint", str(checkpoint), *COMMON, *ATTACK, "--json")
    found = json.loads(out)
    assert code == 0
    assert list(found) == ["acc", "acc_nontarget", "asr", "base_rate", "ra", "n_clean", "n_nontarget"]
    digits = data.load("digits", Path())
    assert found["n_clean"] == 359 and found["n_nontarget"] == int((digits.test_labels != 3).sum())
    assert found["acc"] > 80 and found["asr"] > 80


def test_the_target_matters(checkpoint: Path) -> None:
    wrong = [*ATTACK[:-1], "4"]
    found = json.loads(call("evaluate", "--checkpoint", str(checkpoint), *COMMON, *wrong, "--json")[1])
    assert found["asr"] < 20


def test_without_an_attack_clean_accuracy_only(checkpoint: Path) -> None:
    found = json.loads(call("evaluate", "--checkpoint", str(checkpoint), *COMMON, "--json")[1])
    assert set(found) == {"acc", "n_clean"}


@pytest.mark.parametrize("defense", ["ft", "nad"])
def test_defend_repairs_and_what_it_wrote_loads_again(checkpoint: Path, tmp_path: Path, defense: str) -> None:
    output = tmp_path / "repaired.safetensors"
    code, out = call("defend", "--checkpoint", str(checkpoint), *COMMON, "--defense", defense, "--clean-fraction",
                     "0.1", "--seed", "0", *ATTACK, "--output", str(output), "--json")
    found = json.loads(out)
    assert code == 0 and found["before"]["asr"] > 80 and found["seconds"] > 0
    assert found["after"]["asr"] != found["before"]["asr"]
    again = json.loads(call("evaluate", "--checkpoint", str(output), *COMMON, *ATTACK, "--json")[1])
    assert again == found["after"]


def test_own_images_are_the_clean_set(checkpoint: Path, tmp_path: Path) -> None:
    digits = data.load("digits", Path())
    for i in range(60):
        folder = tmp_path / "images" / str(int(digits.train_labels[i]))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.train_images[i].permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    output = tmp_path / "r.safetensors"
    code, out = call("defend", "--checkpoint", str(checkpoint), *COMMON, "--defense", "ft", "--images",
                     str(tmp_path / "images"), "--output", str(output), "--json")
    found = json.loads(out)
    assert code == 0 and found["clean_images"] == 60 and set(found["before"]) == {"acc", "n_clean"}


def test_a_checkpoint_of_backdoorbench_is_normalised_as_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digits stand in for a data set with a normalisation: what evaluate and defend see is the network's own."""
    monkeypatch.setitem(models.NORMALISATIONS, "digits", ((0.9, 0.1, 0.5), (0.05, 0.3, 2.0)))
    digits, name = data.load("digits", Path()), "preact-resnet-18-w8"
    model = build(name, 10, 0, "digits")
    train(model, digits.train_images[:600], digits.train_labels[:600], Recipe(4, ((0, 0.05),), batch=32), 0, phase="v")
    path = tmp_path / "attack_result.pt"
    torch.save({"model_name": "preactresnet18", "num_classes": 10, "model": model.state_dict(),
                "bd_test": {"original_index": np.array([1, 2])}}, path)
    arguments = ["--checkpoint", str(path), "--model", name, "--dataset", "digits", "--json"]
    found = {option: json.loads(call("evaluate", *arguments, *(["--normalize", option] if option else []))[1])["acc"]
             for option in (None, "none", "cifar10")}
    for option, normalisation in (("none", None), ("cifar10", models.CHECKPOINT_NORMALISATIONS["cifar10"])):
        other = build(name, 10, 0)
        other.load_state_dict(model.state_dict())
        if normalisation:
            other.set_normalisation(normalisation)
        right = (predict(other.eval(), digits.test_images) == digits.test_labels).float().mean().item()
        assert found[option] == pytest.approx(100 * right, abs=1e-3)
    right = (predict(model, digits.test_images) == digits.test_labels).float().mean().item()
    assert found[None] == pytest.approx(100 * right, abs=1e-3) and found[None] > found["none"] + 5
    code, out = call("defend", *arguments, "--defense", "ft", "--output", str(tmp_path / "r.safetensors"))
    repaired = json.loads(out)
    assert code == 0 and repaired["before"]["acc"] == found[None]
    arguments[1] = str(tmp_path / "r.safetensors")
    assert json.loads(call("evaluate", *arguments)[1]) == repaired["after"]


@pytest.mark.parametrize(("change", "said"), [
    (["--output", "x.pth"], "written as .safetensors"),
    (["--output", "/nonexistent/x.safetensors"], "does not exist"),
    (["--output", "/proc/x.safetensors"], "cannot be written"),
    (["--output", "a" * 300 + ".safetensors"], "cannot be written"),
    (["--paper", "nope"], "unknown --paper nope: choose one of"),
    (["--defense-variant", "nope"], "--defense-variant described"),
    (["--images", ".", "--clean-fraction", "0.5"], "leave one out"),
    (["--clean-fraction", "nan"], "no finite number"),
    (["--defense", "mcr", "--clean-fraction", "0.0008"], "one is too few"),
    (["--defense", "anp", "--defense-variant", "described", "--clean-fraction", "0.0008"], "one is too few"),
    (["--defense", "rnp", "--clean-fraction", "0.0008"], "one is too few"),
    (["--defense", "magic"], "choose one of"),
    (["--attack", "cl"], "--variant described"),
    (["--attack", "cl", "--variant", "described"], "name one with --clean-model"),
    (["--target", "11"], "labels 0 to 9"),
    (["--clean-fraction", "0.0001"], "is none"),
    (["--clean-fraction", "2"], "--clean-fraction"),
    (["--model", "wrn-16-1"], "choose the right --model"),
    (["--normalize", "imagenet"], "--normalize"),
    (["--device", "tpu"], "--device"),
])
def test_bad_requests_get_one_line(checkpoint: Path, tmp_path: Path, change: list[str], said: str) -> None:
    arguments = {"--checkpoint": str(checkpoint), "--model": "wrn-10-0.5", "--dataset": "digits", "--defense": "ft",
                 "--attack": "badnets", "--output": str(tmp_path / "r.safetensors")}
    arguments |= dict(zip(change[::2], change[1::2], strict=True))
    code, out = call("defend", *(part for pair in arguments.items() for part in pair))
    assert code == 2 and said in out and len(out.strip().splitlines()) == 1
    assert not (tmp_path / "r.safetensors").exists()


@pytest.mark.parametrize(("option", "said"), [
    (("--target", "3"), "name the attack"), (("--trigger", "nowhere.safetensors"), "name the attack"),
    (("--variant", "nope"), "unknown --variant nope: choose one of")])
def test_what_only_an_attack_uses_is_refused_without_one(checkpoint: Path, option: tuple[str, str], said: str) -> None:
    code, out = call("evaluate", "--checkpoint", str(checkpoint), *COMMON, *option)
    assert code == 2 and said in out


@pytest.mark.usefixtures("no_room")
def test_what_was_measured_is_said_where_the_weights_cannot_be_written(checkpoint: Path, tmp_path: Path) -> None:
    code, out = call("defend", "--checkpoint", str(checkpoint), *COMMON, *ATTACK, "--defense", "clp",
                     "--output", str(tmp_path / "r.safetensors"))
    numbers, error = out.strip().splitlines()
    assert code == 2 and error.startswith("error: ") and "make room" in error
    assert json.loads(numbers)["output"] is None and 0 <= json.loads(numbers)["after"]["asr"] <= 100


def test_a_damaged_run_is_no_checkpoint(tmp_path: Path) -> None:
    run = Store(tmp_path).write("victim", config={}, environment={}, metrics={}, history=[], arrays={},
                                tensors={"model": build("wrn-10-0.5", 10, 0).state_dict()})
    (run.path / "metrics.json").write_text("{ }")
    code, out = call("evaluate", "--checkpoint", str(run.path / "model.safetensors"), *COMMON)
    assert code == 2 and "is a damaged run (metrics.json does not match its checksum)" in out


def test_the_suspect_is_not_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    suspect = tmp_path / "suspect.safetensors"
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    save_file({name: value.contiguous() for name, value in weights.items()}, suspect)
    before = suspect.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(suspect)
    for output in (suspect, tmp_path / "link.safetensors"):
        code, out = call("defend", "--checkpoint", str(suspect), *COMMON, "--defense", "ft", "--output", str(output))
        assert code == 2 and "would be overwritten" in out and suspect.read_bytes() == before


@pytest.mark.data
def test_the_authors_checkpoint_gives_the_published_numbers(data_root: Path) -> None:
    path = data_root / "checkpoints/nad/WRN-16-1-S-model_best.pth.tar"
    if not path.exists():
        pytest.skip(f"no {path}")
    found = json.loads(call("evaluate", "--checkpoint", str(path), "--model", "wrn-16-1", "--dataset", "cifar10",
                            "--attack", "badnets", "--target", "5", "--data-root", str(data_root), "--json")[1])
    # README.md and results/results.csv of bboylyg/NAD@f17b713, before erasing.
    assert found["acc_nontarget"] == pytest.approx(85.6556, abs=0.01) and found["asr"] == 100


def test_a_trigger_made_with_the_victim_must_be_named(checkpoint: Path, tmp_path: Path) -> None:
    warping = ["--checkpoint", str(checkpoint), *COMMON, "--attack", "wanet", "--paper", "wanet"]
    code, out = call("evaluate", *warping)
    assert code == 2 and "attack wanet makes its trigger together with the victim: name the victim's" in out
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    for name in ("bad.safetensors", "missing.safetensors"):
        code, out = call("evaluate", *warping, "--trigger", str(tmp_path / name))
        assert code == 2 and "is not a readable .safetensors file" in out
    for field in ({"mask": torch.ones(3)}, {"field": torch.zeros(64, 64, 2)}, {"field": torch.zeros(3)}):
        save_file(field, tmp_path / "trigger.safetensors")
        code, out = call("evaluate", *warping, "--trigger", str(tmp_path / "trigger.safetensors"))
        assert code == 2 and len(out.strip().splitlines()) == 1
        assert "is no trigger of attack wanet for images of (3, 32, 32)" in out
    (tmp_path / "config.json").write_text('{"attack": "blend"}')
    code, out = call("evaluate", *warping, "--trigger", str(tmp_path / "trigger.safetensors"))
    assert code == 2 and "is that of attack blend, not of wanet" in out
    (tmp_path / "config.json").write_text('{"attack": "wanet"}')
    axis = torch.linspace(-1, 1, 32)
    identity = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), 2).contiguous()
    save_file({"field": identity}, tmp_path / "trigger.safetensors")
    found = json.loads(call("evaluate", *warping, "--trigger", str(tmp_path / "trigger.safetensors"), "--json")[1])
    assert found["asr"] < 20 and found["ra"] > 80  # a warping that moves nothing


def test_threads_are_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    assert settled_device("cpu", 3).type == "cpu" and asked == [3]
