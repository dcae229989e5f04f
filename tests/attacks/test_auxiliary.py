"""Photographs and arrays from the data root."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reproduce.data.auxiliary import pictures, released_array
from reproduce.errors import UserError


def photograph(path: Path, grey: int, size: tuple[int, int] = (224, 224)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey, grey, grey)).save(path)


def test_crops_of_one_photograph_stay_together(tmp_path: Path) -> None:
    for source in range(10):
        for crop in range(3):
            photograph(tmp_path / f"aux/refool_selected/2008_{source:06d}-{crop:02d}.png", 10 * source + crop)
    found = pictures(tmp_path, allow_samples=False)
    assert found["test"].shape == (6, 3, 224, 224) and found["train"].shape == (24, 3, 224, 224)
    assert found["train"].dtype == torch.uint8
    sources = {split: {int(v) // 10 for v in found[split][:, 0, 0, 0]} for split in found}
    assert sources["test"] == {0, 5} and sources["train"] == set(range(10)) - {0, 5}


def test_own_pictures_of_any_size(tmp_path: Path) -> None:
    photograph(tmp_path / "aux/refool_selected/window.JPG", 10, (300, 500))
    photograph(tmp_path / "aux/refool_selected/shop-front.png", 200, (60, 50))
    (tmp_path / "aux/refool_selected/readme.txt").write_text("not a picture")
    found = pictures(tmp_path, allow_samples=False)
    assert {split: value.shape for split, value in found.items()} == dict.fromkeys(("train", "test"), (1, 3, 224, 224))


def test_own_split(tmp_path: Path) -> None:
    photograph(tmp_path / "aux/refool_selected/train/a.png", 10)
    photograph(tmp_path / "aux/refool_selected/train/b.png", 10)
    photograph(tmp_path / "aux/refool_selected/test/a.png", 200)
    found = pictures(tmp_path, allow_samples=False)
    assert len(found["train"]) == 2 and len(found["test"]) == 1 and found["test"].min() == 200


def test_samples_need_no_data_root(tmp_path: Path) -> None:
    photograph(tmp_path / "aux/refool_selected/a.png", 10)
    found = pictures(None, allow_samples=True)
    assert found["train"].shape == found["test"].shape == (15, 3, 224, 224)
    assert not torch.equal(found["train"], found["test"])
    assert torch.equal(found["train"], pictures(tmp_path, allow_samples=True)["train"])


@pytest.mark.parametrize("root", [None, "empty"])
def test_missing_pictures(tmp_path: Path, root: str | None) -> None:
    with pytest.raises(UserError, match=r"reflection pictures are missing.*aux/refool_selected") as error:
        pictures(tmp_path if root else None, allow_samples=False)
    assert "\n" not in str(error.value)


def test_one_photograph_is_not_enough(tmp_path: Path) -> None:
    photograph(tmp_path / "aux/refool_selected/a-1.png", 10)
    photograph(tmp_path / "aux/refool_selected/a-2.png", 10)
    with pytest.raises(UserError, match="no train photographs"):
        pictures(tmp_path, allow_samples=False)


def test_arrays(tmp_path: Path) -> None:
    folder = tmp_path / "aux/triggers"
    folder.mkdir(parents=True)
    np.savez(folder / "patch.npz", x=np.arange(3), y=np.int32(1))
    np.save(folder / "mask.npy", np.arange(4))
    assert released_array(tmp_path, "patch.npz").tolist() == [0, 1, 2]
    assert released_array(tmp_path, "mask.npy").tolist() == [0, 1, 2, 3]


def test_a_picture_is_an_array_too(tmp_path: Path) -> None:
    photograph(tmp_path / "aux/triggers/own.png", 10, (30, 20))
    found = released_array(tmp_path, "own.png")
    assert found.shape == (20, 30, 3) and found.dtype == np.uint8 and (found == 10).all()


@pytest.mark.parametrize("root", [None, "empty"])
def test_missing_array(tmp_path: Path, root: str | None) -> None:
    with pytest.raises(UserError, match=r"patch\.npz is missing.*aux/triggers/patch\.npz") as error:
        released_array(tmp_path if root else None, "patch.npz")
    assert "\n" not in str(error.value)


@pytest.mark.data
def test_the_selected_pictures(data_root: Path) -> None:
    found = pictures(data_root, allow_samples=False)
    assert (len(found["train"]), len(found["test"])) == (137, 63)
