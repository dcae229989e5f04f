"""Loading somebody's checkpoint safely and strictly: .pth.tar, .pth, .tar, .pt or .safetensors."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from reproduce.errors import UserError
from reproduce.models import build

# Keys under which public training scripts store the weights beside other things.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
# What may lie beside the weights and is data, not code: numbers and arrays of numpy (a stored accuracy, the poisoned
# indices in BackdoorBench's attack_result.pt), as numpy 1 and numpy 2 name them, and pictures (its poisoned images).
_NUMPY = [np._core.multiarray.scalar, np._core.multiarray._reconstruct]
_KINDS = (np.bool_, np.uint8, np.int32, np.int64, np.float32, np.float64)
_DATA = [*_NUMPY, *((function, f"numpy.core.multiarray.{function.__name__}") for function in _NUMPY),
         np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in _KINDS), Image.Image]


def load_checkpoint(path: Path, model: str, num_classes: int, dataset: str | None = None) -> nn.Module:
    """The architecture `model` with the weights of `path`, in eval mode. Raises UserError saying what does not fit.

    Files are read with `weights_only=True`: one that would execute code is refused.
    """
    network = build(model, num_classes, 0, dataset)
    found = _weights(path)
    weights = {_our_name(name, network): value for name, value in found.items()}
    if len(weights) < len(found):
        raise UserError(f"{path} has weights twice, with and without the prefix module.: save one state_dict")
    expected = network.state_dict()
    # Checkpoints from before torch 0.4.1 lack this counter; nothing depends on it.
    for name in expected:
        if name.endswith("num_batches_tracked"):
            weights.setdefault(name, expected[name])
    if odd := {name for name, value in weights.items() if value.layout != torch.strided or value.is_quantized
               or value.is_meta}:
        raise UserError(f"{path} has weights that are no plain tensors, {_some(odd)}: save them dense, as floating "
                        "point numbers")
    missing, surplus = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    if missing or surplus:
        raise UserError(f"{path} is not a {model}: it lacks {_some(missing)} and has {_some(surplus)} too many; "
                        "choose the right --model")
    wrong = [name for name in expected if expected[name].shape != weights[name].shape]
    if wrong:
        name = wrong[0]
        raise UserError(f"{path} is not a {model} with {num_classes} classes: {name} is {tuple(weights[name].shape)}, "
                        f"expected {tuple(expected[name].shape)}; choose the right --model or --dataset")
    check_finite(weights, path)
    network.load_state_dict(weights)
    return network.eval()


def check_finite(weights: dict[str, Tensor], place: str | Path) -> None:
    """UserError where a weight is no finite real number."""
    odd = {name for name, value in weights.items() if value.is_complex() or not torch.isfinite(value).all()}
    if odd:
        raise UserError(f"{place} has weights that are no finite numbers, {_some(odd)}: it was damaged, or its "
                        "training diverged")


def _our_name(name: str, network: nn.Module) -> str:
    """A parameter's name here, for its name in somebody's checkpoint."""
    name = name.removeprefix("module.")
    for theirs, ours in getattr(network, "aliases", ()):
        name = name.replace(theirs, ours)
    return name


def _weights(path: Path) -> dict[str, Tensor]:
    start = b""
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such checkpoint")
        with path.open("rb") as file:
            start = file.read(2)
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_DATA):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:      # a damaged pickle may raise anything
        # A pickle, or a ZIP archive that holds one.
        if isinstance(error, pickle.UnpicklingError) and (start == b"PK" or start[:1] == b"\x80"):
            raise UserError(f"{path} is refused: it holds more than weights and could execute code when loaded, or is "
                            "damaged; save its state_dict alone (torch.save(model.state_dict(), ...)) or as "
                            ".safetensors") from error
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise UserError(f"{str(path)[:200]} is not a readable checkpoint ({reason})") from error
    for key in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(isinstance(name, str) and isinstance(value, Tensor)
                                                for name, value in content.items()):
        raise UserError(f"{path} holds no state_dict: expected names and tensors, or one of {', '.join(WRAPPERS)}")
    return content


def _some(names: set[str]) -> str:
    listed = sorted(names)
    return f"{', '.join(listed[:3])}{' ...' if len(listed) > 3 else ''}" if listed else "nothing"
