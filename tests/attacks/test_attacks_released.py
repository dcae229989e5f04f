"""NAD's, ARGD's and MCLDef's released triggers, byte for byte; ARGD's reflection to a few grey levels.

The expected hashes are SHA-256 of what the official per-image code (bboylyg/NAD@f17b713 data_loader.py) returns for the
64 images of `random_images()`, stacked as uint8 (64, 32, 32, 3); numpy's global generator seeded with 7 before Blend.
The same code and ours were also compared on the first 5,000 CIFAR-10 training images: equal. ARGD's code
(BililiCode/ARGD@6354666 data_loader.py, there :458, :465 and :474) gives NAD's hashes for Blend, SIG and Trojan;
MCLDef's (Zhihao151/MCL@1ce3f44 data_loader.py:385) gives it for the grid, and its arrays of SIG and Trojan are NAD's
files. Those under BackdoorBench are what the per-image classes of huangd1999/BackdoorBench@6135839,
utils/bd_img_transform, return, cast to uint8 as its data set does it (torchvision 0.29, Pillow 13, numpy 2.4).
"""

import dataclasses
import hashlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from attacks import badnets, blend, cl, low_frequency, refool, sig, trojan
from reproduce import data
from reproduce.data.auxiliary import released_array
from reproduce.images import prepare
from reproduce.poisoning import Context, attack_module
from tests.attacks.stand_ins import random_images, stand_in_array, stand_in_pattern

GRID = "9e4eb9c16e987c337b587637b3922839c19f47d8d661e803a23c145590594d91"  # data_loader.py:307, _gridTriger
SQUARE = "640410dc07d938f5bd447b0e0103c9ab8887117d795aba8626f87115aac96ab2"  # data_loader.py:300, distance 1
BLEND = "6e57b34a867cd8c6f95faabc7372ff4a459796d1151760f02a26d2725719edc4"  # data_loader.py:392
SIG = "4484fbf0925819c330bad8ffe9a6f6dc07140d70df6129141161127b75328ca1"  # data_loader.py:401
TROJAN = "545b858f141018d0421bc9e6f9c1a586b976ea3cc22c8b41f56df0d5c56e9dc3"  # data_loader.py:410

# BackdoorBench: patch.py with resource/badnet/bottom_right_3by3_white.npy; blended.py with our drawing and alpha 0.2;
# sig.py with delta 40 and f 6; patch.py's SimpleAdditiveTrigger with `stand_in_pattern()` and with
# resource/lowFrequency/cifar10_preactresnet18_0_255.npy.
WHITE_CORNER = "dcaeb207f6f75faf602e18e707749c95e46736c8faf65bbfae734ceca94af5ef"
DRAWING = "8f5cab6664765d02424a5ff3ee83e747e53c13b1bccde88e1760c584309a6a81"
TRUNCATED_SINE = "3f3d4dbe781438e48f61df0ef8e18e0cfe9de0a88c96e8587eec9a00fe49ab5c"
ADDED = "e9cdb369837f5f9510da71155465925b9184c8951d749815040cedcf660f68df"
ADDED_RELEASED = "39df324692dfab1baefa22b2cfbf7bda94705762e41ea58640ca464c4dca5b15"
# The sum over all pixels that blended.py gives with `drawing(120, 90)`, resized by torchvision.
RESIZED_SUM = 25609600

CENTRE = "98831c108358e1f8b7b214c3a67326f92fc2c8a779bec635f6887cec8e4a9050"  # ARGD data_loader.py:373, _gridTriger
BLENDED_GRID = "b6b7d97f7ce128381cd78904aaf55f8e7387a4a3f3bd80fd186768a706e6cd35"  # MCL data_loader.py:515

