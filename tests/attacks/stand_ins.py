"""Random images and stand-ins for the released arrays, shared by the attacks' tests."""

import numpy as np
import torch
from torch import Tensor


def random_images(count: int = 64, seed: int = 0) -> Tensor:
    """uint8 (count, 3, 32, 32), channels-last in memory as real images arrive."""
    pixels = np.random.RandomState(seed).randint(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def stand_in_array() -> np.ndarray:
    """What NAD's released Trojan array looks like: float32 (3, 32, 32), zero outside a 3x3 square."""
    array = np.zeros((3, 32, 32), np.float32)
    array[:, 25:28, 25:28] = np.random.RandomState(1).uniform(0, 250, (3, 3, 3))
    return array


def stand_in_pattern() -> np.ndarray:
    """As BackdoorBench's low-frequency arrays but for the smoothness: uint8 (32, 32, 3), 0 to 51."""
    return (np.arange(32 * 32 * 3).reshape(32, 32, 3) * 7 % 52).astype(np.uint8)


# By the names of the settings; the last one is a picture of another size than the images.
ARRAYS = {"best_square_trigger_cifar10.npz": stand_in_array(), "lowfrequency_cifar10.npy": stand_in_pattern(),
          "hello_kitty.jpeg": np.random.RandomState(2).randint(0, 256, (40, 33, 3), dtype=np.uint8)}
