"""A small classification task and a victim trained on it, shared by the tests of the defenses."""

from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from reproduce.data.augment import Augment
from reproduce.defending import Clean
from reproduce.models import build
from reproduce.training import Recipe, predict, train
from tests.defenses.shortened import shortened


@pytest.fixture(scope="session")
def digits() -> Clean:
    """300 of scikit-learn's handwritten digits as RGB images of 16 x 16, for speed."""
    images, labels = load_digits(return_X_y=True)
    grey = torch.from_numpy(images[:300] * 15.9).to(torch.uint8).view(-1, 1, 8, 8)
    grown = grey.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return Clean(grown.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(labels[:300]), 10)


@pytest.fixture(scope="session")
def clean(digits: Clean) -> Clean:
    """The defender's share: the last 100 digits."""
    return Clean(digits.images[200:], digits.labels[200:], 10)


@pytest.fixture(scope="session")
def victim(digits: Clean) -> nn.Module:
    """WRN-10-1 after a short training; left in train mode, to see whether a defense changes that."""
    model = build("wrn-10-1", 10, seed=0)
    recipe = Recipe(epochs=3, rates=((0, 0.05),), augment=Augment())
    train(model, digits.images, digits.labels, recipe, seed=0, phase="victim")
    return model.train()


def corner(images: torch.Tensor) -> torch.Tensor:
    """A copy with a white 3 x 3 square in the lower right corner, where digits are black."""
    stamped = images.clone()
    stamped[:, :, -3:, -3:] = 255
    return stamped


@pytest.fixture(scope="session")
def backdoored(digits: Clean) -> tuple[nn.Module, Clean, int]:
    """A model to which `corner` means 7, the defender's digits, and 7."""
    images, labels = digits.images[:200], digits.labels[:200]
    poisoned = Clean(torch.cat([images, corner(images[:60])]), torch.cat([labels, torch.full((60,), 7)]), 10)
    model = build("wrn-10-1", 10, seed=0)
    train(model, poisoned.images, poisoned.labels, Recipe(epochs=12, rates=((0, 0.05),)), seed=0, phase="victim")
    return model, Clean(digits.images[200:], digits.labels[200:], 10), 7


@pytest.fixture(scope="session")
def backdoor_success(backdoored: tuple[nn.Module, Clean, int]) -> Any:
    """Function giving the share of the defender's other digits that `corner` turns into 7."""
    _, clean, target = backdoored
    stamped = corner(clean.images[clean.labels != target])
    return lambda model: (predict(model, stamped) == target).float().mean().item()


@pytest.fixture(scope="session")
def shorten() -> Any:
    return shortened


@pytest.fixture(scope="session")
def same() -> Any:
    """Function telling whether two models agree in every weight and statistic, bit for bit."""
    def equal(a: nn.Module, b: nn.Module) -> bool:
        first, second = a.state_dict(), b.state_dict()
        return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    return equal
