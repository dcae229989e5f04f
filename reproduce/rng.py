"""Random numbers by name: every draw is a pure function of (seed, purpose).

A run at seed s asks for ``generator(s, "clean-subset")``, ``generator(s, "order", "student", 3)`` and so on.
Streams with different names are independent, so adding a draw in one place changes no other, two defenses at
one seed see the same clean subset, and an interrupted training continues at epoch e without any saved RNG state.
"""

import hashlib

import numpy as np
import torch


def derive(seed: int, *purpose: object) -> int:
    """A 63-bit integer fixed by (seed, purpose), the same on every platform."""
    text = "\x1f".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *purpose: object) -> torch.Generator:
    """CPU generator for one purpose; draws happen on the CPU so that a GPU run sees the same numbers."""
    return torch.Generator().manual_seed(derive(seed, *purpose))


def numpy_generator(seed: int, *purpose: object) -> np.random.Generator:
    """The same for numpy."""
    return np.random.default_rng(derive(seed, *purpose))
