"""FMP: its scores, its pruning and its fine-tuning against numbers of the official code; each fault and control."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from benchmarks import usual
from defenses import fmp, ft
from reproduce import data, models
from reproduce.cells import Cell, Victim, plain
from reproduce.data.augment import Augment, to_input
from reproduce.defending import Clean, Defended
from reproduce.errors import UserError
from reproduce.images import ImageBench
from reproduce.models import ARCHITECTURES, build
from reproduce.models.preact_resnet import PreActBlock
from reproduce.models.taps import features
from reproduce.protocols import PROFILES
from reproduce.training import Cosine
from tests.defenses.tiny import wave

# retsuh-bqw/FMP@8d1cb59: obtain_adv_dataset, initialize and train (defense/fgsm-feature.py:133-329) on the network that
# `small_net` builds, with its PreActBlocks (models/preact_resnet.py:18-41) as blocks: the same weights, images and
# labels, alpha 0.02, eps 0.06, its start noise replaced by 0.02 sign(wave(1.3)); torch 2.15 on a CPU.
# Scores in the order it collects them: "A" is 10 right of 32, "B" 11, ...
ORDER = ("0", "1.conv1", "1.conv2", "2.shortcut.0", "2.conv1", "2.conv2")
OFFICIAL_SCORES = (
    "OOONSLSQMROKQUNLONJQONQQNNPPQROOOQNMRQMOPLORLNORPROROQMPSNQOPQQN",
    "LQORPMOOOPPOORJPOMMMOMQOQSKQONPOMOOOPNOQNPPPMNNMQQMOLPQRNNPNONMP",
    "LRMOMPOPOMLPQNQMONPQMQLMRNLIOLNSLLMJQLOQNMNROQPLMNPMPQPPNMOOOLPO",
    "MQONRLQNPJQQNLRMNPLMQPKMOPPONROPMNMLOKMROQROLOOMMPMJPMNNRQPOKONN"
    "RLQOOMPMSPOQNPMQNLMLPMNPGKNPPRRNJMPOQLNNONOPPSPONOOMSQNSONKLNPMN",
    "LNPOKROMPPQRNNNPPQQPNQNPJQRRJPRPQSPPQPMNOMOPMRPPKPQSQNNPLNQNQQNQ"
    "RPPOSOPNONSLRRROPRPRROQQPOQNNPNOQQQOOONQLKLLMOMRMTPPOONRRONPSOOL",
    "NKRNNQRKOOMQONOMNOPNPQMKMPMPLQPONNOQSLMOQPMRMPMNMSOQPPLMNOOMQRJQ"
    "QPORLPQRRRJSQMKLOMOOOPLOQQPPPMQKPRPORQOOSMQNPPOLOORKQMQTPOOOQPRN",
)
# The same where images are normalised (twice), on the labels it then gives: of the shortcut alone.
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)
OFFICIAL_TWICE = (
    "JIHIHKHIJIIJGIHIJIHHIIHIIKKIKJHKIIHJIJJJKGJIIIIIHIJHIKHKGHIKJIJG"
    "KJIHJIHILKKJIHJHIIJJILKIKGKHJIHHIIKIIHJIHJIJJGIIJIJIIJHGHIIIHHIJ"
)
LABELS = (0, 0, 3, 3, 3, 4, 2, 1, 2, 1, 3, 4, 0, 4, 2, 4, 2, 0, 2, 4, 0, 2, 1, 4, 2, 1, 2, 2, 0, 4, 1, 1)
LABELS_TWICE = (2, 2, 2, 2, 2, 2, 2, 1, 2, 2, 2, 2, 2, 0, 2, 2, 2, 4, 2, 2, 2, 2, 2, 2, 4, 1, 2, 2, 2, 2, 1, 2)
# What it sets to 0: the lists of the last three convolutions in that order prune others than they were made for.
OFFICIAL_ZEROS = {
    "0.weight": [18], "1.bn1.weight": [18], "1.conv1.weight": [14], "1.bn2.weight": [14], "1.conv2.weight": [27],
    "2.bn1.weight": [27], "2.conv1.weight": [9, 88], "2.bn2.weight": [9, 88], "2.conv2.weight": [24, 28],
    "2.shortcut.0.weight": [62, 74], "3.weight": [62, 74],
}
# After three epochs of two batches of 16, with 16 test images after each: logits of the first three images, and running
# mean and variance of five channels of the last BatchNorm.
OFFICIAL_LOGITS = ((1.2514, 0.09387, -0.46426, -0.19139, 0.48932), (1.13172, -0.11315, -0.07344, 0.16304, -0.49834),
                   (-0.03331, 0.06747, -0.27984, 0.77275, -0.30802))
OFFICIAL_MEAN = (0.240868, 0.646965, 0.603483, -0.210282, 1.487909)
OFFICIAL_VARIANCE = (0.942768, 1.326813, 1.388319, 1.290373, 1.287556)


class Small(nn.Sequential):
    """(N, 3, 4, 4) -> (N, 5), normalising inside as BackdoorBench's models are used."""

    mean, deviation = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    adds_in_place = True

    def normalise(self, images: Tensor) -> Tensor:
        mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (self.mean, self.deviation))
        return (images - mean) / deviation

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(self.normalise(images))


