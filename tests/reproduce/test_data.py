"""Data sets, augmentation, and what a user with a wrong file reads."""

import dataclasses
import hashlib
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms import functional as tv

from reproduce import data
from reproduce.data import tiny_imagenet
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
    with pytest.raises(UserError, match="choose one of digits, cifar10, cifar100, gtsrb, tiny-imagenet"):
        data.load("mnist", tmp_path)


def test_data_root_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKDOOR_DATA", "/from/variable")
    assert data.data_root("/argument") == Path("/argument")
    assert data.data_root() == Path("/from/variable")
    monkeypatch.delenv("BACKDOOR_DATA")
    assert data.data_root() == Path("data")


@pytest.mark.parametrize(("name", "source", "first"), [("cifar10", CIFAR10, "data_batch_1"),
                                                       ("cifar100", CIFAR100, "train")])
def test_a_missing_and_a_damaged_cifar_file_are_named(tmp_path: Path, name: str, source: type, first: str) -> None:
    folder = tmp_path / source.base_folder
    folder.mkdir()
    with pytest.raises(UserError, match=rf"{first} is missing: put .*{source.base_folder}"):
        data.load(name, tmp_path)
    (folder / first).write_bytes(b"truncated")
    with pytest.raises(UserError, match=rf"{first} is damaged.*replace it"):
        data.load(name, tmp_path)