# ARGD data_loader.py:506, blend_images of ripples(4, 0.11) and ripples(1, 0.23) at alpha_t 0.6 with cv2 5.0: image 1,
# green, rows 4, 12, 20, 28, columns 2, 6, ..., 30. Blur: sigma 2.3, att 1.13; ghost: offset (4, 6), ghost_alpha 0.3.
REFLECTED = {
    "blur": [[13, 53, 136, 198, 182, 114, 53, 17], [53, 137, 207, 182, 114, 96, 6, 43],
             [136, 199, 182, 114, 107, 6, 43, 123], [192, 182, 114, 67, 6, 43, 124, 187]],
    "ghost": [[118, 106, 145, 216, 216, 144, 80, 98], [105, 145, 219, 214, 144, 77, 104, 137],
              [145, 221, 212, 144, 75, 111, 135, 150], [223, 210, 144, 72, 116, 132, 150, 196]],
}


def ripples(count: int, pace: float) -> Tensor:
    """Smooth images every version of torch agrees on, uint8 (count, 3, 32, 32)."""
    row, column = torch.arange(32.0).view(-1, 1), torch.arange(32.0)
    phase = torch.arange(3.0 * count).view(count, 3, 1, 1)
    return (128 + 120 * torch.sin(pace * (row + 2 * column) + phase)).to(torch.uint8)


def digest(images: Tensor) -> str:
    return hashlib.sha256(np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy()).tobytes()).hexdigest()


@pytest.fixture(params=["channels-last", "contiguous"])
def images(request: pytest.FixtureRequest) -> Tensor:
    return random_images() if request.param == "channels-last" else random_images().contiguous()


def released_trojan(images: Tensor, array: np.ndarray) -> Tensor:
    config = trojan.SETTINGS["nad", "released"]
    labels = torch.zeros(len(images), dtype=torch.long)
    state = trojan.prepare(config, Context(images, labels, 10, 0, array=lambda name: array))
    return trojan.apply(images, config, state, 0, "test")


def test_grid(images: Tensor) -> None:
    assert digest(badnets.apply(images, badnets.SETTINGS["nad", "released"], {}, 0, "test")) == GRID


def test_white_corner(images: Tensor) -> None:
    assert digest(badnets.apply(images, badnets.SETTINGS["fmp", "described"], {}, 0, "test")) == WHITE_CORNER


@pytest.mark.parametrize("module", [badnets, cl])
def test_grid_in_the_centre(images: Tensor, module: ModuleType) -> None:
    assert digest(module.apply(images, module.SETTINGS["argd", "released"], {}, 0, "test")) == CENTRE


def test_grid_blended_in_the_centre(images: Tensor) -> None:
    assert digest(blend.apply(images, blend.SETTINGS["mcldef", "released"], {}, 0, "test")) == BLENDED_GRID


def test_square_one_pixel_from_the_border(images: Tensor) -> None:
    config = badnets.Config(pattern=badnets.SQUARE, row=-4, column=-4)
    assert digest(badnets.apply(images, config, {}, 0, "test")) == SQUARE


def test_pattern_anywhere() -> None:
    config = badnets.Config(pattern=((255, 128, 255), (128, 255, 128), (255, 128, 128)), row=18, column=18)
    images = random_images(2)
    result = badnets.apply(images, config, {}, 0, "test")
    for channel in range(3):
        assert result[1, channel, 18:21, 18:21].tolist() == [list(row) for row in config.pattern]
    changed = (result != images).any(1).any(0).nonzero()
    assert changed.min() >= 18 and changed.max() <= 20


def test_blend(images: Tensor) -> None:
    noise = blend.grey_noise(images, np.random.RandomState(7))
    assert digest(blend.mix(images, noise, blend.SETTINGS["nad", "released"].ratio)) == BLEND


def test_whole_number_blend_equals_float64_for_every_pair_of_pixels() -> None:
    x, k = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    expected = ((1 - 0.2) * x + 0.2 * k).astype(np.uint8)
    result = blend.mix(torch.from_numpy(x)[None, None], torch.from_numpy(k)[None, None], 0.2)
    assert np.array_equal(result[0, 0].numpy(), expected)


def test_blended_drawing(images: Tensor) -> None:
    config = blend.SETTINGS["fmp", "described"]
    state = blend.prepare(config, Context(images, torch.zeros(len(images), dtype=torch.long), 10, 0))
    assert digest(blend.apply(images, config, state, 0, "test")) == DRAWING


