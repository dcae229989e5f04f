"""CLP: its bounds and what it prunes against the official code, and its pairing of layers."""

import pytest
import torch
from torch import nn

from defenses import clp
from reproduce.data.augment import to_input
from reproduce.errors import UserError
from reproduce.models import build
from tests.defenses.tiny import wave

# CLP of rkteddy/channel-Lipschitzness-based-pruning@5209c83 (defense.py:12-36), torch 2.15 on a CPU, on `waves()`:
# the channels of each BatchNorm whose scale and shift are 0 afterwards.
OFFICIAL = {
    3.0: {"block1.layer.0.bn1": [3], "block1.layer.0.bn2": [3], "block2.layer.0.bn1": [3], "block2.layer.0.bn2": [24],
          "block3.layer.0.bn1": [17, 24], "block3.layer.0.bn2": [17, 24, 38, 45], "bn1": [24, 45, 59]},
    1.0: {"block1.layer.0.bn1": [3], "block1.layer.0.bn2": [3], "block2.layer.0.bn1": [3],
          "block2.layer.0.bn2": [3, 17, 24], "block3.layer.0.bn1": [17, 24, 31],
          "block3.layer.0.bn2": [17, 24, 38, 45, 59], "bn1": [17, 24, 38, 45, 59]},
}
# `channel_lips` (defense.py:24) of block1.layer.0.bn2 there.
OFFICIAL_BOUNDS = (0.0, 5.32638, 6.02895, 47.34842, 0.32113, 3.6313, 6.47142, 6.16685, 1.05093, 4.50099, 18.25675,
                   4.42667, 0.9575, 3.03161, 6.25081, 6.94809)


def waves() -> nn.Module:
    """WRN-10-1 with every value from a formula, the filters of every seventh channel of a layer up to 12 times as
    large as the others."""
    model = build("wrn-10-1", 10, seed=0).eval()
    with torch.no_grad():
        for index, (name, value) in enumerate(model.state_dict().items()):
            if name.endswith("running_var"):
                value.copy_(wave(value.shape, 0.3 + 0.01 * index).square() + 0.5)
            elif value.is_floating_point():
                value.copy_(wave(value.shape, 0.7 + 0.01 * index))
            if value.dim() == 4:
                value[3::7] *= 12
                value[10::21] /= 4
    return model


@pytest.mark.parametrize("u", OFFICIAL)
def test_prunes_what_the_official_code_prunes(u):
    before = waves().state_dict()
    result = clp.defend(waves(), None, clp.Config(u=u), 0)
    assert result.info["layers"] == OFFICIAL[u]
    assert (result.info["pruned"], result.info["channels"]) == (sum(map(len, OFFICIAL[u].values())), 240)
    for name, value in result.model.state_dict().items():
        layer, _, kind = name.rpartition(".")
        if layer in OFFICIAL[u] and kind in ("weight", "bias"):
            before[name][OFFICIAL[u][layer]] = 0
        assert torch.equal(value, before[name])


def test_bounds_are_the_official_ones():
    bounds = {name: clp.channel_bounds(conv, norm) for name, conv, norm in clp.pairs(waves())}
    torch.testing.assert_close(bounds["block1.layer.0.bn2"], torch.tensor(OFFICIAL_BOUNDS), atol=1e-4, rtol=1e-5)


def test_a_bound_holds_for_the_flattened_filter():
    """No patch moves a channel by more than its bound times the length of the move, and one comes as near as it can."""
    conv, norm = nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3).eval()
    with torch.no_grad():
        conv.weight.copy_(wave((3, 2, 1, 1), 0.9))
        norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5]))
        norm.running_var.copy_(torch.tensor([4.0, 1.0, 0.25]))
        bounds = clp.channel_bounds(conv, norm)
        step = conv.weight[1] / conv.weight[1].norm()
        moved = norm(conv(step[None])) - norm(conv(0 * step[None]))
    lengths = conv.weight.detach().flatten(1).norm(dim=1)
    torch.testing.assert_close(bounds, lengths * torch.tensor([0.5, 2.0, 1.0]))
    assert moved[0, 1].abs().item() == pytest.approx(bounds[1].item(), rel=1e-4)


def test_the_deviation_is_that_of_a_sample():
    """One of ten stands out by 2.85 deviations of a sample; it would by 3 of a population."""
    bounds = torch.tensor([0.0] * 9 + [1.0])
    assert clp.outliers(bounds, 2.8).tolist() == [False] * 9 + [True] and not clp.outliers(bounds, 2.9).any()


@pytest.mark.parametrize("keep_shift", [False, True])
def test_pruned_channels_are_constant(keep_shift):
    result = clp.defend(waves(), None, clp.Config(keep_shift=keep_shift), 0)
    seen = []
    result.model.bn1.register_forward_hook(lambda _module, _inputs, output: seen.append(output.clone()))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        result.model(to_input(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator)))
    pruned = OFFICIAL[3.0]["bn1"]
    constant = waves().bn1.bias[pruned] if keep_shift else torch.zeros(len(pruned))
    assert (constant != 0).any() == keep_shift
    torch.testing.assert_close(seen[0][:, pruned], constant.view(1, -1, 1, 1).expand(4, -1, 8, 8))


def test_bench_keeps_the_shift_and_the_official_code_does_not():
    assert clp.SETTINGS["fmp", "described"] == clp.Config(3.0, keep_shift=True)
    assert clp.SETTINGS["clp", "released"] == clp.Config(3.0, keep_shift=False)


def test_pairs_the_convolution_registered_last():
    wide, residual = build("wrn-10-1", 10, seed=0), build("resnet-18", 10, seed=0)
    names = {module: name for name, module in [*wide.named_modules(), *residual.named_modules()]}
    ours = {name: names[conv] for name, conv, _ in clp.pairs(wide)}
    assert ours["block1.layer.0.bn1"] == "conv1" and ours["block1.layer.0.bn2"] == "block1.layer.0.conv1"
    assert ours["block2.layer.0.bn1"] == "block1.layer.0.conv2"
    assert ours["block3.layer.0.bn1"] == "block2.layer.0.convShortcut" and ours["bn1"] == "block3.layer.0.convShortcut"
    # In a ResNet it is the convolution of the same number, in a shortcut the module before.
    assert all(names[conv] == (name[:-1] + "0" if "shortcut" in name else name.replace("bn", "conv"))
               for name, conv, _ in clp.pairs(residual))


def test_a_layer_without_variance_loses_nothing():
    model = waves()
    model.block1.layer[0].bn1.running_var[5] = 0
    assert clp.defend(model, None, clp.Config(), 0).info["layers"] == {
        name: channels for name, channels in OFFICIAL[3.0].items() if name != "block1.layer.0.bn1"}


@pytest.mark.parametrize("model", [
    nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)),
    nn.Sequential(nn.Conv2d(3, 4, 1), nn.PixelShuffle(2), nn.BatchNorm2d(1))])
def test_a_model_it_cannot_read_is_refused(model):
    with pytest.raises(UserError, match="CLP"):
        clp.defend(model, None, clp.Config(), 0)


def test_a_negative_u_is_refused():
    with pytest.raises(UserError):
        clp.Config(u=-1.0)