@pytest.mark.parametrize(("name", "folder"), [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")])
def test_absent_cifar_says_where_to_put_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str,
                                           folder: str) -> None:
    def no_network(*_arguments: object, **_options: object) -> None:
        raise OSError("no route to host")
    monkeypatch.setattr("reproduce.data.cifar.CIFAR10.download", no_network)
    with pytest.raises(UserError, match=rf"could not be downloaded.*{folder}"):
        data.load(name, tmp_path)


def test_cifar100_has_fine_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file as the official ones are, one row of 3,072 bytes per image: all red, then all green, then all blue."""
    folder = tmp_path / CIFAR100.base_folder
    folder.mkdir()
    rows = np.arange(3, dtype=np.uint8).repeat(1024)[None].repeat(2, 0)
    names = {"fine_label_names": ["apple", "bear", "cat"], "coarse_label_names": ["food", "animal"]}
    for file, content in (("train", {"data": rows, "fine_labels": [2, 0], "coarse_labels": [1, 0]}),
                          ("test", {"data": rows[:1], "fine_labels": [1], "coarse_labels": [1]}), ("meta", names)):
        (folder / file).write_bytes(pickle.dumps(content))
    digest = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    monkeypatch.setattr(CIFAR100, "train_list", [["train", digest["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", digest["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": digest["meta"]})
    found = data.load("cifar100", tmp_path)
    assert found.name == "cifar100" and found.classes == ("apple", "bear", "cat")
    assert found.train_labels.tolist() == [2, 0] and found.test_labels.tolist() == [1]
    assert found.train_images.shape == (2, 3, 32, 32) and found.train_images[0, :, 5, 7].tolist() == [0, 1, 2]


@pytest.mark.parametrize(("content", "said"), [(b"PK\x03\x04cut", "damaged"), ({"train_images": 3}, "damaged"),
                                               ("grey", "expected"), (43, "no whole numbers from 0 to 42"),
                                               (1.0, "no whole numbers")])
def test_a_wrong_gtsrb_cache_is_named(tmp_path: Path, content: object, said: str) -> None:
    path = tmp_path / "gtsrb-32.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        np.savez(path, train_images=np.zeros(3))
    else:
        shape = (2, 32, 32) if content == "grey" else (2, 32, 32, 3)
        images = {f"{s}_images": np.zeros(shape, np.uint8) for s in ("train", "test")}
        labels = np.zeros(2, np.int64) if content == "grey" else np.array([0, content])
        np.savez(path, **images, train_labels=np.zeros(2, np.int64), test_labels=labels)
    with pytest.raises(UserError, match=said):
        data.load("gtsrb", tmp_path)


def test_what_is_stored_class_by_class_comes_mixed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels, images = np.repeat(np.arange(43), 20), rng.integers(0, 256, (860, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "gtsrb-32.npz", train_images=images, train_labels=labels, test_images=images,
             test_labels=labels)
    data.load.cache_clear()
    found = data.load("gtsrb", tmp_path)
    assert min(len(part.unique()) for part in found.train_labels.split(100)[:-1]) > 30
    assert torch.equal(found.test_labels, torch.from_numpy(labels))
    for label in range(43):
        stored = sorted(image.tobytes() for image in images[labels == label])
        assert sorted(image.permute(1, 2, 0).numpy().tobytes()
                      for image in found.train_images[found.train_labels == label]) == stored


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Tiny-ImageNet of two classes in its released layout, unsorted; every picture of one colour, one grey."""
    archive = dataclasses.replace(tiny_imagenet.ARCHIVE, classes=("0", "1"), counts={"train": 4, "test": 2})
    monkeypatch.setattr(tiny_imagenet, "ARCHIVE", archive)
    folder = tmp_path / "tiny-imagenet-200"
    for name, red in (("n02", 200), ("n01", 100)):
        (folder / "train" / name / "images").mkdir(parents=True)
        for i in range(2):
            paint(folder / "train" / name / "images" / f"{name}_{i}.JPEG", red + 20 * i)
    (folder / "val" / "images").mkdir(parents=True)
    paint(folder / "val" / "images" / "val_0.JPEG", 40)
    Image.new("L", (64, 64), 80).save(folder / "val" / "images" / "val_1.JPEG")
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\n")
    return folder


def paint(path: Path, red: int, side: int = 64) -> None:
    Image.new("RGB", (side, side), (red, 0, 0)).save(path, quality=95)


def check_tiny(root: Path) -> None:
    data.load.cache_clear()
    found = data.load("tiny-imagenet", root)
    assert found.train_images.shape == (4, 3, 64, 64) and found.test_images.shape == (2, 3, 64, 64)
    assert found.train_images.is_contiguous(memory_format=torch.channels_last)
    # JPEG is lossy. The training images come in a mixed order.
    train = sorted(zip(found.train_labels.tolist(), found.train_images[:, 0, 9, 9].tolist(), strict=True))
    assert [label for label, _red in train] == [0, 0, 1, 1] and found.test_labels.tolist() == [0, 1]
    assert [red for _label, red in train] == pytest.approx([100, 120, 200, 220], abs=3)
    assert found.test_images[:, 0, 9, 9].tolist() == pytest.approx([80, 40], abs=3)
    assert found.test_images[0, :, 9, 9].tolist() == pytest.approx([80] * 3, abs=3)


def test_tiny_imagenet_is_read_once(tiny: Path) -> None:
    check_tiny(tiny.parent)
    shutil.rmtree(tiny)
    check_tiny(tiny.parent)


def test_tiny_imagenet_as_backdoorbench_leaves_it(tiny: Path) -> None:
    for name, file in (("n02", "val_0.JPEG"), ("n01", "val_1.JPEG")):
        (tiny / "val" / name).mkdir()
        (tiny / "val" / "images" / file).rename(tiny / "val" / name / file)
    (tiny / "val" / "images").rmdir()
    (tiny / "val" / "val_annotations.txt").unlink()
    check_tiny(tiny.parent)


@pytest.mark.parametrize(("damage", "said"), [
    (lambda folder: shutil.rmtree(folder / "train" / "n01"), "has 1 class folders"),
    (lambda folder: (folder / "train" / "n01" / "images" / "n01_0.JPEG").unlink(), "has 3 train images, expected 4"),
    (lambda folder: (folder / "val" / "val_annotations.txt").unlink(), "has 0 test images, expected 2"),
    (lambda folder: (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\n\n"), "line 2 of"),
    (lambda folder: (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn77\n"), "one of the 2 classes"),
    (lambda folder: (folder / "val" / "images" / "val_1.JPEG").unlink(), "val_1.JPEG is missing or no readable"),
    (lambda folder: (folder / "val" / "images" / "val_1.JPEG").write_bytes(b"\xff\xd8cut"), "no readable image"),
    (lambda folder: paint(folder / "train" / "n02" / "images" / "n02_1.JPEG", 9, side=32), "is 32 x 32 pixels"),
])
def test_a_fault_of_tiny_imagenet_is_named(tiny: Path, damage: Callable[[Path], object], said: str) -> None:
    damage(tiny)
    with pytest.raises(UserError, match=said) as caught:
        data.load("tiny-imagenet", tiny.parent)
    assert "\n" not in str(caught.value)
    assert not (tiny.parent / "tiny-imagenet-64.npz").exists()


def test_a_wrong_tiny_imagenet_cache_is_named(tmp_path: Path) -> None:
    images, labels = np.zeros((2, 64, 64, 3), np.uint8), np.zeros(2, np.int64)
    np.savez(tmp_path / "tiny-imagenet-64.npz", train_images=images, train_labels=labels, test_images=images,
             test_labels=labels)
    with pytest.raises(UserError, match="holds 2 train images, expected 100000"):
        data.load("tiny-imagenet", tmp_path)


def test_absent_tiny_imagenet_says_where_to_put_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_arguments: object, **_options: object) -> None:
        raise OSError("no route to host")
    monkeypatch.setattr(tiny_imagenet, "download_and_extract_archive", no_network)
    with pytest.raises(UserError, match=r"could not be downloaded \(no route to host\): unpack tiny-imagenet-200.zip"):
        data.load("tiny-imagenet", tmp_path)


def test_a_cache_that_cannot_be_written_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object, **_arrays: object) -> None:
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match=r"tiny-imagenet-64.npz cannot be written \(No space left"):
        data.load("tiny-imagenet", tiny.parent)


def test_own_images_in_class_folders(tmp_path: Path) -> None:
    for label, value in (("cat", 10), ("dog", 200)):
        (tmp_path / label).mkdir()
        Image.new("RGB", (50, 40), (value, 0, 0)).save(tmp_path / label / "a.png")
    clean = load_folder(tmp_path, 2)
    assert clean.images.shape == (2, 3, 32, 32) and sorted(clean.labels.tolist()) == [0, 1]
    assert clean.images[clean.labels == 1][0, 0].unique().tolist() == [200]
    with pytest.raises(UserError, match="2 class folders, but the model has 10"):
        load_folder(tmp_path, 10)
    (tmp_path / "cat" / "b.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"b\.png is not a readable image"):
        load_folder(tmp_path, 2)
    with pytest.raises(UserError, match="one sub-folder"):
        load_folder(tmp_path / "nowhere", 2)


def test_class_folders_named_by_their_label_are_in_its_order(tmp_path: Path) -> None:
    for label in range(11):
        (tmp_path / str(label)).mkdir()
        Image.new("L", (32, 32), 20 * label).save(tmp_path / str(label) / "a.png")
    clean = load_folder(tmp_path, 11)
    assert (clean.images[:, 0, 0, 0] == 20 * clean.labels).all() and set(clean.labels.tolist()) == set(range(11))


def test_classes_of_folders_are_mixed_the_same_way_each_time(tmp_path: Path) -> None:
    for label in range(2):
        (tmp_path / str(label)).mkdir()
        for number in range(20):
            Image.new("L", (32, 32), 100 * label + number).save(tmp_path / str(label) / f"{number}.png")
    clean, again = load_folder(tmp_path, 2), load_folder(tmp_path, 2)
    assert torch.equal(clean.images, again.images) and torch.equal(clean.images[:, 0, 0, 0] // 100, clean.labels)
    assert 0 < clean.labels[:20].sum() < 20 and len(clean.images.flatten(1).unique(dim=0)) == 40


def test_sixteen_bits_are_scaled_and_more_refused(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        Image.fromarray(np.full((32, 32), 20000, dtype=np.uint16)).save(tmp_path / label / "deep.png")
    assert load_folder(tmp_path, 2).images.unique().tolist() == [20000 >> 8]
    Image.fromarray(np.full((32, 32), 0.5, dtype=np.float32)).save(tmp_path / "b" / "deep.tif")
    with pytest.raises(UserError, match=r"deep\.tif has values of 32 bits"):
        load_folder(tmp_path, 2)
    (tmp_path / "b" / "deep.tif").unlink()
    picture = bytearray((tmp_path / "a" / "deep.png").read_bytes())
    picture[12:16] = b"\0\1\2\3"     # the name of its first chunk
    (tmp_path / "a" / "broken.png").write_bytes(picture)
    with pytest.raises(UserError, match=r"broken\.png is not a readable image"):
        load_folder(tmp_path, 2)


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
