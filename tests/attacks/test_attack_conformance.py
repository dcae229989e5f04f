"""Every attack in attacks/ keeps the contract of attacks/__init__.py, under every setting it lists."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import attacks
from reproduce.plugins import names
from reproduce.poisoning import LABEL_RULES, Context, attack_module

NAMES = names(Path(attacks.__file__).parent)
CASES = [(name, key) for name in NAMES for key in attack_module(name).SETTINGS]
# What makes a setting expensive without changing what is tested.
QUICK = {"steps": 3, "images": 4, "size": 64, "versions": 4}


def quick(config: Any) -> Any:
    fields = {field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{name: value for name, value in QUICK.items() if name in fields})


@pytest.fixture(params=CASES, ids=lambda case: "-".join([case[0], *case[1]]))
def case(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """(module, config) of one setting of one attack."""
    name, key = request.param
    module = attack_module(name)
    return module, quick(module.SETTINGS[key])


def test_the_papers_six_attacks_are_there() -> None:
    assert {"badnets", "trojan", "blend", "cl", "sig", "refool"} <= set(NAMES)


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


def test_poison(case: tuple[Any, Any], context: Context) -> None:
    module, config = case
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
        assert int(mask.sum()) == int(int((labels == config.target).sum()) * config.rate)
    else:
        assert int(mask.sum()) == int(len(labels) * config.rate)
    again = module.poison(images, labels, config, state, 7, context.num_classes)
    assert torch.equal(again.images, poisoned.images) and torch.equal(again.mask, mask)


def test_another_seed_poisons_other_images(case: tuple[Any, Any], context: Context) -> None:
    module, config = case
    masks = []
    for seed in (7, 8):
        seeded = dataclasses.replace(context, seed=seed)
        state = module.prepare(config, seeded)
        masks.append(module.poison(context.images, context.labels, config, state, seed, context.num_classes).mask)
    assert not torch.equal(*masks)


def test_all_to_all(case: tuple[Any, Any], context: Context) -> None:
    module, config = case
    if config.labels == "clean-label":
        pytest.skip("keeps labels by design")
    config = dataclasses.replace(config, labels="all-to-all")
    state = module.prepare(config, context)
    poisoned = module.poison(context.images, context.labels, config, state, 7, context.num_classes)
    mask = poisoned.mask
    assert torch.equal(poisoned.labels[mask], (context.labels[mask] + 1) % 10)
    assert torch.equal(poisoned.labels[~mask], context.labels[~mask])
    assert set(poisoned.labels[mask].tolist()) == set(range(10))


def test_target_and_rate_are_settings(case: tuple[Any, Any], context: Context) -> None:
    module, config = case
    config = dataclasses.replace(config, target=2, rate=0.25)
    state = module.prepare(config, context)
    poisoned = module.poison(context.images, context.labels, config, state, 7, context.num_classes)
    assert (poisoned.labels[poisoned.mask] == 2).all()
    assert int(poisoned.mask.sum()) == (10 if config.labels == "clean-label" else 100)
