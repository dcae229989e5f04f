"""Every file in defenses/ that is for images, at every one of its settings, keeps the contract of the package."""

import dataclasses
import json
from copy import deepcopy
from pathlib import Path

import pytest
from torch import nn

from defenses import ft
from reproduce import training
from reproduce.defending import Clean, Defended, defense_module
from reproduce.models import build
from reproduce.plugins import names

MODULES = [name for name in names(Path(__file__).parents[2] / "defenses")
           if not hasattr(defense_module(name), "MODALITY")]
DATA_FREE = {"clp"}     # nothing is trained or drawn
TEST_DATA = {("anp", "oracle"): {"test-asr"}}
CASES = [(name, *key) for name in MODULES for key in defense_module(name).SETTINGS]


def test_the_baselines_of_nad_are_there():
    assert {"ft", "fp", "mcr", "nad"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_has_what_a_defense_module_has(name):
    module = defense_module(name)
    assert module.Config.__dataclass_params__.frozen
    assert module.SETTINGS and all(isinstance(config, module.Config) for config in module.SETTINGS.values())
    assert module.__doc__ and callable(module.defend)


@pytest.mark.parametrize(("name", "paper", "variant"), CASES)
def test_settings_survive_json(name, paper, variant):
    module = defense_module(name)
    config = module.SETTINGS[paper, variant]
    assert module.requires(config) <= {"clean-model"} | TEST_DATA.get((name, variant), set()) \
        or (name == "fmp" and config.leak)
    json.dumps(dataclasses.asdict(config), allow_nan=False)
    assert hash(config) == hash(dataclasses.replace(config))


# FMP's released script without one of its faults: each of them is in a case of its own.
@pytest.mark.parametrize(("name", "paper", "variant"), [
    case for case in CASES if not case[2].startswith("released without")])
def test_defends_a_copy_repeatably_and_reports(name, paper, variant, victim, clean, shorten, same):
    module = defense_module(name)
    config = shorten(module.SETTINGS[paper, variant])
    other = build("wrn-10-1", 10, seed=9).eval() if "clean-model" in module.requires(config) else None
    if "test-images" in module.requires(config):
        clean = dataclasses.replace(clean, test=clean.images[:40].flip(3))
    if "test-asr" in module.requires(config):
        clean = dataclasses.replace(clean, measured=lambda model: (50.0, 50.0))
    base = getattr(module, "builds_on", lambda config: None)(config)
    start = [{"base": defense_module(base[0]).defend(victim, clean, base[1], seed).tensors} if base else {}
             for seed in (5, 6)]
    before, images, labels, heard = deepcopy(victim), clean.images.clone(), clean.labels.clone(), []

    def observe(phase, epoch, epochs, model, row):
        assert 1 <= epoch <= epochs and not model.training and isinstance(model, nn.Module)
        heard.append((phase, epoch, row["loss"]))

    first = module.defend(victim, clean, config, 5, observe=observe, clean_model=other, **start[0])
    second = module.defend(victim, clean, config, 5, clean_model=other, **start[0])
    third = module.defend(victim, clean, config, 6, clean_model=other, **start[1])

    assert same(victim, before) and victim.training and all(p.requires_grad for p in victim.parameters())
    assert clean.images.equal(images) and clean.labels.equal(labels)
    assert isinstance(first, Defended) and type(first.model) is type(victim) and not first.model.training
    assert not {p.data_ptr() for p in first.model.parameters()} & {p.data_ptr() for p in victim.parameters()}
    assert same(first.model, second.model)
    # A defense that finds nothing to prune or to unlearn says so and leaves the model alone.
    idle = first.info.get("pruned") == 0 or first.info.get("unlearnt") == []
    assert same(first.model, victim) == idle
    assert same(first.model, third.model) <= (idle or name in DATA_FREE)
    assert heard or base or name in DATA_FREE
    assert len({(phase, epoch) for phase, epoch, _ in heard}) == len(heard), "phases must have distinct names"
    json.dumps(first.info, allow_nan=False)


@pytest.mark.parametrize(("name", "paper", "variant"), CASES)
def test_work_beside_recipes_grows_with_the_classes_it_inverts(name, paper, variant):
    module = defense_module(name)
    if not hasattr(module, "work"):
        pytest.skip("has nothing but recipes")
    config = module.SETTINGS[paper, variant]
    ten, forty = (module.work(config, 2500, classes) for classes in (10, 43))
    base = getattr(module, "builds_on", lambda config: None)(config)
    shared = base is not None and base[0] == name       # the search is that run's
    assert ten > 2500 or (name == "fmp" and config.select != "lowest") or shared
    assert ten == 0 or not shared
    inverts_all = name == "nc" and config.target is None    # MCLDef takes it from a run of NC
    assert (forty > ten) == inverts_all


@pytest.mark.parametrize(("name", "paper", "variant"), [
    case for case in CASES if hasattr(defense_module(case[0]), "trained")])
@pytest.mark.parametrize("count", [100, 61])
def test_its_recipes_see_as_many_images_as_it_says(name, paper, variant, count, victim, clean, shorten, monkeypatch):
    module = defense_module(name)
    config = shorten(module.SETTINGS[paper, variant])
    limit = next(field for field in ("subset", "epoch_images") if hasattr(config, field))
    seen = []
    train = training.train

    def counted(model, images, labels, recipe, *args, until=None, **kwargs):    # none is ended early
        seen.append(len(images) * recipe.epochs)
        return train(model, images, labels, recipe, *args, **kwargs)

    monkeypatch.setattr(module, "train", counted)
    monkeypatch.setattr(ft, "train", counted)
    part = Clean(clean.images[:count], clean.labels[:count], 10)
    for images in (20, 70, 150):
        seen.clear()
        few = dataclasses.replace(config, **{limit: images})
        module.defend(victim, part, few, 5)
        assert sum(seen) == module.trained(few, count)