def chirp(shape: tuple[int, ...], step: float) -> Tensor:
    """Like noise, where `wave` is a tone."""
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(step * (index * index % 10007)).float().view(shape)


def pictures(count: int, step: float) -> Tensor:
    return (chirp((count, 3, 4, 4), step) * 127.5 + 127.5).round().to(torch.uint8)


def small_net(mean=Small.mean, deviation=Small.deviation) -> Small:
    """A stem, two pre-activation blocks, BatchNorm and classifier, of 64, 64 and 128 channels; in eval mode."""
    net = Small(nn.Conv2d(3, 64, 3, padding=1, bias=False), PreActBlock(64, 64, 1), PreActBlock(64, 128, 2),
                nn.BatchNorm2d(128), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 5))
    net.mean, net.deviation = mean, deviation
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    images = pictures(32, 0.37).float() / 255
    with torch.no_grad():
        for index, parameter in enumerate(net.parameters()):
            size = (4 / parameter[0].numel()) ** 0.5 if parameter.dim() > 1 else 0.5
            parameter.copy_(chirp(parameter.shape, 0.7 + 0.1 * index) * size)
        for norm in norms:
            norm.weight.add_(1.0)
            norm.momentum = 1.0     # the statistics of these images
        net(images)
        for norm in norms:
            norm.momentum = 0.1
        net[-1].bias.sub_(net.eval()(images).mean(0))
    return net


@pytest.fixture
def official_noise(monkeypatch):
    signs = wave((32, 3, 4, 4), 1.3).sign().to(torch.int8)
    monkeypatch.setattr(fmp, "start_signs", lambda images, seed: signs)
    return signs


def decoded(score: str) -> Tensor:
    return torch.tensor([ord(letter) - ord("A") + 10 for letter in score]) * 100 / 32


def frozen(model: nn.Module) -> nn.Module:
    return fmp.deepcopy(model).eval().requires_grad_(False)


def assert_official(ours: Tensor, theirs: Tensor) -> None:
    """Percentages of 32 images. Rounding differs between machines: an image may lie on the border of two classes."""
    assert (ours - theirs).abs().max() <= 100 / 32 + 1e-3 and (ours != theirs).sum() <= 2


def test_scores_on_images_normalised_twice_are_the_official_ones(official_noise):
    net, labels = frozen(small_net(MEAN, DEVIATION)), torch.tensor(LABELS_TWICE)
    found, undisturbed = fmp.accuracies(net, pictures(32, 0.37), labels, official_noise, [ORDER[3]], fmp.RELEASED)
    assert undisturbed == 100
    assert_official(found[ORDER[3]], decoded(OFFICIAL_TWICE))
    once, _ = fmp.accuracies(net, pictures(32, 0.37), labels, official_noise, [ORDER[3]],
                             fmp.without_fault("normalised"))
    assert (once[ORDER[3]] != found[ORDER[3]]).sum() > 50


