"""Every attack on images in attacks/ keeps the contract of attacks/__init__.py, under every setting it lists."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as loads
from safetensors.torch import save as saves

import attacks
from reproduce.data.augment import Augment
from reproduce.models import build
from reproduce.plugins import names
from reproduce.poisoning import LABEL_RULES, Context, attack_module
from reproduce.store import Progress
from reproduce.training import Recipe

NAMES = [name for name in names(Path(attacks.__file__).parent) if not hasattr(attack_module(name), "MODALITY")]
CASES = [(name, key) for name in NAMES for key in attack_module(name).SETTINGS]
# What makes a setting expensive without changing what is tested.
QUICK = {"steps": 3, "images": 4, "size": 64, "versions": 4, "width": 4, "mask_epochs": 2, "passes": 1}
RECIPE = Recipe(epochs=2, rates=((0, 0.1), (1, 0.01)), batch=32, augment=Augment(crop=2))


def quick(config: Any) -> Any:
    fields = {field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{name: value for name, value in QUICK.items() if name in fields})


def chosen(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """(module, config) of one setting of one attack."""
    name, key = request.param
    module = attack_module(name)
    return module, quick(module.SETTINGS[key])


def cases(kind: str = "", paper: str = "") -> Any:
    """A fixture over every setting, or those of one paper and of attacks that define `kind`: "poison" or "implant"."""
    found = [(name, key) for name, key in CASES
             if (not kind or hasattr(attack_module(name), kind)) and paper in ("", key[0])]
    return pytest.fixture(params=found, ids=lambda case: "-".join([case[0], *case[1]]))(chosen)


case, poisoning, implanting = cases(), cases("poison"), cases("implant")
fmps = cases("poison", "fmp")


def test_the_papers_six_attacks_are_there() -> None:
    assert {"badnets", "trojan", "blend", "cl", "sig", "refool"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_attack_poisons_data_or_controls_the_training(name: str) -> None:
    module = attack_module(name)
    assert hasattr(module, "poison") != hasattr(module, "implant")


def test_config(case: tuple[Any, Any]) -> None:
    module, config = case
    assert isinstance(config, module.Config)
    assert type(config).__dataclass_params__.frozen
    assert isinstance(config.target, int) and 0 < config.rate <= 1 and config.labels in LABEL_RULES
    assert module.requires(config) <= {"clean-model", "pictures", "own-images", "arrays"}
    assert hash(config) == hash(dataclasses.replace(config))


def test_it_asks_for_all_it_uses(case: tuple[Any, Any], context: Context) -> None:
    module, config = case
    needed = module.requires(config)
    module.prepare(config, dataclasses.replace(
        context,
        clean_model=context.clean_model if "clean-model" in needed else None,
        pictures=context.pictures if needed & {"pictures", "own-images"} else None,
        array=context.array if "arrays" in needed else None))


def test_state_is_plain_tensors_and_fixed_by_the_seed(case: tuple[Any, Any], context: Context) -> None:
    module, config = case
    first, second = module.prepare(config, context), module.prepare(config, context)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert isinstance(value, torch.Tensor) and value.is_contiguous() and value.device.type == "cpu"
        assert torch.equal(value, second[key])
    assert all(torch.equal(value, first[key]) for key, value in loads(saves(first)).items())


def test_a_state_for_training_only_is_not_read_by_apply(case: tuple[Any, Any], context: Context) -> None:
    module, config = case
    if not hasattr(module, "TRAINING_ONLY"):
        pytest.skip("its state is part of the trigger")
    images = context.images[:8]
    assert torch.equal(module.apply(images, config, module.prepare(config, context), 7, "test"),
                       module.apply(images, config, {}, 7, "test"))


def test_apply(case: tuple[Any, Any], context: Context) -> None:
    module, config = case
    state = module.prepare(config, context)
    images = context.images[:40]
    before = images.clone()
    for split in ("train", "test"):
        result = module.apply(images, config, state, 7, split)
        assert result.dtype == torch.uint8 and result.shape == images.shape
        assert torch.equal(images, before)
        assert result.data_ptr() != images.data_ptr()
        assert (result != images).flatten(1).any(1).all()
        assert torch.equal(result, module.apply(images, config, state, 7, split))
        assert torch.equal(result, module.apply(images.contiguous(), config, state, 7, split))
    assert len(module.apply(images[:0], config, state, 7, "test")) == 0


def poisoned_count(config: Any, labels: torch.Tensor) -> int:
    """How many of the images the label rule, or `sources` where a setting has that, says are poisoned."""
    sources = getattr(config, "sources", None)
    of_target = int((labels == config.target).sum())
    if sources:
        return min(int(len(labels) * config.rate), of_target if sources == "target" else len(labels) - of_target)
    return int((of_target if config.labels == "clean-label" else len(labels)) * config.rate)


def test_poison(poisoning: tuple[Any, Any], context: Context) -> None:
    module, config = poisoning
    state = module.prepare(config, context)
    images, labels = context.images, context.labels
    before = images.clone(), labels.clone()
    poisoned = module.poison(images, labels, config, state, 7, context.num_classes)
    assert torch.equal(images, before[0]) and torch.equal(labels, before[1])
    mask = poisoned.mask
    assert mask.dtype == torch.bool and poisoned.images.dtype == torch.uint8 and poisoned.labels.dtype == torch.int64
    assert torch.equal(poisoned.images[~mask], images[~mask]) and torch.equal(poisoned.labels[~mask], labels[~mask])
    assert (poisoned.images[mask] != images[mask]).flatten(1).any(1).all()
    assert (poisoned.labels[mask] == config.target).all()
    if config.labels == "clean-label":
        assert (labels[mask] == config.target).all()
    assert int(mask.sum()) == poisoned_count(config, labels)
    again = module.poison(images, labels, config, state, 7, context.num_classes)
    assert torch.equal(again.images, poisoned.images) and torch.equal(again.mask, mask)


def test_another_seed_poisons_other_images(poisoning: tuple[Any, Any], context: Context) -> None:
    module, config = poisoning
    config = dataclasses.replace(config, rate=config.rate / 2)  # so that no setting takes all of a class
    masks = []
    for seed in (7, 8):
        seeded = dataclasses.replace(context, seed=seed)
        state = module.prepare(config, seeded)
        masks.append(module.poison(context.images, context.labels, config, state, seed, context.num_classes).mask)
    assert not torch.equal(*masks)


def test_all_to_all(poisoning: tuple[Any, Any], context: Context) -> None:
    module, config = poisoning
    if config.labels == "clean-label" or getattr(config, "sources", None):
        pytest.skip("keeps labels or chooses classes by design")
    config = dataclasses.replace(config, labels="all-to-all")
    state = module.prepare(config, context)
    poisoned = module.poison(context.images, context.labels, config, state, 7, context.num_classes)
    mask = poisoned.mask
    assert torch.equal(poisoned.labels[mask], (context.labels[mask] + 1) % 10)
    assert torch.equal(poisoned.labels[~mask], context.labels[~mask])
    assert set(poisoned.labels[mask].tolist()) == set(range(10))


def test_target_and_rate_are_settings(poisoning: tuple[Any, Any], context: Context) -> None:
    module, config = poisoning
    config = dataclasses.replace(config, target=2, rate=0.25)
    state = module.prepare(config, context)
    poisoned = module.poison(context.images, context.labels, config, state, 7, context.num_classes)
    assert (poisoned.labels[poisoned.mask] == 2).all()
    expected = 10 if config.labels == "clean-label" else 100
    assert int(poisoned.mask.sum()) == (40 if getattr(config, "sources", None) == "target" else expected)


@pytest.mark.parametrize("rate", [0.001, 0.01, 0.1])
def test_fmps_rates_are_shares_of_the_whole_set(fmps: tuple[Any, Any], rate: float, context: Context) -> None:
    module, config = fmps
    config = dataclasses.replace(config, rate=rate)
    # 2,000 images, a tenth of them the target's.
    many = dataclasses.replace(context, images=context.images.repeat(5, 1, 1, 1), labels=context.labels.repeat(5))
    poisoned = module.poison(many.images, many.labels, config, module.prepare(config, many), 7, 10)
    assert config.target == 0 and int(poisoned.mask.sum()) == 2000 * rate
    classes = set(many.labels[poisoned.mask].tolist())
    sources = getattr(config, "sources", None)
    if sources == "target":
        assert classes == {0}
    elif rate == 0.1:
        assert classes == set(range(1, 10) if sources else range(10))
    assert (poisoned.labels[poisoned.mask] == 0).all()


class Interrupted(Exception):
    pass


def implanted(module: Any, config: Any, context: Context, seed: int = 7, initial: int = 0, progress: Any = None,
              stop: int | None = None) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[dict]]:
    """(weights, state, history) of a short training on 80 images, broken off after `stop` epochs of any phase."""
    images, labels = context.images[:80], context.labels[:80]
    state = module.prepare(config, dataclasses.replace(context, images=images, labels=labels, seed=seed))
    model, finished = build("wrn-10-1", context.num_classes, initial), 0

    def observe(*_: object) -> None:
        nonlocal finished
        finished += 1
        if finished == stop:
            raise Interrupted

    history, state = module.implant(model, images, labels, config, state, RECIPE, seed, context.num_classes, observe,
                                    progress)
    assert not model.training
    return model.state_dict(), state, history


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_implant(implanting: tuple[Any, Any], context: Context) -> None:
    module, config = implanting
    before = context.images.clone(), context.labels.clone()
    weights, state, history = implanted(module, config, context)
    assert torch.equal(context.images, before[0]) and torch.equal(context.labels, before[1])
    assert not torch.equal(weights["fc.weight"], build("wrn-10-1", 10, 0).fc.weight)
    assert state.keys() == module.prepare(config, context).keys()
    assert all(value.is_contiguous() and value.device.type == "cpu" for value in state.values())
    images = context.images[:10]
    stored = loads(saves(state))
    assert torch.equal(module.apply(images, config, state, 7, "test"), module.apply(images, config, stored, 7, "test"))
    rows = [row for row in history if row.get("phase", "victim") == "victim"]
    assert [row["epoch"] for row in rows] == [1, 2] and [row["rate"] for row in rows] == [0.1, 0.01]
    assert history[-2:] == rows and all("train_acc" in row for row in rows)
    again = implanted(module, config, context)
    assert equal(weights, again[0]) and equal(state, again[1]) and history == again[2]
    other = implanted(module, config, context, seed=8)
    assert not equal(weights, other[0]) and not equal(state, other[1])


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_an_interrupted_implant_ends_bit_for_bit_the_same(implanting: tuple[Any, Any], context: Context, stop: int,
                                                          tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, config = implanting
    monkeypatch.setattr(Progress, "interval", 0.0)
    weights, state, history = implanted(module, config, context)
    if stop >= len(history):
        pytest.skip("it has no more epochs")
    with pytest.raises(Interrupted):
        implanted(module, config, context, progress=Progress(tmp_path / "p"), stop=stop)
    # Other initial weights, wherever the victim's training had begun: all of them must come from the checkpoint.
    initial = 5 if any(row.get("phase") != "masks" for row in history[:stop]) else 0
    resumed = implanted(module, config, context, initial=initial, progress=Progress(tmp_path / "p"))
    assert equal(weights, resumed[0]) and equal(state, resumed[1]) and history == resumed[2]
