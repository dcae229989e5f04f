"""Reading intermediate activations by layer name, without forking the model."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from reproduce.errors import UserError


def features(model: nn.Module, images: Tensor, layers: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
    """Logits (N, K) and the output of each named layer, in the order of `layers`. Gradients flow through both.

    Raises UserError for a layer the model does not have.
    """
    modules = dict(model.named_modules())
    missing = [name for name in layers if name not in modules]
    if missing:
        known = ", ".join(getattr(model, "taps", modules))
        raise UserError(f"{type(model).__name__} has no layer {', '.join(missing)}: choose from {known}")
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            seen[name] = output
        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in layers]
    try:
        logits = model(images)
    finally:
        for handle in handles:
            handle.remove()
    return logits, [seen[name] for name in layers]


def penultimate(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, K) and what enters the last linear layer, (N, D). Gradients flow through both.

    In a WideResNet that is the final BN-ReLU, averaged over the image. Raises KeyError for a model without one.
    """
    seen: list[Tensor] = []
    handle = classifier(model).register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        logits = model(images)
    finally:
        handle.remove()
    return logits, seen[0]


def classifier(model: nn.Module) -> nn.Linear:
    """The last linear layer. Raises KeyError for a model without one."""
    found = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not found:
        raise KeyError(f"{type(model).__name__} has no linear layer")
    return found[-1]