def test_images_are_normalised_twice_for_a_checkpoint_that_is_told_how_too(official_noise):
    net, labels = frozen(small_net(*models.CHECKPOINT_NORMALISATIONS["cifar10"])), torch.tensor(LABELS_TWICE)
    told = models.normalise_inputs(nn.Sequential(*net).eval(), "cifar10")
    scores = [fmp.accuracies(model, pictures(32, 0.37), labels, official_noise, [ORDER[3]], config)[0][ORDER[3]]
              for model in (net, told) for config in (fmp.RELEASED, fmp.without_fault("normalised"))]
    assert torch.equal(scores[0], scores[2]) and torch.equal(scores[1], scores[3])
    assert not torch.equal(scores[0], scores[1])


def test_scores_prunes_and_fine_tunes_as_the_official_code_does(official_noise, monkeypatch):
    tuned = []
    kept = ft.fine_tune
    monkeypatch.setattr(fmp.ft, "fine_tune", lambda model, *rest, **options: tuned.append(
        {name: value.clone() for name, value in model.state_dict().items()}) or kept(model, *rest, **options))
    recipe = replace(fmp.RECIPE, epochs=3, cosine=Cosine(3, 1e-4), batch=16, shuffle=False, augment=Augment())
    clean = Clean(pictures(32, 0.37), torch.tensor(LABELS), 5, test=pictures(16, 0.91))
    net = small_net()
    result = fmp.defend(net, clean, replace(fmp.RELEASED, recipe=recipe), seed=0)
    before, zeros = net.state_dict(), {}
    for name, value in tuned[0].items():
        rows = (value != before[name]).view(len(value), -1).any(1) if value.dim() else torch.zeros(0)
        if rows.any():
            zeros[name] = rows.nonzero().flatten().tolist()
            assert (value[rows] == 0).all()
    assert result.info["layers"] == list(fmp.convolutions(net)) and result.info["scoring_acc"] == 100
    for name, score in zip(ORDER, OFFICIAL_SCORES, strict=True):
        measured = result.tensors["layer"] == result.info["layers"].index(name)
        assert_official(result.tensors["scores"][measured], decoded(score))
    assert zeros == OFFICIAL_ZEROS
    assert result.info["pruned"] == {name: zeros[f"{name}.weight"] for name in fmp.convolutions(net)}
    with torch.no_grad():
        logits = result.model(to_input(clean.images[:3]))
    torch.testing.assert_close(logits, torch.tensor(OFFICIAL_LOGITS), atol=1e-3, rtol=0)
    last = result.model[3]
    torch.testing.assert_close(last.running_mean[:5], torch.tensor(OFFICIAL_MEAN), atol=1e-4, rtol=0)
    torch.testing.assert_close(last.running_var[:5], torch.tensor(OFFICIAL_VARIANCE), atol=1e-4, rtol=0)
    assert last.num_batches_tracked == 10


# The fast path


def test_scores_are_those_of_a_loop_over_maps(victim, clean):
    model, images = frozen(victim), clean.images[:24]
    labels, signs = clean.labels[:24], fmp.start_signs(images, 3)
    config = replace(fmp.DESCRIBED, eps=0.06, alpha=0.02)
    names = ["conv1", "block2.layer.0.convShortcut", "block3.layer.0.conv1"]
    inputs = to_input(images)
    start = (inputs + config.alpha * signs).clamp(0, 1)
    slow = {name: torch.tensor(usual.map_scores(model, inputs, start, labels, name, config.eps)) for name in names}
    assert len(torch.cat(list(slow.values())).unique()) > 3
    for batch in (5, 24, 100):      # parts of the images, all of them, several maps at once
        fast, undisturbed = fmp.accuracies(model, images, labels, signs, names, replace(config, batch=batch))
        assert list(fast) == names
        for name in names:
            assert (fast[name] - slow[name]).abs().max() <= 100 / 24 + 1e-3
            assert (fast[name] - slow[name]).abs().gt(1e-3).sum() <= 1
    assert undisturbed == pytest.approx(100 * (model(inputs).argmax(1) == labels).double().mean().item())