def test_a_blended_file_is_a_grey_level_off_at_most(images: Tensor) -> None:
    config = blend.SETTINGS["fmp", "released"]
    picture = blend.drawing(120, 90).permute(1, 2, 0).numpy()
    state = blend.prepare(config, Context(images, torch.zeros(len(images), dtype=torch.long), 10, 0,
                                          array={config.picture: picture}.__getitem__))
    result = blend.apply(images, config, state, 0, "test")
    # Theirs is at most one below ours, see the header.
    assert 0 < int(result.sum(dtype=torch.long)) - RESIZED_SUM < 0.04 * result.numel()


@pytest.mark.parametrize("variant", ["described", "released"])
def test_truncated_sine(images: Tensor, variant: str) -> None:
    assert digest(sig.apply(images, sig.SETTINGS["fmp", variant], {}, 0, "test")) == TRUNCATED_SINE


def released_low_frequency(images: Tensor, array: np.ndarray) -> Tensor:
    config = low_frequency.SETTINGS["fmp", "released"]
    labels = torch.zeros(len(images), dtype=torch.long)
    state = low_frequency.prepare(config, Context(images, labels, 10, 0, array={config.array: array}.__getitem__))
    return low_frequency.apply(images, config, state, 0, "test")


def test_added_pattern(images: Tensor) -> None:
    assert digest(released_low_frequency(images, stand_in_pattern())) == ADDED


@pytest.mark.data
def test_added_pattern_with_the_released_array(images: Tensor, data_root: Path) -> None:
    array = released_array(data_root, low_frequency.SETTINGS["fmp", "released"].array)
    assert digest(released_low_frequency(images, array)) == ADDED_RELEASED


def test_sig(images: Tensor) -> None:
    assert digest(sig.apply(images, sig.SETTINGS["nad", "released"], {}, 0, "test")) == SIG


def test_sig_mask_is_the_wrapped_sine() -> None:
    mask = sig.wrapped_mask(sig.SETTINGS["nad", "released"], 32).tolist()
    assert mask == [int(20 * np.sin(0.8 * j)) % 256 for j in range(32)]


def test_trojan_adds_modulo_256(images: Tensor) -> None:
    array = stand_in_array()
    result = released_trojan(images, array)
    expected = (images.permute(0, 2, 3, 1).numpy() + array.transpose(1, 2, 0)).astype(np.int64) % 256
    assert np.array_equal(result.permute(0, 2, 3, 1).numpy(), expected)
    assert (result < images).any()  # some pixels did wrap around


@pytest.mark.data
def test_trojan_with_the_released_array(images: Tensor, data_root: Path) -> None:
    array = released_array(data_root, trojan.SETTINGS["nad", "released"].array)
    assert digest(released_trojan(images, array)) == TROJAN


@pytest.mark.data
def test_sig_mask_is_the_released_array(data_root: Path) -> None:
    mask = sig.wrapped_mask(sig.SETTINGS["nad", "released"], 32)
    expected = released_array(data_root, "signal_cifar10_mask.npy")
    assert np.array_equal(mask.expand(32, -1).numpy(), expected)


def test_fresh_noise_differs_between_images_and_splits() -> None:
    config = blend.SETTINGS["nad", "released"]
    grey = torch.full((2, 3, 32, 32), 128, dtype=torch.uint8)
    train, test = (blend.apply(grey, config, {}, 0, split) for split in ("train", "test"))
    assert not torch.equal(train[0], train[1]) and not torch.equal(train, test)
    assert torch.equal(train[:, 0], train[:, 2])  # grey
    assert not torch.equal(train, blend.apply(grey, config, {}, 1, "train"))


@pytest.mark.parametrize("name", ["blend", "sig", "trojan"])
def test_argd_shares_the_triggers_of_nad(name: str) -> None:
    settings = attack_module(name).SETTINGS
    assert settings["argd", "released"] == dataclasses.replace(settings["nad", "released"], target=0, rate=0.2)


