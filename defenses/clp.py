"""CLP: Channel Lipschitzness based Pruning (Zheng, Tang, Li & Liu, ECCV 2022, arXiv:2208.03111).

A channel that a trigger switches on must react strongly to small changes of its input. How strongly is bounded by the
weights alone, so the defense needs no data: in every layer it prunes the channels whose bound stands out.

    s_k = sigma_max(W_k) * |g_k / sqrt(v_k)|        W_k: filter k of a convolution as a matrix (C_in, kh * kw)
                                                    g, v: scale and running variance of the BatchNorm after it
    prune k where  s_k > mean(s) + u std(s)         mean and std (of C - 1 degrees) over the channels of the layer

sigma_max is the largest singular value. A pruned channel loses scale and shift, so that it is 0 on any input.

Constants: rkteddy/channel-Lipschitzness-based-pruning@5209c83; where it says bench, BackdoorBench v1 as FMP's authors
forked it, huangd1999/BackdoorBench@6135839 (defense/clp/clp.py, config/defense/clp/cifar10.yaml). The bench leaves the
shift of a pruned channel (clp.py:99-102), which then is a constant. Nothing is chosen on any data. That fork prunes at
u = 3 and then returns the last of the copies that it swept for a plot, u = 10 (clp.py:206-219), at which next to no
channel is pruned (of 64 values none is further than 7.9 deviations from their mean); FMP's and FMT's own trees return
the one at u = 3, as ours.

Which convolution belongs to a BatchNorm. The official code takes the one registered last before it, and its README
asks to adapt that to other architectures; BackdoorBench uses it on a pre-activation ResNet as it is. So do we. Where a
BatchNorm follows its convolution (ResNet-18) this is the pair in the formula. In pre-activation nets (WideResNet,
PreAct-ResNet-18) it is so within a block, but the BatchNorm at the start of a block normalises the residual sum, and is
paired with the block before: with its second convolution or, where that block changes the width, with its 1x1 shortcut.
Pruning there removes the channel of the sum from the next residual branch.

Departures. None in the numbers; singular values of all filters of a layer are computed at once. As in the official
code there is no epsilon beside the variance: a layer with a channel of variance 0 has no finite mean and loses nothing.
The paper's text was not readable to us.
"""

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reproduce.defending import Clean, Defended
from reproduce.errors import UserError
from reproduce.training import Observer, silent


@dataclass(frozen=True)
class Config:
    """keep_shift: a pruned channel is the BatchNorm's shift instead of 0."""

    u: float = 3.0              # test.py:73; bench u
    keep_shift: bool = False    # defense.py:28-29

    def __post_init__(self) -> None:
        if self.u < 0:
            raise UserError(f"CLP's u counts standard deviations above the mean and is not negative, like {self.u}")


SETTINGS = {
    ("clp", "released"): Config(),
    ("fmp", "described"): Config(keep_shift=True),      # bench clp.py:99-102
}


def requires(config: Config) -> frozenset[str]:
    """Nothing at all."""
    return frozenset()


def defend(model: nn.Module, clean: Clean, config: Config, seed: int, observe: Observer = silent,
           clean_model: nn.Module | None = None) -> Defended:
    """A copy of `model` without the channels that stand out. Neither `clean` nor `seed` plays a part.

    info: how many channels went out of how many, and which of each BatchNorm.
    """
    repaired = deepcopy(model).eval()
    found = {name: outliers(channel_bounds(conv, norm), config.u) for name, conv, norm in pairs(repaired)}
    with torch.no_grad():
        for name, channels in found.items():
            norm = repaired.get_submodule(name)
            norm.weight.masked_fill_(channels, 0.0)
            if not config.keep_shift:
                norm.bias.masked_fill_(channels, 0.0)
    return Defended(repaired, {
        "pruned": sum(int(channels.sum()) for channels in found.values()),
        "channels": sum(len(channels) for channels in found.values()),
        "layers": {name: channels.nonzero().flatten().tolist() for name, channels in found.items() if channels.any()}})


def pairs(model: nn.Module) -> list[tuple[str, nn.Conv2d, nn.BatchNorm2d]]:
    """Name of each BatchNorm, the convolution registered last before it, and the BatchNorm."""
    found, conv = [], None
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            conv = module
        elif isinstance(module, nn.BatchNorm2d):
            if conv is None or conv.out_channels != module.num_features:
                raise UserError(f"CLP finds no convolution of {module.num_features} channels before the BatchNorm "
                                f"{name} of this {type(model).__name__}: use another defense")
            found.append((name, conv, module))
    if not found:
        raise UserError(f"CLP prunes BatchNorm channels and this {type(model).__name__} has none: use another defense")
    return found


@torch.no_grad()
def channel_bounds(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """s, (C,): the bound on the Lipschitz constant of each channel from the layer's input to the BatchNorm's output."""
    filters = conv.weight.flatten(2)        # (C, C_in, kh * kw)
    return torch.linalg.svdvals(filters)[:, 0] * (norm.weight / norm.running_var.sqrt()).abs()


def outliers(bounds: Tensor, u: float) -> Tensor:
    """bool (C,): which of `bounds`, (C,), are more than u standard deviations above their mean."""
    return bounds > bounds.mean() + u * bounds.std()
