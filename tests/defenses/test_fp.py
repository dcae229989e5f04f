"""Fine-Pruning: the ranking, the stopping rule, and that what is pruned stays pruned."""

from dataclasses import replace

import pytest
import torch

from defenses import fp
from reproduce.data.augment import to_input
from reproduce.models import build
from reproduce.models.taps import features

# Steps a to d of huangd1999/BackdoorBench@6135839 (defense/fp/fp.py:207-441), which cuts the channels out of the last
# convolution, of the shortcut beside it and of the classifier, torch 2.15 on a CPU, on `blocks()`: the order in which
# channels go (its ends), how many of the 48 images keep their class with so many gone, and logits of the first image
# with 100 gone.
BENCH_ORDER = [507, 202, 9, 133, 307, 124, 471, 438, 127, 193, 245, 206], [385, 184, 345, 459]
BENCH_CORRECT = {0: 48, 1: 20, 2: 19, 3: 18, 5: 19, 10: 21, 50: 18, 100: 17, 300: 17, 511: 17}
BENCH_LOGITS = (0.00051, -0.00668, 0.00093, -0.00222, -0.00046, 0.00258, -0.00616, -0.0002, 0.00427, -0.01231)


def blocks():
    """An untrained PreAct-ResNet18 of its seed, images of 16 coloured blocks, and the classes it gives them once its
    logits are centred, which makes them many."""
    model = build("preact-resnet-18", 10, seed=0).eval()
    images = torch.randint(0, 256, (48, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = images.repeat_interleave(8, 2).repeat_interleave(8, 3)
    with torch.no_grad():
        model.linear.bias.sub_(model(to_input(images)).mean(0))
        return model, images, model(to_input(images)).argmax(1)


def test_prunes_as_the_bench_does():
    model, images, labels = blocks()
    active = fp.activations(model, images)
    order = active.mean(0).argsort()
    assert (order[:12].tolist(), order[-4:].tolist()) == BENCH_ORDER
    curve = fp.pruning_curve(active, labels, order, model.linear)
    correct = {k: 48 * curve[k] / 100 for k in BENCH_CORRECT}
    assert correct == pytest.approx(BENCH_CORRECT, abs=1.01)     # one image may sit on a tie
    fp.prune(model, order[:100])
    with torch.no_grad():
        torch.testing.assert_close(model(to_input(images[:1]))[0], torch.tensor(BENCH_LOGITS), atol=1e-5, rtol=0)


def test_activations_are_the_classifier_input(victim, clean):
    model = fp.deepcopy(victim).eval()
    seen = []
    model.fc.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(to_input(clean.images))
    torch.testing.assert_close(fp.activations(model, clean.images), seen[0], atol=1e-5, rtol=1e-5)


def test_pruning_curve_is_the_accuracy_of_the_pruned_model(victim, clean):
    model = fp.deepcopy(victim).eval()
    active = fp.activations(model, clean.images)
    order = active.mean(0).argsort()
    curve = fp.pruning_curve(active, clean.labels, order, model.fc)
    assert len(curve) == 64
    for count in (0, 20, 63):
        pruned = fp.deepcopy(model)
        fp.prune(pruned, order[:count])
        with torch.no_grad():
            accuracy = 100 * (pruned(to_input(clean.images)).argmax(1) == clean.labels).float().mean().item()
        assert curve[count] == pytest.approx(accuracy, abs=1.01)    # one image may sit on a tie


@pytest.mark.parametrize(("curve", "count"), [
    ([90.0, 90.0, 87.0, 85.0, 90.0, 80.0], 2),  # stops before the first drop beyond 4 points, whatever comes later
    ([90.0, 91.0, 92.0, 93.0], 3),          # never prunes the last channel
    ([90.0, 50.0], 0),
    ([90.0, 86.0, 85.9], 1),                # exactly 4 points are allowed
])
def test_stopping_rule(curve, count):
    assert fp.pruned_count(curve, 4.0) == count


def test_prunes_the_least_active_and_keeps_them_at_zero(victim, clean, shorten):
    result = fp.defend(victim, clean, shorten(replace(fp.Config(), tolerance=10.0), epochs=2), 5)
    pruned = result.info["pruned"]
    assert 0 < len(pruned) < result.info["channels"] == 64
    assert result.info["validation_acc"] - result.info["validation_acc_pruned"] <= 10.0
    kept = sorted(set(range(64)) - set(pruned))
    # On images unlike any it was trained on.
    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for model in (result.model, fp.deepcopy(result.model).train()):
        with torch.no_grad():
            _, (output,) = features(model, to_input(images), ("bn1",))
        assert (output[:, pruned] == 0).all() and (output[:, kept] != 0).any()
    ranking, _ = fp.split_validation(clean, fp.Config().validation, 5)
    mean = fp.activations(fp.deepcopy(victim).eval(), ranking.images).mean(0)
    assert mean[pruned].max() <= mean[kept].min()


def test_pruned_channels_are_put_back_to_zero_after_every_step(victim, clean, shorten):
    """Not by the accident alone that a channel of constant 0 gets no gradient through the ReLU."""
    def revive(phase, epoch, epochs, model, row):
        if epoch == 1:
            torch.nn.init.ones_(model.bn1.bias)

    result = fp.defend(victim, clean, shorten(replace(fp.Config(), tolerance=10.0), epochs=2), 5, observe=revive)
    assert (result.model.bn1.bias[result.info["pruned"]] == 0).all()
    assert (result.model.bn1.bias > 0.5).sum() == 64 - len(result.info["pruned"])


def test_channels_of_a_resnet_are_cut_off_at_the_classifier(clean):
    model = build("resnet-18", 10, seed=0).eval()
    images, channels = clean.images[:8], torch.tensor([3, 500])
    active = fp.activations(model, images)
    assert active.shape == (8, 512) and (active[:, channels] > 0).any()
    active[:, channels] = 0
    fp.prune(model, channels)
    with torch.no_grad():
        torch.testing.assert_close(model(to_input(images)), model.linear(active), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("architecture", "layers"), [
    ("wrn-10-1", ["block3.layer.0.conv2", "fc"]), ("resnet-18", ["layer4.1.conv2", "linear"])])
def test_last_layers_are_a_wide_convolution_and_the_classifier(architecture, layers):
    assert fp.last_layers(build(architecture, 10, seed=0)) == layers


def test_a_relative_tolerance_is_a_share_of_the_victims_accuracy(victim, clean, shorten, monkeypatch):
    monkeypatch.setattr(fp, "pruning_curve", lambda *arguments: [50.0, 46.0, 45.0, 44.0] + [40.0] * 60)
    points, percent = (len(fp.defend(victim, clean, replace(shorten(fp.Config()), tolerance=10.0, relative=relative),
                                     5).info["pruned"]) for relative in (False, True))
    assert (points, percent) == (63, 2)     # down to 40, and to 45


def test_as_released_by_the_bench_only_the_last_layers_learn(victim, clean, shorten):
    tuned = {}
    for variant in ("described", "released"):
        config = replace(shorten(fp.SETTINGS["fmp", variant]), validation=0.5)
        result = fp.defend(victim, clean, config, 5)
        assert config.relative and config.tolerance == 10.0
        tuned[variant] = {name for name, value in result.model.named_parameters()
                          if not torch.equal(value, victim.get_parameter(name)) and "bn1" not in name}
    assert tuned["released"] == {"block3.layer.0.conv2.weight", "fc.weight", "fc.bias"}
    assert tuned["described"] == {name for name, _ in victim.named_parameters() if "bn1" not in name}