def test_argds_clean_label_attack_marks_images_as_they_are(context: Context) -> None:
    config = cl.SETTINGS["argd", "released"]
    assert not cl.requires(config) and cl.requires(cl.Config()) == {"clean-model"}
    state = cl.prepare(config, dataclasses.replace(context, clean_model=None))
    poisoned = cl.poison(context.images, context.labels, config, state, context.seed, 10)
    assert torch.equal(poisoned.labels, context.labels)
    assert (context.labels[poisoned.mask] == 0).all() and int(poisoned.mask.sum()) == 8  # 20 % of 40
    assert torch.equal(poisoned.images, torch.where(poisoned.mask.view(-1, 1, 1, 1),
                                                    cl.apply(context.images, config, {}, 0, "train"), context.images))


def test_mcldefs_clean_label_attack_marks_the_whole_target_class(context: Context, images: Tensor) -> None:
    config = cl.SETTINGS["mcldef", "released"]
    assert not cl.requires(config) and digest(cl.apply(images, config, {}, 0, "test")) == GRID
    state = cl.prepare(config, dataclasses.replace(context, clean_model=None))
    poisoned = cl.poison(context.images, context.labels, config, state, context.seed, 10)
    assert torch.equal(poisoned.labels, context.labels)
    assert torch.equal(poisoned.mask, context.labels == 5) and poisoned.mask.any()


@pytest.mark.parametrize("kind", ["blur", "ghost"])
def test_argds_reflections(kind: str) -> None:
    light = (ripples(1, 0.23).float() / 255).pow(2.2)
    versions = torch.cat([light, refool.blurred(light, 2.3), refool.doubled(light, 4, 6, 0.3)])
    state = {"test": (versions.clamp(0, 1).pow(1 / 2.2) * 255).round().to(torch.uint8)[None]}
    config = dataclasses.replace(refool.SETTINGS["argd", "released"], ghost=float(kind == "ghost"),
                                 transmitted=(0.6, 0.6), attenuation=(1.13, 1.13))
    result = refool.apply(ripples(4, 0.11), config, state, 0, "test")[1, 1, 4::8, 2::4].int()
    difference = (result - torch.tensor(REFLECTED[kind])).abs().float()
    # Ours is rounded before it is blended, and a ghost is stretched in another way.
    assert difference.max() <= 4 and difference.mean() < 1
    assert (ripples(4, 0.11)[1, 1, 4::8, 2::4].int() - torch.tensor(REFLECTED[kind])).abs().float().mean() > 20


def test_argds_reflection_is_an_image_of_the_set_at_hand() -> None:
    dataset = data.load("digits", Path())
    config = dataclasses.replace(refool.SETTINGS["argd", "released"], versions=5)
    state = prepare("refool", config, dataset, 0, Path(), None)
    for split, images in (("train", dataset.train_images), ("test", dataset.test_images)):
        assert state[split].shape == (5, 3, *images.shape[1:])
        in_focus, out_of_focus = state[split][:, refool.IN_FOCUS], state[split][:, refool.OUT_OF_FOCUS]
        assert (in_focus.int() - images[2].int()).abs().max() <= 1
        assert len({version.numpy().tobytes() for version in out_of_focus}) == 5


def test_argd_has_ghosts_as_often_as_its_code() -> None:
    _photographs, kinds, _alphas, _attenuations = refool.draw(
        20000, 256, refool.SETTINGS["argd", "released"], 0, "train")
    assert set(kinds.tolist()) == {refool.GHOST, refool.OUT_OF_FOCUS}
    assert float((kinds == refool.GHOST).float().mean()) == pytest.approx(39 / 101, abs=0.01)


def test_settings_that_do_not_differ_share_a_victim() -> None:
    assert badnets.SETTINGS["nad", "described"] == badnets.SETTINGS["nad", "released"]
    for module in (blend, sig, trojan):
        described, released = module.SETTINGS["nad", "described"], module.SETTINGS["nad", "released"]
        assert dataclasses.asdict(described) != dataclasses.asdict(released)
