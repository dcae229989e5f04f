"""WaNet: the warping of the released code, and a training that sees what it should.

Expected values: train.py:105-133 and 64-72 of VinAIResearch/Warping-based_Backdoor_Attack-release@45e8c33, run on the
tensors of `wave` in place of its random ones and on `random_images(8)`, torch 2.15 on a CPU.
"""

import hashlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from attacks import wanet
from reproduce.models import build
from reproduce.poisoning import Context, poisoned_in_batch
from reproduce.training import Recipe
from tests.attacks.stand_ins import random_images

CONFIG = wanet.SETTINGS["mcldef", "described"]
# The warped images times 255, rounded: uint8 (8, 3, 32, 32).
WARPED = "a6bbd553420f27d83e54f901fd247d5f0c54c7075b4fc2eb66c55f2bbac0cfef"


def wave(*shape: int, step: float = 0.7) -> Tensor:
    """A tensor every version of torch agrees on."""
    return torch.sin(torch.arange(torch.Size(shape).numel(), dtype=torch.float64) * step).float().view(shape)


@pytest.fixture(scope="module")
def fixed() -> Tensor:
    return wanet.field(wave(1, 2, 4, 4), CONFIG, 32)


def test_field_is_the_released_one(fixed: Tensor) -> None:
    assert fixed[5, 7].tolist() == pytest.approx([-0.5436848998069763, -0.6719112992286682], abs=1e-6)
    assert fixed[0, 1].tolist() == pytest.approx([-0.9342561364173889, -1.0], abs=1e-6)
    assert fixed.double().square().mean().item() == pytest.approx(0.3533099317547675, abs=1e-7)


def test_warped_images_are_the_released_ones(fixed: Tensor) -> None:
    result = wanet.apply(random_images(8), CONFIG, {"field": fixed}, 0, "test")
    assert hashlib.sha256(result.contiguous().numpy().tobytes()).hexdigest() == WARPED


def test_noise_mode_is_the_released_one(fixed: Tensor) -> None:
    fields = wanet.noisy_fields(fixed, wave(4, 32, 32, 2, step=1.3))
    result = wanet.warp(random_images(8)[:4].float() / 255, fields)
    assert result.double().square().mean().item() == pytest.approx(0.283569940059171, abs=1e-7)
    expected = [0.3687099516391754, 0.5704121589660645, 0.5370945930480957]
    assert result[1, 2, 3, :3].tolist() == pytest.approx(expected, abs=1e-6)


def test_the_warping_is_smooth_and_below_a_few_pixels(context: Context) -> None:
    fixed = wanet.prepare(CONFIG, context)["field"]
    axis = torch.linspace(-1, 1, 32)
    moved = (fixed - torch.stack(torch.meshgrid(axis, axis, indexing="xy"), 2)) * 31 / 2  # in pixels
    assert 0.05 < moved.abs().mean() < 0.5 and moved.abs().max() < 1.5
    assert moved.diff(dim=0).abs().max() < 0.5 and moved.diff(dim=1).abs().max() < 0.5


class Recorder(nn.Module):
    """A model that keeps what it is shown."""

    def forward(self, images: Tensor) -> Tensor:
        self.seen = images
        return images.mean((2, 3)).repeat(1, 4)[:, :10]


@pytest.mark.parametrize("rule", ["all-to-one", "all-to-all"])
def test_what_the_victim_is_trained_on(fixed: Tensor, rule: str) -> None:
    images, labels = random_images(60).float() / 255, torch.arange(60) % 10
    model, noise = Recorder(), wave(12, 32, 32, 2)
    result = wanet.poisoned_loss(fixed, replace(CONFIG, labels=rule), 10)(model, images, labels, noise)
    warped = wanet.warp(images, fixed.expand(60, -1, -1, -1))
    assert torch.equal(model.seen[:6], warped[:6])
    assert torch.equal(model.seen[6:18], wanet.warp(images[6:18], wanet.noisy_fields(fixed, noise)))
    assert ((model.seen[6:18] - warped[6:18]).abs().amax((1, 2, 3)) > 0.1).all()
    assert torch.equal(model.seen[18:], images[18:])
    assert result.labels[:6].tolist() == ([5] * 6 if rule == "all-to-one" else [1, 2, 3, 4, 5, 6])
    assert torch.equal(result.labels[6:], labels[6:])
    assert result.total == torch.nn.functional.cross_entropy(result.logits, result.labels)


def test_a_batch_too_small_to_poison_is_a_clean_one(fixed: Tensor) -> None:
    images, labels = random_images(9).float() / 255, torch.arange(9)
    model = Recorder()
    result = wanet.poisoned_loss(fixed, CONFIG, 10)(model, images, labels, wave(0, 32, 32, 2))
    assert torch.equal(model.seen, images) and torch.equal(result.labels, labels)


def test_one_image_of_a_small_batch_may_be_poisoned(fixed: Tensor) -> None:
    images, labels, noise = random_images(9).float() / 255, torch.arange(9), wave(2, 32, 32, 2)
    model, config = Recorder(), wanet.SETTINGS["fmp", "described"]
    result = wanet.poisoned_loss(fixed, replace(config, rate=0.01), 10)(model, images, labels + 1, noise)
    assert torch.equal(model.seen[:1], wanet.warp(images[:1], fixed[None]))
    assert torch.equal(model.seen[1:3], wanet.warp(images[1:3], wanet.noisy_fields(fixed, noise)))
    assert torch.equal(model.seen[3:], images[3:])
    assert result.labels.tolist() == [0, *range(2, 10)]


@pytest.mark.parametrize("rate", [0.001, 0.005, 0.01, 0.1])
def test_low_rates_poison_as_many_images_in_the_long_run(rate: float) -> None:
    rng = torch.Generator().manual_seed(0)
    drawn = [poisoned_in_batch(128, rate, rng) for _ in range(2000)]
    expected = 128 * rate
    assert set(drawn) == ({0, 1} if expected < 1 else {int(expected)})
    assert sum(drawn) / 2000 == pytest.approx(expected if expected < 1 else int(expected), abs=0.04)


def test_a_low_rate_implants_the_warping_now_and_then(labelled: tuple[Tensor, Tensor]) -> None:
    images, labels = (part[:64] for part in labelled)
    state = wanet.prepare(CONFIG, Context(images, labels, 10, 0))
    recipe = Recipe(epochs=2, rates=((0, 0.1),), batch=8)

    def weights(rate: float) -> Tensor:
        model = build("wrn-10-1", 10, 0)
        wanet.implant(model, images, labels, replace(CONFIG, rate=rate), state, recipe, 0, 10)
        return model.fc.weight

    assert torch.equal(weights(0.0), weights(1e-9)) and not torch.equal(weights(0.0), weights(0.05))
