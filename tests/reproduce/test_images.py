"""The image bench on what is larger than 32x32 and normalised by its network."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from attacks import badnets
from defenses import ft
from reproduce import data, images, models
from reproduce.cells import Cell, Published, Victim
from reproduce.data import Dataset
from reproduce.data.augment import Augment, to_input
from reproduce.errors import UserError
from reproduce.models.taps import penultimate
from reproduce.rng import generator
from reproduce.runner import Runner
from reproduce.store import Run, Store
from reproduce.training import Recipe, predict, train

MODEL = "preact-resnet-18-w16"
RECIPE = Recipe(epochs=1, rates=((0, 0.01),), batch=16, augment=Augment(crop=4, flip=True))


@pytest.fixture
def photographs() -> Dataset:
    """40 training and 20 test images of noise, 64x64, under the name of a data set with a normalisation."""
    rng = generator(0, "photographs")
    train, test = (torch.randint(256, (count, 3, 64, 64), generator=rng, dtype=torch.uint8).contiguous(
        memory_format=torch.channels_last) for count in (40, 20))
    return Dataset("tiny-imagenet", train, torch.arange(40) % 10, test, torch.arange(20) % 10, tuple("0123456789"))


def test_every_model_of_the_bench_normalises_as_its_data_set_has_it(
        photographs: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stored of a trained, of a loaded and of a defended victim is what the normalising network sees."""
    monkeypatch.setattr(data, "load", lambda name, root: photographs)
    victim = Victim("tiny-imagenet", MODEL, RECIPE, 0, "badnets", badnets.Config(rate=0.2))
    runner = Runner(Store(tmp_path), tmp_path, torch.device("cpu"))

    def check(run: Run) -> None:
        model = models.build(MODEL, 10, 0, "tiny-imagenet")
        model.load_state_dict(run.tensors("model"))
        with torch.no_grad():
            expected = penultimate(model.eval(), to_input(photographs.test_images))[1]
        found = run.arrays("samples")
        np.testing.assert_allclose(found["features_clean"], expected.numpy(), atol=2e-3, rtol=2e-3)
        assert found["triggered"].shape[1:] == (3, 64, 64)

    check(runner.run(victim))
    check(Runner(Store(tmp_path), tmp_path, torch.device("cpu")).run(Cell(victim, "ft", ft.Config(RECIPE), 0.5)))


@pytest.mark.parametrize("normalised", [None, "cifar10"])
def test_a_published_checkpoint_sees_images_as_its_authors_show_them(tmp_path: Path, normalised: str | None) -> None:
    """Measured, loaded and repaired with its normalisation, and without where it has none."""
    model = models.build("wrn-10-0.5", 10, seed=4)
    (tmp_path / "theirs").mkdir()
    torch.save(model.state_dict(), tmp_path / "theirs/net.pth")
    digest = hashlib.sha256((tmp_path / "theirs/net.pth").read_bytes()).hexdigest()
    published = Published("theirs/net.pth", digest, "net.pth of the authors", normalised)
    victim = Victim("digits", "wrn-10-0.5", None, 0, "badnets", badnets.Config(), published)
    plain = Victim("digits", "wrn-10-0.5", None, 0, "badnets", badnets.Config(), replace(published, normalised=None))
    assert (victim.name == plain.name) == (normalised is None), "another network as far as results go"
    expected = models.build("wrn-10-0.5", 10, seed=4).eval()
    if normalised:
        models.normalise_inputs(expected, normalised)
    test = data.load("digits", tmp_path).test_images

    runner = Runner(Store(tmp_path / "results"), tmp_path, torch.device("cpu"))
    np.testing.assert_array_equal(runner.run(victim).predictions().clean, predict(expected, test))
    idle = Recipe(epochs=1, rates=((0, 0.0),), batch=64, weight_decay=0.0, augment=Augment())
    # Nothing is learnt at rate 0 but BatchNorm's statistics, which are those of the images as they are shown.
    repaired = runner.run(Cell(victim, "ft", ft.Config(idle), 1.0)).tensors("model")
    train(expected, data.load("digits", tmp_path).train_images, data.load("digits", tmp_path).train_labels, idle, 0,
          phase="anything")
    torch.testing.assert_close(repaired["block1.layer.0.bn1.running_mean"],
                               expected.block1.layer[0].bn1.running_mean, atol=0.02, rtol=0.02)


def test_a_published_checkpoint_that_is_missing_or_another_file_is_one_line(tmp_path: Path) -> None:
    published = Published("theirs/net.pth", "0" * 64, "net.pth of github.com/authors/code")
    victim = Victim("digits", "wrn-10-0.5", None, 0, "badnets", badnets.Config(), published)
    runner = Runner(Store(tmp_path / "results"), tmp_path, torch.device("cpu"))
    with pytest.raises(UserError, match=r"missing: put net\.pth of github\.com/authors/code there"):
        runner.run(victim)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/net.pth").write_bytes(b"another")
    with pytest.raises(UserError, match="its SHA-256 differs"):
        runner.run(victim)


def test_a_model_too_narrow_for_large_images_is_refused() -> None:
    with pytest.raises(UserError, match="choose preact-resnet-18-w16"):
        models.build("preact-resnet-18-w8", 200, 0, "tiny-imagenet")


def test_every_data_set_has_its_sizes() -> None:
    assert images.TRAIN_IMAGES.keys() == images.TEST_IMAGES.keys() == data.IMAGE_CLASSES.keys()
