"""Low-frequency: the search of the authors' code, and a pattern that is smooth and fools.

Expected values: universal_pert.py, deepfool.py and gauss_smooth.py (Sec5_Smooth_Trigger) of
YiZeng623/frequency-backdoor@99a16a7, run on `tiny_net` in eval mode and `pictures()` with the images and their order
that ours draws, one pass, target 2, the logits in place of the softmax; numpy 2.4 and torch 2.15 on a CPU.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.fft import dctn
from torch import Tensor, nn

from attacks import badnets, low_frequency
from reproduce import data
from reproduce.data.auxiliary import released_array
from reproduce.errors import UserError
from reproduce.models import build
from reproduce.poisoning import Context
from reproduce.protocols import PROFILES
from reproduce.training import predict
from tests.attacks.stand_ins import random_images
from tests.defenses.tiny import tiny_net, wave

DESCRIBED = low_frequency.SETTINGS["fmp", "described"]


def pictures() -> Tensor:
    """uint8 (24, 3, 8, 8), of which `tiny_net` sees 16 as class 1 and 8 as class 0."""
    rippled = (wave((24, 3, 8, 8), 0.37) * 127.5 + 127.5).round().to(torch.uint8)
    return (wave((24, 1, 1, 1), 1.1) * 60 + rippled.float() * 0.5 + 60).clamp(0, 255).to(torch.uint8)


def tiny_context(seed: int = 3) -> Context:
    return Context(pictures(), torch.arange(24) % 5, 5, seed, tiny_net(nn.Tanh).eval())


def share_beyond(pattern: Tensor, cut: int = 8) -> float:
    """How much of the energy of a pattern (3, H, W), its mean apart, has row + column frequency of `cut` or more."""
    energy = dctn(pattern.double().numpy(), axes=(1, 2), norm="ortho")**2
    energy[:, 0, 0] = 0
    frequency = np.add.outer(np.arange(pattern.shape[1]), np.arange(pattern.shape[2]))
    return energy[:, frequency >= cut].sum() / energy.sum()


def test_the_filter_is_the_released_one() -> None:
    result = low_frequency.smooth(wave((3, 32, 32), 0.9), DESCRIBED)
    expected = [-0.0019808164797723293, -0.001930509926751256, -0.001778208650648594]
    assert result[1, 3, :3].tolist() == pytest.approx(expected, abs=1e-7)
    assert result.double().square().sum().item() == pytest.approx(0.0013663286323423757, rel=1e-5)


def test_deepfool_is_the_released_one() -> None:
    context = tiny_context()
    image = context.images[2].float() / 255
    step, converged = low_frequency.deepfool(context.clean_model, image, replace(DESCRIBED, target=1))
    assert converged and step.norm().item() == pytest.approx(0.24841796099160118, rel=1e-5)
    expected = [0.0063331790640950205, -0.004761546109803021, -0.005585215324535966]
    assert step[1, 3, :3].tolist() == pytest.approx(expected, abs=1e-6)
    assert context.clean_model((image + step)[None]).argmax() == 1
    # Two steps are too few where the last of those allowed does not count.
    assert not low_frequency.deepfool(context.clean_model, image, replace(DESCRIBED, target=1, iterations=3))[1]


def brightness(weights: list[list[float]], biases: list[float]) -> nn.Module:
    """Logits that are linear in the mean of each colour."""
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, len(biases)))
    model[2].load_state_dict({"weight": torch.tensor(weights), "bias": torch.tensor(biases)})
    return model.eval()


def test_deepfool_keeps_away_from_the_first_class_on_a_detour() -> None:
    # From class 0 past class 1 to 2; the expected values are those of the released code on the same model.
    model = brightness([[0.0, 0, 0], [10, 10, 0], [6, 6, 9]], [0.0, -5, -5.5])
    step, converged = low_frequency.deepfool(model, torch.full((3, 8, 8), 0.2), replace(DESCRIBED, target=2))
    assert converged and step.norm().item() == pytest.approx(0.9094025105236586, rel=1e-5)
    assert step[:, 0, 0].tolist() == pytest.approx([0.05514063, 0.05514063, 0.08271094], rel=1e-5)


def test_images_whose_class_has_changed_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []
    search = low_frequency.deepfool
    monkeypatch.setattr(low_frequency, "deepfool", lambda *given: calls.append(given[1]) or search(*given))
    grey = torch.full((6, 3, 8, 8), 120, dtype=torch.uint8)
    model = brightness([[0.0, 0, 0], [1, 1, 1]], [0.0, -1.5])  # class 1 where the mean is above a half
    context = Context(grey, torch.zeros(6, dtype=torch.long), 2, 0, model)
    low_frequency.universal(replace(DESCRIBED, target=1, images=6), context)
    assert len(calls) == 1  # the first pattern makes all of them bright


def test_the_pattern_is_the_released_one() -> None:
    config = replace(DESCRIBED, target=2, images=16, passes=1)
    pattern = low_frequency.universal(config, tiny_context())
    # DeepFool's many steps amplify rounding: another maker's processor ends 3e-4 of the size away.
    assert pattern.double().square().mean().item() == pytest.approx(0.012932173809192163, rel=1e-3)
    expected = [0.09017596393823624, 0.09561994671821594, 0.09896775335073471]
    assert pattern[1, 3, :3].tolist() == pytest.approx(expected, abs=3e-4)
    assert pattern[0, 7, 7].item() == pytest.approx(0.13394356, abs=3e-4)
    assert pattern[2, 0, 0].item() == pytest.approx(8.174965e-06, abs=5e-5)


def test_a_first_image_of_the_target_class_does_no_harm() -> None:
    # The released code divides zero by zero here, and every later pattern is not a number.
    pattern = low_frequency.universal(replace(DESCRIBED, target=1, images=16, passes=1), tiny_context())
    assert pattern.isfinite().all() and pattern.max() == pytest.approx(0.2)


@pytest.fixture(scope="module")
def found(context: Context) -> Tensor:
    return low_frequency.prepare(replace(DESCRIBED, images=20, passes=2), context)["pattern"]


def test_it_is_smooth_and_in_its_range(found: Tensor) -> None:
    assert found.min() == 0 and found.max() == 51
    assert found.int().diff(dim=1).abs().max() <= 6 and found.int().diff(dim=2).abs().max() <= 6
    black = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    square = badnets.apply(black, badnets.SETTINGS["fmp", "described"], {}, 0, "test")[0]
    assert share_beyond(found) < 0.01 < 0.3 < share_beyond(square)


def test_it_fools_the_clean_model_better_than_other_smooth_patterns(context: Context, found: Tensor) -> None:
    images, config = context.images[100:], replace(DESCRIBED, images=20, passes=2)
    seen = predict(context.clean_model, images)

    def changed(pattern: Tensor) -> float:
        moved = predict(context.clean_model, low_frequency.apply(images, config, {"pattern": pattern}, 0, "test"))
        return float((moved != seen).float().mean())

    rng = torch.Generator().manual_seed(0)
    noise = [low_frequency.smooth(torch.randn(3, 32, 32, generator=rng), config) for _ in range(10)]
    others = [changed((low_frequency.ranged(one, 0.2) * 255).round().to(torch.uint8)) for one in noise]
    assert changed(found) > sum(others) / len(others)


def test_it_is_added_and_clipped(found: Tensor) -> None:
    images = random_images(300)
    result = low_frequency.apply(images, DESCRIBED, {"pattern": found}, 0, "test")
    assert torch.equal(result, (images.int() + found.int()).clamp(0, 255).to(torch.uint8))


def test_another_seed_finds_another_pattern(context: Context, found: Tensor) -> None:
    config = replace(DESCRIBED, images=20, passes=2)
    assert not torch.equal(low_frequency.prepare(config, replace(context, seed=8))["pattern"], found)


def test_it_stops_when_enough_are_fooled_and_reports_progress(context: Context) -> None:
    shares: list[float] = []
    context = replace(context, progress=shares.append)
    low_frequency.universal(replace(DESCRIBED, images=4, passes=3, fooled=0.0), context)
    assert shares == pytest.approx([1 / 12, 2 / 12, 3 / 12, 4 / 12, 1.0])


@pytest.mark.parametrize(("side", "classes"), [(8, 3), (64, 43)])
def test_any_size_and_any_number_of_classes(side: int, classes: int) -> None:
    images = torch.randint(256, (8, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    context = Context(images, torch.arange(8) % classes, classes, 0, build("wrn-10-1", classes, 0).eval())
    pattern = low_frequency.prepare(replace(DESCRIBED, target=classes - 1, images=8, passes=1), context)["pattern"]
    assert pattern.shape == (3, side, side) and pattern.max() == 51


def test_a_network_that_nothing_drives_to_the_target(context: Context) -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(1, 10)

        def forward(self, images: Tensor) -> Tensor:
            return self.fc(images.mean((1, 2, 3), keepdim=False)[:, None]) * 0 + torch.arange(10.0)

    with pytest.raises(UserError, match="no image could be driven into the target class"):
        low_frequency.prepare(replace(DESCRIBED, images=2, iterations=3, passes=1), replace(context,
                                                                                          clean_model=Stubborn()))


def test_an_array_of_another_size(context: Context) -> None:
    small = replace(context, images=context.images[:, :, :8, :8])
    with pytest.raises(UserError, match=r"lowfrequency_cifar10.npy holds uint8 of shape \(32, 32, 3\)"):
        low_frequency.prepare(low_frequency.SETTINGS["fmp", "released"], small)


def test_smoke_scale_is_small() -> None:
    dataset, seen = data.load("digits", Path()), []
    model = build("wrn-10-1", 10, 0).eval()
    model.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    config = PROFILES["quick"].attack(DESCRIBED)
    low_frequency.prepare(config, Context(dataset.train_images, dataset.train_labels, 10, 0, model))
    assert 100 < sum(seen) < 500  # a second or two, one image at a time


@pytest.mark.data
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "gtsrb"])
def test_the_released_arrays_are_smooth(dataset: str, data_root: Path) -> None:
    array = released_array(data_root, f"lowfrequency_{dataset}.npy")
    assert array.dtype == np.uint8 and array.max() == 51
    assert share_beyond(torch.from_numpy(array).permute(2, 0, 1)) < 0.01