def test_the_batch_of_the_scoring_is_no_part_of_the_identity():
    assert plain(replace(fmp.DESCRIBED, batch=7)) == plain(fmp.DESCRIBED)


def test_a_step_goes_up_the_distance_of_that_map(victim, clean):
    model, inputs = frozen(victim), to_input(clean.images[:6])
    start = (inputs + 0.02 * fmp.start_signs(inputs, 0)).clamp(0, 1).requires_grad_()
    maps = [features(model, images, ("block2",))[1][0] for images in (inputs, start)]
    stepped = fmp.step_up(start, *maps, 3, 1 / 255)
    moved = (stepped - start).abs()
    assert moved.max() <= 1 / 255 + 1e-6 and (moved > 0).float().mean() > 0.3
    assert 0 <= stepped.min() <= stepped.max() <= 1
    after = features(model, stepped, ("block2",))[1][0]
    assert ((after - maps[0])[:, 3].square().sum((1, 2)) > (maps[1] - maps[0])[:, 3].square().sum((1, 2))).all()


def test_without_start_noise_nothing_would_move(victim, clean):
    model, inputs = frozen(victim), to_input(clean.images[:6])
    start = inputs.clone().requires_grad_()
    before, after = (features(model, images, ("block2",))[1][0] for images in (inputs, start))
    assert torch.equal(fmp.step_up(start, before.detach(), after, 3, 0.06), inputs)


# What belongs together


