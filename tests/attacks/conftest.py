"""What attacks ask for, in small: labelled images, a quickly trained network, photographs, arrays."""

import pytest
import torch
from torch import Tensor, nn

from reproduce import models
from reproduce.data.augment import Augment
from reproduce.poisoning import Context
from reproduce.training import Recipe, train
from tests.attacks.stand_ins import ARRAYS

CLASSES = 10


@pytest.fixture(scope="session")
def labelled() -> tuple[Tensor, Tensor]:
    """400 noisy images of ten smooth classes, and their labels in random order."""
    rng = torch.Generator().manual_seed(3)
    coarse = torch.rand(CLASSES, 3, 4, 4, generator=rng) * 200 + 20
    means = nn.functional.interpolate(coarse, (32, 32), mode="bilinear")
    labels = torch.arange(400)[torch.randperm(400, generator=rng)] % CLASSES
    images = means[labels] + 25 * torch.randn(400, 3, 32, 32, generator=rng)
    return images.clamp(0, 255).to(torch.uint8).contiguous(memory_format=torch.channels_last), labels


@pytest.fixture(scope="session")
def clean_model(labelled: tuple[Tensor, Tensor]) -> nn.Module:
    """A network that has learned `labelled`."""
    model = models.build("wrn-10-1", CLASSES, 0)
    train(model, *labelled, Recipe(epochs=4, rates=((0, 0.1),), augment=Augment()), 0, phase="clean")
    return model


@pytest.fixture(scope="session")
def context(labelled: tuple[Tensor, Tensor], clean_model: nn.Module) -> Context:
    """Everything any attack may ask for. Test photographs are bright, training photographs dark."""
    rng = torch.Generator().manual_seed(4)
    dark = torch.randint(20, 120, (4, 3, 40, 50), generator=rng, dtype=torch.uint8)
    pictures = {"train": dark, "test": dark[:3] + 130}
    return Context(*labelled, CLASSES, 7, clean_model, pictures, ARRAYS.__getitem__)
