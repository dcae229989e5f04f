"""One victim's test sets, and what is recorded of a model on them: predictions, and a few images for the figures."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from reproduce.data.augment import to_input
from reproduce.metrics import Predictions
from reproduce.models.taps import features, penultimate
from reproduce.training import predict

SAMPLES = 8
FEATURES = 100
MAP_IMAGES = 200
LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class TestSet:
    """Clean test images uint8 (N, 3, H, W) with labels (N,); the triggered copies (M, 3, H, W) of those at `index`
    (M,), and the labels the attacker wants for them (M,). Without an attack the last three are empty."""

    images: Tensor
    labels: Tensor
    index: Tensor
    triggered: Tensor
    wanted: Tensor


def evaluate(model: nn.Module, test: TestSet, precision: str = "fp32") -> Predictions:
    """Predictions of `model` (in eval mode) on both test sets."""
    on_triggered = predict(model, test.triggered, precision=precision) if len(test.index) else test.wanted
    arrays = (test.labels, predict(model, test.images, precision=precision), test.index, test.wanted, on_triggered)
    return Predictions(*(array.cpu().numpy().astype(np.int32) for array in arrays))


@torch.inference_mode()
def samples(model: nn.Module, test: TestSet, layers: tuple[str, ...]) -> dict[str, np.ndarray]:
    """What figures show of a model, float16 where not images.

    images, triggered: a few test images and their triggered copies, uint8 (n, 3, H, W);
    attention_<clean|triggered>_<layer>: the model's attention maps sum_c |F|^2 on them, (n, h, w);
    features_<clean|triggered>: the classifier's input on more images of each kind, (m, D), the clean ones of all
    classes with feature_labels (m,).
    """
    count = min(SAMPLES, len(test.index) or len(test.images))
    chosen = test.index[:count] if len(test.index) else torch.arange(count)
    sets = {"clean": test.images[chosen], "triggered": test.triggered[:count]}
    arrays = {"images": sets["clean"].cpu().numpy(), "triggered": sets["triggered"].cpu().numpy()}
    device = next(model.parameters()).device
    for kind, images in sets.items():
        if len(images):
            _logits, maps = features(model, to_input(images.to(device)), layers)
            for layer, values in zip(layers, maps, strict=True):
                arrays[f"attention_{kind}_{layer}"] = values.square().sum(1).clamp(max=LARGEST).cpu().numpy().astype(
                    np.float16)
    arrays["feature_labels"] = test.labels[:FEATURES].cpu().numpy().astype(np.int32)
    for kind, images in (("clean", test.images[:FEATURES]), ("triggered", test.triggered[:FEATURES])):
        if len(images):
            arrays[f"features_{kind}"] = penultimate(model, to_input(images.to(device)))[1].cpu().numpy().astype(
                np.float16)
    return arrays


@torch.inference_mode()
def map_changes(model: nn.Module, test: TestSet) -> dict[str, np.ndarray]:
    """How much the trigger moves each feature map of the convolutions: what a defense that prunes maps should find.

    map_change: (M,), mean |F(triggered) - F(clean)| over images and pixels, in standard deviations of F on the clean
    ones; map_layer: (M,), the number of its convolution; map_layers: their names, in the order of registration.
    """
    index = test.index[:MAP_IMAGES]
    if not len(index):
        return {}
    device = next(model.parameters()).device
    changes: dict[int, Tensor] = {}

    def compare(place: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hear(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            clean, triggered = output.split(len(index))
            spread = clean.transpose(0, 1).flatten(1).std(1)
            changes[place] = (triggered - clean).abs().mean((0, 2, 3)) / spread.clamp_min(1e-12)
        return hear

    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    handles = [module.register_forward_hook(compare(place)) for place, module in enumerate(convolutions.values())]
    try:
        model(to_input(torch.cat([test.images[index], test.triggered[:MAP_IMAGES]]).to(device)))
    finally:
        for handle in handles:
            handle.remove()
    places = sorted(changes)
    return {"map_change": torch.cat([changes[place] for place in places]).cpu().numpy().astype(np.float32),
            "map_layer": np.concatenate([np.full(len(changes[place]), place, np.int32) for place in places]),
            "map_layers": np.array(list(convolutions))}
