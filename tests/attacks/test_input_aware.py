"""Input-aware triggers: the networks and losses of the released code, and a training that sees what it should.

Expected values: networks/models.py, create_bd and create_cross of train.py in VinAIResearch/
input-aware-backdoor-attack-release@1750e4f, with the weights of `fill` in eval mode, on `random_images(8)` normalised
as there and the results brought back to [0, 1]; torch 2.15 on a CPU.
"""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks import input_aware
from defenses import ft
from reproduce.cells import Cell, Victim
from reproduce.data.augment import Augment, to_input
from reproduce.runner import Runner
from reproduce.store import Store
from reproduce.training import Cosine, Recipe
from tests.attacks.stand_ins import random_images

CONFIG = input_aware.SETTINGS["mcldef", "described"]
# B(x, x) times 255, rounded, for the first four images: uint8 (4, 3, 32, 32).
STAMPED = "c04640114c2e308deeca1f2c5052e8d1046b483b3dc34f12337262745e78c1a3"


def fill(state: dict[str, Tensor]) -> None:
    """Weights by formula, so that two implementations can be given the same ones."""
    for k, (name, value) in enumerate(state.items()):
        if value.is_floating_point():
            wave = torch.sin(torch.arange(value.numel(), dtype=torch.float64) * 0.7 + k)
            scale = name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight"))
            value.copy_((1 + 0.5 * wave if scale else 0.03 * wave).view(value.shape).float())


@pytest.fixture(scope="module")
def networks() -> tuple[nn.Module, nn.Module]:
    """Generator and mask network with weights by formula."""
    built = input_aware.blank(CONFIG)
    for network in built:
        fill(network.eval().state_dict())
    return built


@torch.no_grad()
def test_triggers_are_the_released_ones(networks: tuple[nn.Module, nn.Module]) -> None:
    assert [sum(p.numel() for p in network.parameters()) for network in networks] == [723_273, 722_691]
    images = to_input(random_images(8))
    own, other = images[:4], images[4:]
    attacked, patterns = input_aware.stamped(own, own, *networks)
    crossed, other_patterns = input_aware.stamped(own, other, *networks)

    def mean_square(values: Tensor) -> float:
        return values.double().square().mean().item()

    assert mean_square(patterns) == pytest.approx(0.4508105834, abs=1e-5)
    assert mean_square(attacked) == pytest.approx(0.5579698705, abs=1e-5)
    assert mean_square(crossed) == pytest.approx(0.5659398794, abs=1e-5)
    masks = input_aware.sharpened(networks[1](input_aware.normalised(own)))
    assert 100 * F.relu(masks - CONFIG.density).mean().item() == pytest.approx(40.06508884, rel=1e-4)
    normalised = [input_aware.normalised(part) for part in (own, other, patterns, other_patterns)]
    assert input_aware.diversity(*normalised).item() == pytest.approx(1.8637373447, rel=1e-4)


def test_apply_stamps_each_image_with_its_own_trigger(networks: tuple[nn.Module, nn.Module]) -> None:
    images, state = random_images(4), input_aware.weights(*networks)
    result = input_aware.apply(images, CONFIG, state, 0, "test")
    assert hashlib.sha256(result.contiguous().numpy().tobytes()).hexdigest() == STAMPED
    alone = torch.cat([input_aware.apply(image[None], CONFIG, state, 0, "test") for image in images])
    assert (alone.int() - result.int()).abs().max() <= 1


def test_equal_images_with_equal_patterns_have_a_gradient() -> None:
    images, patterns = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8, requires_grad=True)
    input_aware.diversity(images, images, patterns, patterns.detach().clone()).backward()
    assert torch.equal(patterns.grad, torch.zeros_like(patterns))


class Recorder(nn.Module):
    """A model that keeps what it is shown."""

    def forward(self, images: Tensor) -> Tensor:
        self.seen = images
        return images.mean((2, 3)).repeat(1, 4)[:, :10]


def test_what_the_victim_is_trained_on(networks: tuple[nn.Module, nn.Module]) -> None:
    data, labels = random_images(40), torch.arange(40) % 10
    batch = to_input(data)
    drawn = torch.cat([torch.tensor([[30], [31], [32], [33]]), torch.zeros(4, 5, dtype=torch.long)], 1)
    joint = input_aware.Joint(Recorder(), *networks).eval()
    result = input_aware.joint_loss(data, CONFIG, Augment(), 10)(joint, batch, labels, drawn)
    seen = joint.classifier.seen
    with torch.no_grad():
        own = input_aware.stamped(batch[:4], batch[:4], *networks)[0]
        crossed = input_aware.stamped(batch[4:8], batch[30:34], *networks)[0]
    assert torch.allclose(seen[:4], own, atol=1e-6) and torch.allclose(seen[4:8], crossed, atol=1e-6)
    assert not torch.allclose(crossed, input_aware.stamped(batch[4:8], batch[4:8], *networks)[0], atol=0.1)
    assert torch.equal(seen[8:], batch[8:])
    assert result.labels[:4].tolist() == [5] * 4 and torch.equal(result.labels[4:], labels[4:])
    assert result.total == result.terms["ce"] + result.terms["diversity"]
    result.total.backward()
    learned = {name.split(".")[0] for name, p in joint.named_parameters() if p.grad is not None}
    assert learned == {"generator"}  # the recorder has no weights, the masks are frozen


