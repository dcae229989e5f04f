"""The attacks as their papers describe them: what each trigger must do to an image, and to a clean network."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attacks import blend, cl, refool, sig, trojan
from reproduce.errors import UserError
from reproduce.poisoning import Context
from tests.attacks.stand_ins import random_images, stand_in_array

DESCRIBED = ("nad", "described")


def test_blend_pattern_is_one_for_all(context: Context) -> None:
    config = blend.SETTINGS[DESCRIBED]
    state = blend.prepare(config, context)
    images = random_images(3)
    result = blend.apply(images, config, state, 0, "train")
    assert torch.equal(result, blend.apply(images, config, state, 5, "test"))
    expected = (0.8 * images.double() + 0.2 * state["pattern"].double() + 1e-9).to(torch.uint8)
    assert torch.equal(result, expected)
    other = blend.prepare(config, dataclasses.replace(context, seed=8))
    assert not torch.equal(state["pattern"], other["pattern"])


def test_sig_adds_the_sinusoid() -> None:
    config = sig.SETTINGS[DESCRIBED]
    images = random_images(8)
    result = sig.apply(images, config, {}, 0, "test")
    for j in (0, 1, 5, 31):
        wave = 20 * math.sin(2 * math.pi * j * 6 / 32)
        expected = (images[..., j].float() + wave).round().clamp(0, 255).to(torch.uint8)
        assert torch.equal(result[..., j], expected)


@pytest.fixture(scope="module")
def inverted(context: Context) -> tuple[trojan.Config, dict[str, Tensor]]:
    config = dataclasses.replace(trojan.SETTINGS[DESCRIBED], steps=60)
    return config, trojan.prepare(config, context)


@torch.no_grad()
def test_trojan_excites_its_neuron(context: Context, inverted: tuple[trojan.Config, dict[str, Tensor]]) -> None:
    config, state = inverted
    model, neuron = context.clean_model, trojan.best_connected(context.clean_model)
    images = context.images[100:200]

    def mean_activation(pixels: Tensor) -> float:
        return float(trojan.activation(model, pixels.float() / 255, neuron).mean())

    reached = mean_activation(trojan.apply(images, config, state, 0, "test"))
    rng = torch.Generator().manual_seed(0)
    random = [mean_activation(trojan.apply(images, config, {"patch": torch.randint(
        256, (3, 3, 3), generator=rng, dtype=torch.uint8)}, 0, "test")) for _ in range(20)]
    assert reached > mean_activation(images)
    assert reached > max(random)


def test_trojan_pastes_its_patch_only(inverted: tuple[trojan.Config, dict[str, Tensor]]) -> None:
    config, state = inverted
    images = random_images(4)
    result = trojan.apply(images, config, state, 0, "test")
    assert torch.equal(result[2, :, 25:28, 25:28], state["patch"])
    result[:, :, 25:28, 25:28] = images[:, :, 25:28, 25:28]
    assert torch.equal(result, images)


def test_trojan_leaves_the_clean_model_alone(context: Context) -> None:
    before = {name: value.clone() for name, value in context.clean_model.state_dict().items()}
    context.clean_model.zero_grad()
    trojan.prepare(dataclasses.replace(trojan.SETTINGS[DESCRIBED], steps=2, images=2), context)
    assert all(torch.equal(value, before[name]) for name, value in context.clean_model.state_dict().items())
    assert all(p.grad is None for p in context.clean_model.parameters())


def test_best_connected_neuron(context: Context) -> None:
    weights = context.clean_model.fc.weight.detach().abs().sum(0)
    assert weights[trojan.best_connected(context.clean_model)] == weights.max()


def test_trojan_array_of_another_size(context: Context) -> None:
    config = trojan.SETTINGS["nad", "released"]
    small = dataclasses.replace(context, images=context.images[:, :, :8, :8], array=lambda name: stand_in_array())
    with pytest.raises(UserError, match="shape"):
        trojan.prepare(config, small)


@pytest.fixture(scope="module")
def perturbed(context: Context) -> tuple[cl.Config, dict[str, Tensor]]:
    config = dataclasses.replace(cl.SETTINGS[DESCRIBED], steps=12, batch=7)
    return config, cl.prepare(config, context)


def test_cl_stays_within_epsilon(context: Context, perturbed: tuple[cl.Config, dict[str, Tensor]]) -> None:
    config, state = perturbed
    moved = (state["perturbed"].int() - context.images[state["indices"]].int()).abs()
    assert moved.max() == config.epsilon


def test_cl_raises_the_loss(context: Context, perturbed: tuple[cl.Config, dict[str, Tensor]]) -> None:
    _config, state = perturbed
    clean = context.images[state["indices"]]
    labels = context.labels[state["indices"]]
    noise = torch.randint(-8, 9, clean.shape, generator=torch.Generator().manual_seed(0))
    noisy = (clean.int() + noise).clamp(0, 255)
    with torch.no_grad():
        losses = [float(F.cross_entropy(context.clean_model(pixels.float() / 255), labels))
                  for pixels in (clean, noisy, state["perturbed"])]
    assert losses[2] > 2 * losses[0] + 0.5 and losses[2] > 2 * losses[1] + 0.5


def test_cl_epsilon_that_is_not_a_whole_number(context: Context) -> None:
    config = dataclasses.replace(cl.SETTINGS[DESCRIBED], epsilon=2.6, steps=4)
    images = context.images[:16]
    moved = cl.ascend(context.clean_model, images, context.labels[:16], config)
    assert (moved.int() - images.int()).abs().max() == 2


def test_cl_poisons_the_images_it_perturbed(context: Context, perturbed: tuple[cl.Config, dict[str, Tensor]]) -> None:
    config, state = perturbed
    poisoned = cl.poison(context.images, context.labels, config, state, context.seed, 10)
    assert torch.equal(poisoned.mask.nonzero().flatten(), state["indices"])
    chosen = poisoned.images[poisoned.mask]
    assert torch.equal(chosen, cl.apply(state["perturbed"], config, state, 0, "train"))
    middle = slice(3, -3)
    assert torch.equal(chosen[:, :, middle], state["perturbed"][:, :, middle])
    with pytest.raises(ValueError, match="another training set or seed"):
        cl.poison(context.images, context.labels, config, state, context.seed + 1, 10)


def test_cl_trigger_is_the_four_corners() -> None:
    images = random_images(1)
    result = cl.apply(images, cl.SETTINGS[DESCRIBED], {}, 0, "test")
    right, left = [[0, 0, 255], [0, 255, 0], [255, 0, 255]], [[255, 0, 0], [0, 255, 0], [255, 0, 255]]
    near, far = slice(0, 3), slice(29, 32)
    for rows in (near, far):
        assert result[0, 1, rows, near].tolist() == left
        assert result[0, 1, rows, far].tolist() == right
    unchanged = torch.ones(32, 32, dtype=torch.bool)
    for rows in (near, far):
        unchanged[rows, near] = unchanged[rows, far] = False
    assert torch.equal(result[:, :, unchanged], images[:, :, unchanged])


def test_progress_is_reported(context: Context) -> None:
    for module, quick in ((cl, {"steps": 2, "batch": 7}), (trojan, {"steps": 2, "images": 2}), (refool, {"size": 40})):
        shares: list[float] = []
        config = dataclasses.replace(module.SETTINGS[DESCRIBED], **quick)
        module.prepare(config, dataclasses.replace(context, progress=shares.append))
        assert shares and max(shares) == pytest.approx(1.0) and all(0 < share <= 1 for share in shares)


@pytest.fixture(scope="module")
def reflections(context: Context) -> tuple[refool.Config, dict[str, Tensor]]:
    config = dataclasses.replace(refool.SETTINGS[DESCRIBED], size=128)
    return config, refool.prepare(config, context)


def test_refool_train_and_test_reflections_are_disjoint(reflections: tuple[refool.Config, dict[str, Tensor]]) -> None:
    _config, state = reflections
    assert state["train"].shape == (4, 3, 3, 32, 32) and state["test"].shape == (3, 3, 3, 32, 32)
    # The context's training photographs are dark, its test photographs bright.
    assert state["train"].float().mean((2, 3, 4)).max() < state["test"].float().mean((2, 3, 4)).min()


def test_refool_uses_all_three_types(reflections: tuple[refool.Config, dict[str, Tensor]]) -> None:
    config, _state = reflections
    photographs, kinds, alphas, attenuations = refool.draw(20000, 4, config, 0, "train")
    shares = (torch.bincount(kinds) / 20000).tolist()
    assert shares[refool.GHOST] == pytest.approx(0.39, abs=0.02)
    assert shares[refool.IN_FOCUS] == pytest.approx(0.305, abs=0.02)
    assert set(photographs.tolist()) == {0, 1, 2, 3}
    for values, (low, high) in ((alphas, config.transmitted), (attenuations, config.attenuation)):
        assert low <= values.min() < low + 0.05 and high - 0.05 < values.max() <= high


def test_refool_as_in_backdoorbench_has_one_strength_and_none_in_focus() -> None:
    config = refool.SETTINGS["nad", "backdoorbench"]
    _photographs, kinds, alphas, _attenuations = refool.draw(2000, 4, config, 0, "train")
    assert set(kinds.tolist()) == {refool.GHOST, refool.OUT_OF_FOCUS}
    assert alphas.unique().tolist() == pytest.approx([0.4])


def test_refool_in_focus_and_ghost_are_mixed_in_linear_light(
        reflections: tuple[refool.Config, dict[str, Tensor]]) -> None:
    config, state = reflections
    images = random_images(60)
    result = refool.apply(images, config, state, 0, "test")
    photographs, kinds, alphas, _attenuations = refool.draw(60, 3, config, 0, "test")
    for i in (kinds != refool.OUT_OF_FOCUS).nonzero().flatten().tolist():
        light = (images[i].double() / 255) ** 2.2
        reflected = (state["test"][photographs[i], kinds[i]].double() / 255) ** 2.2
        alpha = float(alphas[i])
        expected = 255 * (alpha * light + (1 - alpha) * reflected) ** (1 / 2.2)
        assert ((result[i].double() - expected) <= 1e-3).all() and ((expected - result[i].double()) < 1.001).all()


def test_refool_out_of_focus_is_a_vignette(reflections: tuple[refool.Config, dict[str, Tensor]]) -> None:
    config, _state = reflections
    config = dataclasses.replace(config, ghost=0.0, in_focus=0.0)
    white = {"test": torch.full((1, 3, 3, 32, 32), 255, dtype=torch.uint8)}
    dark = torch.zeros(10, 3, 32, 32, dtype=torch.uint8)
    result = refool.apply(dark, config, white, 0, "test").float()
    assert result[:, :, 15, 15].min() > 4 * result[:, :, 0, 0].max()


def test_refool_blur_and_ghost() -> None:
    point = torch.zeros(1, 3, 41, 41)
    point[:, :, 20, 20] = 1
    blurred = refool.blurred(point, 2.0)
    assert blurred.sum() == pytest.approx(3.0, rel=1e-5)
    assert blurred[0, 0, 20, 20] / blurred[0, 0, 20, 22] == pytest.approx(math.exp(0.5), rel=1e-4)
    square = torch.zeros(1, 3, 80, 80)
    square[:, :, 38:42, 38:42] = 1
    ghost = refool.doubled(square, 20, 20, 0.25)[0, 0]  # two squares 20 pixels apart, in the part both copies cover
    assert ghost[:40, :40].max() == pytest.approx(0.25, rel=0.3)
    assert ghost[40:, 40:].max() == pytest.approx(0.75, rel=0.3)
    assert ghost[:40, 40:].abs().max() < 0.01


def test_refool_draws_differ_between_splits_and_seeds(reflections: tuple[refool.Config, dict[str, Tensor]]) -> None:
    config, state = reflections
    images = random_images(20)
    same = {"train": state["train"], "test": state["train"]}
    first, second, third = (refool.apply(images, config, same, seed, split)
                            for seed, split in ((0, "train"), (0, "test"), (1, "test")))
    assert not torch.equal(first, second) and not torch.equal(second, third)
