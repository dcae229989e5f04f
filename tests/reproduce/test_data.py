"""Data sets, augmentation, and what a user with a wrong file reads."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision.transforms import functional as tv

from reproduce import data
from reproduce.data.augment import Augment, apply, draw, take, to_input
from reproduce.data.folder import load_folder
from reproduce.errors import UserError
from reproduce.rng import generator

FULL = Augment(crop=4, flip=True, cutout=2)


@pytest.fixture
def images() -> torch.Tensor:
    made = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8, generator=generator(0, "test"))
    return made.contiguous(memory_format=torch.channels_last)


def test_augmentation_equals_the_usual_per_image_transforms(images: torch.Tensor) -> None:
    parameters = draw(len(images), 32, FULL, generator(1, "test"))
    assert len(parameters[:, 2].unique()) == 2
    fast = apply(images, parameters, FULL)
    for image, (top, left, flip, row, column), result in zip(images, parameters.tolist(), fast, strict=True):
        slow = tv.crop(tv.pad(image, 4), top, left, 32, 32)
        if flip:
            slow = tv.hflip(slow)
        # NAD's Cutout(1, 3): rows and columns from y - 3 // 2 to y + 3 // 2, the end left out (data_loader.py:97-102).
        slow[:, max(row - 1, 0):row + 1, max(column - 1, 0):column + 1] = 0
        assert torch.equal(result, slow)


def test_augmentation_off_is_the_identity(images: torch.Tensor) -> None:
    assert torch.equal(apply(images, draw(40, 32, Augment(), generator(0, "x")), Augment()), images)


def test_augmentation_draws_cover_their_range() -> None:
    parameters = draw(4000, 32, FULL, generator(0, "range"))
    assert [parameters[:, i].min().item() for i in range(5)] == [0] * 5
    assert [parameters[:, i].max().item() for i in range(5)] == [8, 8, 1, 31, 31]


def test_take_is_plain_indexing(images: torch.Tensor) -> None:
    index = torch.tensor([3, 3, 0, 39])
    assert torch.equal(take(images, index), images[index])
    assert torch.equal(take(images.contiguous(), index), images[index])


def test_inputs_are_unit_range_and_channels_last(images: torch.Tensor) -> None:
    x = to_input(images)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal((x * 255).round().to(torch.uint8), images)


def test_digits_are_embedded_and_fixed() -> None:
    digits = data.load("digits", Path("/nonexistent"))
    assert digits.train_images.shape == (1438, 3, 32, 32) and digits.test_images.shape == (359, 3, 32, 32)
    assert digits.train_images.is_contiguous(memory_format=torch.channels_last)
    digest = hashlib.sha256(digits.train_labels.numpy().tobytes()).hexdigest()
    assert digest[:16] == "35e6b6c020f4a1e3"
    pairs = {image.numpy().tobytes() for image in digits.train_images}
    assert not any(image.numpy().tobytes() in pairs for image in digits.test_images)


def test_unknown_data_set_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="choose one of digits, cifar10, gtsrb"):
        data.load("mnist", tmp_path)


def test_data_root_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKDOOR_DATA", "/from/variable")
    assert data.data_root("/argument") == Path("/argument")
    assert data.data_root() == Path("/from/variable")
    monkeypatch.delenv("BACKDOOR_DATA")
    assert data.data_root() == Path("data")


def test_a_missing_and_a_damaged_cifar_file_are_named(tmp_path: Path) -> None:
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    with pytest.raises(UserError, match="data_batch_1 is missing"):
        data.load("cifar10", tmp_path)
    (folder / "data_batch_1").write_bytes(b"truncated")
    with pytest.raises(UserError, match=r"data_batch_1 is damaged.*replace it"):
        data.load("cifar10", tmp_path)


def test_absent_cifar_says_where_to_put_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_arguments: object, **_options: object) -> None:
        raise OSError("no route to host")
    monkeypatch.setattr("reproduce.data.cifar.CIFAR10.download", no_network)
    with pytest.raises(UserError, match=r"could not be downloaded.*cifar-10-batches-py"):
        data.load("cifar10", tmp_path)


@pytest.mark.parametrize(("content", "said"), [(b"PK\x03\x04cut", "damaged"), ({"train_images": 3}, "damaged"),
                                               ("grey", "expected")])
def test_a_wrong_gtsrb_cache_is_named(tmp_path: Path, content: object, said: str) -> None:
    path = tmp_path / "gtsrb-32.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        np.savez(path, train_images=np.zeros(3))
    else:
        grey = {f"{s}_images": np.zeros((2, 32, 32), np.uint8) for s in ("train", "test")}
        np.savez(path, **grey, train_labels=np.zeros(2), test_labels=np.zeros(2))
    with pytest.raises(UserError, match=said):
        data.load("gtsrb", tmp_path)


def test_own_images_in_class_folders(tmp_path: Path) -> None:
    for label, value in (("cat", 10), ("dog", 200)):
        (tmp_path / label).mkdir()
        Image.new("RGB", (50, 40), (value, 0, 0)).save(tmp_path / label / "a.png")
    clean = load_folder(tmp_path, 2)
    assert clean.images.shape == (2, 3, 32, 32) and clean.labels.tolist() == [0, 1]
    assert clean.images[1, 0].unique().tolist() == [200]
    with pytest.raises(UserError, match="2 class folders, but the model has 10"):
        load_folder(tmp_path, 10)
    (tmp_path / "cat" / "b.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"b\.png is not a readable image"):
        load_folder(tmp_path, 2)
    with pytest.raises(UserError, match="one sub-folder"):
        load_folder(tmp_path / "nowhere", 2)


@pytest.mark.data
def test_the_real_cifar10(data_root: Path) -> None:
    cifar = data.load("cifar10", data_root)
    assert cifar.train_images.shape == (50_000, 3, 32, 32) and cifar.test_images.shape == (10_000, 3, 32, 32)
    assert cifar.train_images.is_contiguous(memory_format=torch.channels_last)
    assert cifar.test_labels[:5].tolist() == [3, 8, 8, 0, 6]


@pytest.mark.data
def test_the_real_gtsrb(data_root: Path) -> None:
    gtsrb = data.load("gtsrb", data_root)
    assert gtsrb.train_images.shape == (39_209, 3, 32, 32) and gtsrb.test_images.shape == (12_630, 3, 32, 32)
    assert gtsrb.num_classes == 43 and gtsrb.train_labels.unique().numel() == 43