def test_as_many_images_are_crossed_as_are_poisoned(networks: tuple[nn.Module, nn.Module]) -> None:
    config = replace(input_aware.SETTINGS["fmp", "described"], rate=0.01)
    rng = torch.Generator().manual_seed(0)
    assert {input_aware.crossed_in_batch(replace(config, rate=0.1))(40, rng) for _ in range(20)} == {4}
    assert {input_aware.crossed_in_batch(config)(40, rng) for _ in range(40)} == {0, 1}
    assert input_aware.crossed_in_batch(replace(CONFIG, rate=0.01))(40, rng) == 4  # a share of its own
    data, labels = random_images(40), torch.ones(40, dtype=torch.long)
    joint = input_aware.Joint(Recorder(), *networks).eval()
    loss, batch = input_aware.joint_loss(data, config, Augment(), 10), to_input(data)
    result = loss(joint, batch, labels, torch.tensor([[30, 0, 0, 0, 0, 0]]))
    seen = joint.classifier.seen
    assert [not torch.allclose(seen[i], batch[i], atol=0.1) for i in range(4)] == [True, True, False, False]
    assert result.labels.tolist() == [0] + [1] * 39
    clean = loss(joint, batch, labels, torch.zeros(0, 6, dtype=torch.long))
    assert torch.equal(joint.classifier.seen, batch) and clean.labels is None


def test_partners_are_augmented_images_of_the_set() -> None:
    data = random_images(50)
    extra = input_aware.partner_draws(data, Augment(), lambda batch, rng: batch // 10)
    drawn = extra(60, torch.Generator().manual_seed(0))
    assert drawn.shape == (6, 6) and len(set(drawn[:, 0].tolist())) > 3
    assert torch.equal(input_aware.partners(data, drawn, Augment()), to_input(data)[drawn[:, 0]])
    flip = Augment(flip=True)
    drawn[:, 3] = 1
    assert torch.equal(input_aware.partners(data, drawn, flip), to_input(data)[drawn[:, 0]].flip(3))


def test_rates_of_the_mask_network() -> None:
    assert input_aware.mask_rates(CONFIG) == ((0, 0.01), (10, 0.001), (20, 0.0001))
    assert input_aware.mask_rates(replace(CONFIG, mask_epochs=1))[0] == (0, 0.01)
    for epochs in (1, 2, 3):
        recipe = Recipe(epochs, input_aware.mask_rates(replace(CONFIG, mask_epochs=epochs)))
        assert recipe.rate(0) == 0.01


def test_a_victims_cosine_is_not_the_mask_networks(labelled: tuple[Tensor, Tensor]) -> None:
    images, labels = (part[:32] for part in labelled)
    config = replace(CONFIG, width=4, mask_epochs=5)
    recipe = Recipe(1, ((0, 0.01),), batch=32, cosine=Cosine(10))
    history, _state = input_aware.implant(
        Victimless(), images, labels, config, input_aware.prepare(config, input_aware.Context(images, labels, 10, 0)),
        recipe, 0, 10)
    assert [row["rate"] for row in history if row.get("phase") == "masks"] == [0.01, 0.01, 0.001, 0.001, 0.0001]


def test_the_masks_become_sparse_and_then_stay(labelled: tuple[Tensor, Tensor]) -> None:
    config = replace(CONFIG, width=8, mask_epochs=4)
    images, labels = (part[:256] for part in labelled)
    seed = 1    # with 0 the norm rises before it falls, for how long depends on rounding
    context = input_aware.Context(images, labels, 10, seed)
    state = input_aware.prepare(config, context)
    recipe = Recipe(1, ((0, 0.01),), batch=32)
    history, final = input_aware.implant(Victimless(), images, labels, config, state, recipe, seed, 10)
    norms = [row["norm"] for row in history if row.get("phase") == "masks"]
    assert norms[-1] < 0.7 * norms[0]
    assert not torch.equal(final["masks.0.weight"], state["masks.0.weight"])
    # The joint training moves the generator and leaves the masks alone, BatchNorm statistics too.
    more = input_aware.implant(Victimless(), images, labels, config, state, replace(recipe, epochs=2), seed, 10)[1]
    for name in final:
        if name.startswith("masks."):
            assert torch.equal(final[name], more[name])
    assert not torch.equal(final["generator.0.weight"], more["generator.0.weight"])


class Victimless(nn.Module):
    """The smallest classifier there is."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.mean((2, 3)))


def test_a_victims_run_keeps_the_trained_trigger(tmp_path: Path) -> None:
    settings = replace(CONFIG, width=4, mask_epochs=1)
    victim = Victim("digits", "wrn-10-1", Recipe(1, ((0, 0.05),), batch=128), 0, "input_aware", settings)
    runner = Runner(Store(tmp_path), tmp_path, torch.device("cpu"))
    run = runner.run(victim)
    assert [row["phase"] for row in run.history()] == ["masks", "victim"]
    trigger = run.tensors("trigger")
    assert trigger["masks.1.num_batches_tracked"] > 0 and trigger["generator.1.num_batches_tracked"] > 0
    # A defense finds the same triggered images that the victim was evaluated on.
    _model, test = runner._bench("image")._load_victim(victim)
    assert torch.equal(test.triggered[:8], torch.from_numpy(run.arrays("samples")["triggered"]))
    assert len(test.triggered) == len(run.predictions().triggered)
    # So does the network that was never poisoned, whose weights are those of the clean one, stored there.
    clean, never = runner.run(victim.clean()), runner.run(victim.unpoisoned())
    assert never.arrays("samples")["triggered"].tobytes() == run.arrays("samples")["triggered"].tobytes()
    assert never.predictions().clean.tobytes() == clean.predictions().clean.tobytes()
    assert len(never.predictions().triggered) == len(run.predictions().triggered)
    assert not (never.path / "model.safetensors").exists()
    repaired = runner.run(Cell(victim.unpoisoned(), "ft", ft.Config(Recipe(1, ((0, 0.05),), batch=128)), 0.2))
    assert repaired.json("metrics")["n_nontarget"] == never.json("metrics")["n_nontarget"]
