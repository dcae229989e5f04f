"""The usual way, written plainly: what the benchmark compares with.

PIL pictures through torchvision transforms in a DataLoader without workers, triggers stamped image by image in numpy,
an NCHW model, and `.item()` on the accuracy of every batch. Nothing here is slowed down on purpose.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from reproduce.models.taps import features

Trigger = Callable[[np.ndarray], np.ndarray]    # uint8 (H, W, 3) -> uint8 (H, W, 3)
Sample = tuple[np.ndarray, int]                 # uint8 (H, W, 3), label


def grid_trigger() -> Trigger:
    """NAD's 3x3 pattern in the bottom-right corner."""
    def stamp(image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        for row, levels in enumerate(((0, 0, 255), (0, 255, 0), (255, 0, 255))):
            for column, level in enumerate(levels):
                image[height - 3 + row, width - 3 + column] = level
        return image
    return stamp


def signal_trigger() -> Trigger:
    """NAD's wrapped sinusoid, blended at 0.2."""
    def stamp(image: np.ndarray) -> np.ndarray:
        mask = np.array([int(20 * math.sin(0.8 * j)) % 256 for j in range(image.shape[1])])
        return ((1 - 0.2) * image + 0.2 * mask[None, :, None]).astype(np.uint8)
    return stamp


def noise_trigger(rng: np.random.RandomState) -> Trigger:
    """Fresh grey noise for every image, blended at 0.2."""
    def stamp(image: np.ndarray) -> np.ndarray:
        noise = rng.randint(0, 256, size=image.shape[:2], dtype=np.uint8)
        return ((1 - 0.2) * image + 0.2 * noise[:, :, None]).astype(np.uint8)
    return stamp


def patch_trigger(patch: np.ndarray) -> Trigger:
    """A picture added modulo 256, as NAD's Trojan. patch: uint8 (H, W, 3)."""
    def stamp(image: np.ndarray) -> np.ndarray:
        return np.clip((image + patch).astype(np.uint8), 0, 255)
    return stamp


def poison(samples: Iterable[Sample], chosen: set[int], trigger: Trigger, target: int) -> list[Sample]:
    """The training set image by image; `chosen` holds the poisoned positions."""
    poisoned = []
    for i, (image, label) in enumerate(samples):
        image = np.array(image)
        poisoned.append((trigger(image), target) if i in chosen else (image, label))
    return poisoned


def poison_test(samples: Iterable[Sample], trigger: Trigger | None, target: int) -> list[Sample]:
    """The test images whose label is not the target, with the trigger if there is one."""
    kept = []
    for image, label in samples:
        if label != target:
            image = np.array(image)
            kept.append((trigger(image), target) if trigger else (image, label))
    return kept


def cutout(image: Tensor, row: int, column: int) -> Tensor:
    """The papers' Cutout(1, 3), which blanks 2 x 2 pixels. image: float (C, H, W)."""
    height, width = image.shape[1:]
    mask = np.ones((height, width), np.float32)
    rows, columns = (np.clip([c - 1, c + 1], 0, limit) for c, limit in ((row, height), (column, width)))
    mask[rows[0]:rows[1], columns[0]:columns[1]] = 0.0
    return image * torch.from_numpy(mask).expand_as(image)


class Cutout:
    def __call__(self, image: Tensor) -> Tensor:
        return cutout(image, np.random.randint(image.shape[1]), np.random.randint(image.shape[2]))


class Pictures(Dataset):
    """Samples as PIL pictures through a transform."""

    def __init__(self, samples: list[Sample], transform: Callable) -> None:
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image, label = self.samples[i]
        return self.transform(Image.fromarray(image)), label


def augmenting_loader(samples: list[Sample], batch: int, cutout: bool = True) -> DataLoader:
    """NAD's transforms for its clean subset; without Cutout, BackdoorBench's for its training set."""
    transform = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(),
                                    transforms.ToTensor(), *([Cutout()] if cutout else [])])
    return DataLoader(Pictures(samples, transform), batch_size=batch, shuffle=True, num_workers=0)


def plain_loader(samples: list[Sample], batch: int) -> DataLoader:
    return DataLoader(Pictures(samples, transforms.ToTensor()), batch_size=batch, shuffle=False, num_workers=0)


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, nesterov=True)


def train_epoch(model: nn.Module, loader: DataLoader, optimiser: torch.optim.Optimizer,
                loss: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]) -> float:
    """One epoch; returns the training accuracy in percent."""
    model.train()
    device = next(model.parameters()).device
    correct = total = 0.0
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        logits, value = loss(model, images, labels)
        correct += (logits.argmax(1) == labels).sum().item()
        total += len(labels)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
    return 100 * correct / total


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = model(images)
    return logits, F.cross_entropy(logits, labels)


def distillation(teacher: nn.Module) -> Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """NAD's loss with the released betas."""
    layers = ("block1", "block2", "block3")

    def attention(maps: Tensor) -> Tensor:
        summed = maps.abs().pow(2).sum(1, keepdim=True)
        return summed / (summed.norm(dim=(2, 3), keepdim=True) + 1e-6)

    def loss(student: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits, ours = features(student, images, layers)
        with torch.no_grad():
            _, theirs = features(teacher, images, layers)
        value = F.cross_entropy(logits, labels)
        for beta, mine, target in zip((500, 1000, 1000), ours, theirs, strict=True):
            value = value + beta * F.mse_loss(attention(mine), attention(target))
        return logits, value
    return loss


def map_scores(model: nn.Module, images: Tensor, start: Tensor, labels: Tensor, layer: str, eps: float) -> list[float]:
    """FMP's score (percent) of each map of `layer`, map by map: three forward passes and a gradient for each.

    images: float (n, 3, H, W); start: the same with the start noise.
    """
    scores = []
    for k in range(model.get_submodule(layer).out_channels):
        moved = start.clone().requires_grad_()
        _, (clean_maps,) = features(model, images, (layer,))
        _, (moved_maps,) = features(model, moved, (layer,))
        gradient, = torch.autograd.grad(F.mse_loss(clean_maps[:, k], moved_maps[:, k]), moved)
        with torch.no_grad():
            logits = model((start + eps * gradient.sign()).clamp(0, 1))
        scores.append(100 * (logits.argmax(1) == labels).float().mean().item())
    return scores


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader) -> float:
    """Percent."""
    model.eval()
    correct = total = 0.0
    for images, labels in loader:
        correct += (model(images).argmax(1) == labels).sum().item()
        total += len(labels)
    return 100 * correct / total