@pytest.mark.parametrize("name", ["wrn-10-1", "wrn-16-2", "resnet-18", "preact-resnet-18-w8"])
def test_order_sums_and_norms_of_our_networks(name):
    model = build(name, 10, 0).eval()
    order, sums = fmp.run_order(model, torch.rand(1, 3, 16, 16))
    convs, norms = fmp.convolutions(model), fmp.norms_after(model)
    assert sorted(order) == sorted(convs) == sorted(norms)
    for conv, found in norms.items():
        assert all(model.get_submodule(norm).num_features == convs[conv].out_channels for norm in found)
    # Every BatchNorm is some convolution's, and no two convolutions'.
    paired = [norm for found in norms.values() for norm in found]
    assert sorted(paired) == sorted(n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
    rotated = {conv: other for conv, other in fmp.rotation(model, torch.rand(1, 3, 16, 16)).items() if conv != other}
    if name != "preact-resnet-18-w8":
        assert order == list(convs) and not rotated
    if name == "resnet-18":
        assert not sums and all(len(found) == 1 for found in norms.values())
        return
    blocks = {conv.removesuffix(".conv2") for conv in convs if conv.endswith(".conv2")}
    if name != "preact-resnet-18-w8":
        assert norms["conv1"] == ["block1.layer.0.bn1"]
        assert norms["block2.layer.0.conv1"] == ["block2.layer.0.bn2"] and not norms["block2.layer.0.conv2"]
        return
    assert sums == {f"{block}.conv2": block for block in blocks}
    expected = {}
    for block in {conv.removesuffix(".shortcut.0") for conv in convs if conv.endswith("shortcut.0")}:
        expected |= {f"{block}.conv1": f"{block}.shortcut.0", f"{block}.conv2": f"{block}.conv1",
                     f"{block}.shortcut.0": f"{block}.conv2"}
    assert rotated == expected and expected


def test_faults_of_the_order_and_of_the_sum_are_not_those_of_nads_network(victim, clean, shorten):
    """models/wresnet.py:28-37 of bboylyg/NAD@f17b713 runs what it registers in that order, and adds out of place."""
    settings = replace(shorten(fmp.DESCRIBED), images=24, p=8, eps=0.06, alpha=0.02)
    without, both = (fmp.defend(victim, clean, replace(settings, rotated=on, summed=on), 5) for on in (False, True))
    assert without.info == both.info and len(without.tensors["scores"].unique()) > 3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_network_changes_a_feature_map_in_place(name):
    """The fault `summed` would be in `described` too."""
    model = build(name, 10, 0).eval()
    with torch.no_grad():
        _, maps = features(model, torch.rand(1, 3, 32, 32), list(fmp.convolutions(model)))
    assert all(found._version == 0 for found in maps)


def test_summed_scores_are_those_of_the_block():
    model, images, labels = frozen(small_net()), pictures(32, 0.37), torch.tensor(LABELS)
    signs, config = fmp.start_signs(images, 0), replace(fmp.DESCRIBED, eps=0.06, alpha=0.02)
    summed = replace(config, summed=True)
    names = ["2.conv1", "2.conv2"]
    apart, together = (fmp.accuracies(model, images, labels, signs, names, c)[0] for c in (config, summed))
    start = (to_input(images) + 0.02 * signs).clamp(0, 1)
    model[2].out_channels = 128     # what the loop asks of a layer
    slow = torch.tensor(usual.map_scores(model, to_input(images), start, labels, "2", 0.06))
    assert torch.equal(apart[names[0]], together[names[0]])
    assert not torch.equal(apart[names[1]], together[names[1]])
    assert (together[names[1]] - slow).abs().gt(1e-3).sum() <= 1
    model.adds_in_place = False
    assert torch.equal(fmp.accuracies(model, images, labels, signs, names, summed)[0][names[1]], apart[names[1]])


# Selection and pruning


def test_pruned_maps_of_a_first_convolution_are_constant_and_stay_so(victim, clean, shorten):
    result = fmp.defend(victim, clean, replace(shorten(fmp.DESCRIBED, epochs=2), p=8, images=16), 5)
    norms = fmp.norms_after(result.model)
    for name, maps in result.info["pruned"].items():
        assert len(maps) == fmp.convolutions(victim)[name].out_channels // 8
        if name.endswith("conv1") and name != "conv1":
            weight = result.model.get_submodule(name).weight
            scale = result.model.get_submodule(norms[name][0]).weight
            assert (weight[maps] == 0).all() and (scale[maps] == 0).all()
            assert weight.flatten(1).any(1).sum() == len(weight) - len(maps)
    assert sum(map(len, result.info["pruned"].values())) == result.info["pruned_maps"] == result.tensors["pruned"].sum()
    # Not held, so those that the gradient reaches grow back.
    regrown = (result.model.get_submodule(name).weight[maps] for name, maps in result.info["pruned"].items())
    assert any((weight != 0).any() for weight in regrown)


@pytest.mark.parametrize("keep_beta", [True, False])
def test_prune_zeroes_filters_scales_and_on_request_shifts(keep_beta):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
    for parameter in net.parameters():
        nn.init.ones_(parameter)
    fmp.prune(net, {"0": [1, 3], "2": []}, keep_beta)
    assert net[0].weight[:, 0, 0, 0].tolist() == net[0].bias.tolist() == net[1].weight.tolist() == [1, 0, 1, 0]
    assert net[1].bias.tolist() == ([1, 1, 1, 1] if keep_beta else [1, 0, 1, 0])
    assert all((parameter == 1).all() for parameter in (*net[2].parameters(), *net[3].parameters()))


def test_lowest_scores_go_and_equals_by_their_number():
    scores = {"a": torch.tensor([50.0, 25.0, 75.0, 25.0, 25.0, 90.0]), "b": torch.tensor([5.0, 4.0, 3.0])}
    assert fmp.selected({"a": 6, "b": 3}, scores, replace(fmp.DESCRIBED, p=3), 0) == {"a": [1, 3], "b": [2]}


def test_rotated_scores_prune_other_maps_and_are_shown_where_they_were_measured():
    clean = Clean(pictures(32, 0.37), torch.tensor(LABELS), 5)
    config = replace(fmp.DESCRIBED, eps=0.06, alpha=0.02, recipe=replace(fmp.RECIPE, epochs=1))
    straight, rotated = (fmp.defend(small_net(), clean, replace(config, rotated=r), 5) for r in (False, True))
    assert torch.equal(straight.tensors["scores"], rotated.tensors["scores"])
    ours, theirs = straight.info["pruned"], rotated.info["pruned"]
    assert theirs["2.conv1"] == ours["2.shortcut.0"] and theirs["2.shortcut.0"] == ours["2.conv2"]
    assert theirs["0"] == ours["0"] and ours != theirs


def test_controls_prune_as_many(victim, clean, shorten):
    def run(variant: str, seed: int = 5):
        return fmp.defend(victim, clean, replace(shorten(fmp.SETTINGS["fmp", variant]), p=8), seed)

    described, drawn, active = run("described"), run("random"), run("activation")
    counts = {name: len(maps) for name, maps in described.info["pruned"].items()}
    for control in (drawn, active):
        assert {name: len(maps) for name, maps in control.info["pruned"].items()} == counts
        assert control.info["pruned"] != described.info["pruned"] and control.info["layers"] == described.info["layers"]
    assert run("random", 6).info["pruned"] != drawn.info["pruned"] == run("random").info["pruned"]
    assert "scores" not in drawn.tensors
    images, _labels = fmp.scoring_images(clean, shorten(fmp.DESCRIBED), 5)
    maps = features(frozen(victim), to_input(images), ("bn1",))[1][0].relu().mean((0, 2, 3))
    at = active.info["layers"].index("block3.layer.0.convShortcut")
    torch.testing.assert_close(active.tensors["scores"][active.tensors["layer"] == at], maps)
    assert set(active.info["pruned"]["block3.layer.0.convShortcut"]) == set(maps.argsort()[:8].tolist())


def test_no_pruning_is_the_fine_tuning_alone(victim, clean, shorten, same):
    config = shorten(fmp.SETTINGS["fmp", "no-pruning"])
    result = fmp.defend(victim, clean, config, 5)
    assert result.info["pruned"] == {} and result.info["pruned_maps"] == 0 and not result.tensors["pruned"].any()
    assert same(result.model, ft.fine_tune(victim, clean, config.recipe, 5, phase="pruned"))
    # With all faults but the leak, which is one of fine-tuning, nothing else is left either.
    faults = replace(fmp.without_fault("leak"), select="none", recipe=config.recipe)
    assert same(fmp.defend(victim, clean, faults, 5).model, result.model)


def test_narrow_convolutions_are_left_out_and_a_narrow_network_refused(victim, clean, shorten):
    result = fmp.defend(victim, clean, shorten(fmp.DESCRIBED), 5)
    assert result.info["layers"] == [f"block3.layer.0.{name}" for name in ("conv1", "conv2", "convShortcut")]
    assert result.info["maps"] == 192 == len(result.tensors["scores"]) and result.info["pruned_maps"] == 3
    low, high = result.info["score_range"]
    assert 0 <= low == result.tensors["scores"].min() <= result.tensors["scores"].max() == high <= 100
    with pytest.raises(UserError, match="smaller p"):
        fmp.defend(victim, clean, replace(fmp.DESCRIBED, p=65), 5)


# The images


def test_scoring_images(clean):
    images, labels = fmp.scoring_images(clean, fmp.DESCRIBED, 5)
    assert torch.equal(images, clean.images) and torch.equal(labels, clean.labels)
    images, labels = fmp.scoring_images(clean, replace(fmp.DESCRIBED, images=32), 5)
    found = [(clean.images == image).flatten(1).all(1) & (clean.labels == label)
             for image, label in zip(images, labels, strict=True)]
    assert len(images) == 32 and all(which.any() for which in found)
    moved, same_labels = fmp.scoring_images(clean, replace(fmp.DESCRIBED, images=32, augmented=True), 5)
    assert torch.equal(labels, same_labels) and not torch.equal(images, moved)
    still = replace(fmp.DESCRIBED, images=32, augmented=True, recipe=replace(fmp.RECIPE, augment=Augment()))
    assert torch.equal(fmp.scoring_images(clean, still, 5)[0], images)
    assert not torch.equal(fmp.scoring_images(clean, replace(fmp.DESCRIBED, images=32), 6)[0], images)


def test_start_noise_has_both_signs_everywhere():
    signs = fmp.start_signs(torch.zeros(64, 3, 8, 8), 1)
    assert signs.unique().tolist() == [-1, 1] and abs(signs.float().mean()) < 0.05
    assert not torch.equal(signs, fmp.start_signs(torch.zeros(64, 3, 8, 8), 2))


# Faults


def test_described_with_all_faults_is_released():
    config = fmp.DESCRIBED
    for name in fmp.FAULTS:
        assert fmp.with_fault(name) != fmp.DESCRIBED and fmp.without_fault(name) != fmp.RELEASED
        assert fmp.SETTINGS["fmp", f"described with {name}"] == fmp.with_fault(name)
        assert fmp.SETTINGS["fmp", f"released without {name}"] == fmp.without_fault(name)
        assert replace(fmp.without_fault(name), **fmp.FAULTS[name]) == fmp.RELEASED
        config = replace(config, **fmp.FAULTS[name])
    assert config == fmp.RELEASED


def test_only_the_leak_is_granted_test_images(victim, clean):
    for config in fmp.SETTINGS.values():
        assert fmp.requires(config) == ({"test-images"} if config.leak else set())
    with pytest.raises(UserError, match="leak"):
        fmp.defend(victim, clean, fmp.with_fault("leak"), 5)


def test_the_leak_changes_statistics_and_nothing_else(victim, clean, shorten):
    config = shorten(fmp.with_fault("leak"), epochs=2)
    test = 255 - clean.images[:50]
    leaking = fmp.defend(victim, replace(clean, test=test), config, 5).model.state_dict()
    without = fmp.defend(victim, clean, replace(config, leak=False), 5).model.state_dict()
    differ = {name for name, value in without.items() if not torch.equal(value, leaking[name])}
    assert differ == {name for name in without if "running" in name or "tracked" in name}
    seen = leaking["bn1.num_batches_tracked"] - without["bn1.num_batches_tracked"]
    assert seen == 2 * 2        # two batches of up to 32, twice


@pytest.mark.parametrize(("config", "granted"), [(fmp.RELEASED, True), (fmp.DESCRIBED, False)])
def test_the_bench_grants_test_images_where_they_are_asked_for(config, granted, victim, monkeypatch, tmp_path):
    seen = []

    def defend(model, clean, *rest):
        seen.append(clean)
        return Defended(fmp.deepcopy(model))

    monkeypatch.setattr(fmp, "defend", defend)
    monkeypatch.setattr(ImageBench, "_load_victim", lambda self, wanted: (victim, None))
    monkeypatch.setattr(ImageBench, "_outcome", lambda self, *rest: None)
    cell = Cell(Victim("digits", "wrn-10-1", fmp.RECIPE, 0), "fmp", config, 0.1)
    ImageBench(SimpleNamespace(root=tmp_path, device="cpu")).cell(cell)
    test = data.load("digits", tmp_path).test_images
    assert torch.equal(seen[0].test, test) if granted else seen[0].test is None


def test_a_profile_of_smoke_scale_limits_the_images():
    assert PROFILES["quick"].defense(fmp.DESCRIBED).images in range(1, 20)
    assert PROFILES["paper"].defense(fmp.DESCRIBED).images is None


@pytest.mark.parametrize("changes", [
    {"eps": 0.0}, {"alpha": 0.0}, {"p": 0}, {"images": 0}, {"batch": 0}, {"select": "highest"}])
def test_impossible_settings_are_refused(changes):
    with pytest.raises(UserError):
        replace(fmp.DESCRIBED, **changes)
