"""Linear layers whose matrix products are oneDNN's on a CPU that is not Intel's, in float32 as before.

PyTorch hands them to MKL, which on other makers' processors keeps to narrow vector instructions: one core of an AMD
EPYC reaches 97 GFLOP/s there and 215 through oneDNN, which PyTorch has for convolutions. There is no switch for that,
so the layer calls the operation by name, and leaves everything but plain float32 on a CPU to PyTorch. On an Intel
Xeon MKL is the faster of the two (178 and 163 GFLOP/s), and layers stay as they are.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reproduce.processor import cpu_name


class _Product(torch.autograd.Function):
    """x (..., I), weight (O, I), bias (O,) or None -> (..., O)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient, (x, weight) = gradients[0].contiguous(), ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        to_x, to_weight, to_bias = ctx.needs_input_grad
        return (_product(gradient, weight.t(), None) if to_x else None,
                _product(rows.t(), x.reshape(-1, x.shape[-1]).t(), None) if to_weight else None,
                rows.sum(0) if to_bias else None)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Linear(nn.Linear):
    """`nn.Linear` with the same parameters and the same results up to rounding."""

    def forward(self, input: Tensor) -> Tensor:
        plain = (input.device.type == "cpu" and input.dtype == self.weight.dtype == torch.float32
                 and not torch.is_autocast_enabled("cpu") and torch.backends.mkldnn.is_available())
        if not plain:
            return F.linear(input, self.weight, self.bias)
        # oneDNN takes rows that are no neighbours, as the first tokens of sentences are, by its slowest way.
        return _Product.apply(input.contiguous(), self.weight, self.bias)


def fast_linear(network: nn.Module) -> nn.Module:
    """The same network, its linear layers turned in place into what this CPU is fastest with; names and values of
    parameters stay."""
    return network if "Intel" in cpu_name() else through_onednn(network)


def through_onednn(network: nn.Module) -> nn.Module:
    """The same network, its linear layers turned into `Linear` in place; names and values of parameters stay."""
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
    return network
