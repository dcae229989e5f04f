"""SSBA: the released encoder, a string that can be read off images which stay what they are, and a training in order.

Expected values: StegaStampEncoder(32, 3, 100, return_residual=0) of resource/ssba/models.py of
SCLBD/BackdoorBench@f02e353 with the weights of `filled`, on `random_images(4)` and bits of `wave`, torch 2.15 on a CPU.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load as loads
from safetensors.torch import save as saves
from torch import Tensor, nn

from attacks import ssba
from reproduce.poisoning import Context
from tests.attacks.stand_ins import random_images

CONFIG = ssba.SETTINGS["fmp", "described"]
SHORT = replace(CONFIG, bits=4, width=8, batch=16, steps=120, wait=10, ramp=30)
SECRET = torch.tensor([1.0, 0.0, 0.0, 1.0])
ONE_STEP = replace(CONFIG, bits=4, width=4, batch=4, steps=1)


def wave(*shape: int, step: float) -> Tensor:
    """A tensor every version of torch agrees on."""
    return torch.sin(torch.arange(torch.Size(shape).numel(), dtype=torch.float64) * step).float().view(shape)


def filled(network: nn.Module) -> nn.Module:
    """The network with weights everyone can make again, of a size that keeps its outputs in range."""
    with torch.no_grad():
        for i, weights in enumerate(network.parameters()):
            scale = (2 / weights[0].numel()) ** 0.5 if weights.dim() > 1 else 0.1
            weights.copy_(wave(*weights.shape, step=0.7 + 0.01 * i) * scale)
    return network


@pytest.fixture(scope="module")
def small(labelled: tuple[Tensor, Tensor]) -> Context:
    """400 images of 16x16."""
    images, labels = labelled
    return Context(images[:, :, ::2, ::2], labels, 10, 7)


@pytest.fixture(scope="module")
def networks(small: Context) -> tuple[ssba.Encoder, ssba.Decoder]:
    """E and D, trained on the first 300 of them."""
    return ssba.trained(small.images[:300], SHORT, small.seed)


@pytest.fixture(scope="module")
def state(networks: tuple[ssba.Encoder, ssba.Decoder]) -> dict[str, Tensor]:
    return ssba.stored(networks[0], SECRET)


def test_the_encoder_is_the_released_one() -> None:
    encoder = filled(ssba.Encoder(replace(CONFIG, width=32, depth=4)))
    with torch.no_grad():
        images = encoder(random_images(4).float() / 255, (wave(4, 100, step=1.3) > 0).float())
    expected = [0.5369482040405273, 0.556299090385437, 0.5178188681602478, 0.5431276559829712]
    assert images[1, 2, 3, :4].tolist() == pytest.approx(expected, abs=1e-5)
    expected = [0.541665256023407, 0.5464905500411987, 0.5439407229423523]
    assert images[3, 0, 31, -3:].tolist() == pytest.approx(expected, abs=1e-5)
    assert images.double().square().mean().item() == pytest.approx(0.30013616272513316, rel=1e-6)


def test_networks_begin_with_weights_of_he() -> None:
    network = ssba.initialised(filled(ssba.Encoder(CONFIG)), torch.Generator().manual_seed(0))
    assert not any(value.any() for name, value in network.named_parameters() if name.endswith("bias"))
    for layer in (network.secret, network.down[2][0], network.up[0].merge[0]):
        assert layer.weight.std().item() == pytest.approx((2 / layer.weight[0].numel()) ** 0.5, rel=0.03)


def test_the_image_counts_once_the_bits_are_learned() -> None:
    released = replace(CONFIG, wait=1000, ramp=3000)  # train.py@f02e353:30,32,257-264,304-309
    weights = [ssba.weight(step, 100, released) for step in (100, 1100, 1101, 2600, 4100, 9000)]
    assert weights == pytest.approx([0, 0, 10 / 3000, 5, 10, 10])
    assert ssba.weight(9000, None, released) == 0


def test_the_string_can_be_read_off_new_images_that_stay_what_they_are(
        small: Context, networks: tuple[ssba.Encoder, ssba.Decoder], state: dict[str, Tensor]) -> None:
    images = small.images[300:]
    for secret in (SECRET, 1 - SECRET):
        triggered = ssba.apply(images, SHORT, state | {"secret": secret}, 7, "test")
        assert ssba.read_right(networks[1], triggered, secret) > 0.9
        assert ssba.read_right(networks[1], triggered, 1 - secret) < 0.1
        assert ssba.psnr(images, triggered) > 13  # 8 where the loss knows bits alone; their noise alone is 20
    assert 0.2 < ssba.read_right(networks[1], images, SECRET) < 0.8


def test_the_decoder_reads_any_bits(small: Context, networks: tuple[ssba.Encoder, ssba.Decoder]) -> None:
    encoder, decoder = networks
    images, bits = small.images[300:].float() / 255, (wave(100, 4, step=1.3) > 0).float()
    with torch.no_grad():
        logits = decoder(encoder(images, bits))
    assert ((logits > 0) == bits.bool()).float().mean() > 0.9


def test_every_image_has_a_trace_of_its_own(small: Context, state: dict[str, Tensor]) -> None:
    images = small.images[300:]
    traces, others = (ssba.apply(images, SHORT, state | {"secret": secret}, 7, "test").float() - images.float()
                      for secret in (SECRET, 1 - SECRET))
    carried = traces - others  # what of the trace the string makes
    assert len(carried.flatten(1).unique(dim=0)) == 100
    assert (carried - carried.mean(0)).square().mean() > 0.01 * carried.square().mean()


def test_psnr() -> None:
    images = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    triggered = torch.stack([images[0] + 5, images[1] - 10])
    assert ssba.psnr(images, triggered).item() == pytest.approx(10 * math.log10(255**2 / 25) - 10 * math.log10(2))


def test_images_held_out_are_measured_and_not_learned(small: Context) -> None:
    config = replace(ONE_STEP, steps=3, held_out=40)
    first = ssba.prepare(config, small)
    order = torch.randperm(400, generator=ssba.generator(small.seed, "ssba-held-out"))
    changed = small.images.clone()
    changed[order[:40]] = 255 - changed[order[:40]]
    second = ssba.prepare(config, replace(small, images=changed))
    assert all(torch.equal(first[name], second[name]) for name in first if name.startswith("encoder."))
    triggered = ssba.apply(changed[order[:40]], config, second, 7, "test")
    decoder = ssba.trained(small.images[order[40:]], config, small.seed)[1]
    assert torch.equal(second["bit_accuracy"], ssba.read_right(decoder, triggered, second["secret"]))
    assert torch.equal(second["psnr"], ssba.psnr(changed[order[:40]], triggered)) and second["psnr"] != first["psnr"]


def test_a_seed_fixes_weights_and_string_and_the_global_state_is_left_alone(small: Context) -> None:
    before = torch.get_rng_state()
    first = ssba.prepare(ONE_STEP, small)
    ssba.apply(small.images[:2], ONE_STEP, first, 7, "test")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again = ssba.prepare(ONE_STEP, small)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    config = replace(ONE_STEP, bits=64)
    states = [ssba.prepare(config, replace(small, seed=seed)) for seed in (7, 8)]
    for name in ("secret", "encoder.first.0.weight"):
        assert not torch.equal(*(state[name] for state in states))


def test_the_state_is_small_and_complete(small: Context, state: dict[str, Tensor]) -> None:
    images = small.images[:20]
    assert torch.equal(ssba.apply(images, SHORT, loads(saves(state)), 7, "test"),
                       ssba.apply(images, SHORT, state, 0, "train"))
    assert len(saves(ssba.prepare(replace(CONFIG, steps=1), small))) < 1_000_000


def test_images_are_stamped_alike_in_any_company(small: Context, state: dict[str, Tensor]) -> None:
    together = ssba.apply(small.images[:300], SHORT, state, 7, "test").int()
    alone = torch.cat([ssba.apply(small.images[i:i + 1], SHORT, state, 7, "test") for i in (0, 255, 256, 299)]).int()
    assert (together[[0, 255, 256, 299]] - alone).abs().max() <= 1  # a rounding


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (24, 40), (33, 31), (64, 64)])
def test_other_sizes(size: tuple[int, int], small: Context) -> None:
    images = F.interpolate(small.images[:40].float(), size).to(torch.uint8)
    state = ssba.prepare(ONE_STEP, replace(small, images=images, labels=small.labels[:40]))
    result = ssba.apply(images, ONE_STEP, state, 7, "test")
    assert result.shape == images.shape and result.dtype == torch.uint8
    assert (result != images).flatten(1).any(1).all()


def test_progress_is_reported(small: Context) -> None:
    shares: list[float] = []
    ssba.prepare(replace(ONE_STEP, steps=4), replace(small, progress=shares.append))
    assert shares == [0.25, 0.5, 0.75, 1.0]
