"""Random images and a stand-in for the released array, shared by the attacks' tests."""

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
