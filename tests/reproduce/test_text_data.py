"""Text data sets: both layouts, every fault in one line, splits that are the same for everybody."""

import sys
import types
from pathlib import Path

import pytest
import torch

from reproduce import data
from reproduce.data import texts
from reproduce.data.texts import SOURCES, Source, load_texts
from reproduce.errors import UserError
from tests.reproduce.small_texts import COUNTS, rows, save_small_texts, write


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return save_small_texts(tmp_path, monkeypatch)


def test_layout_of_the_data_root(root: Path) -> None:
    found = load_texts("small", root)
    assert found.test.texts == tuple(text for text, _label in rows("test"))
    assert found.test.labels.tolist() == [0, 1] * 3 and found.num_classes == 2 and found.target == 1
    aligned = found.paraphrases("synbkd", "test")
    assert aligned[0] == f"rewritten {found.test.texts[0]}" and aligned[1] is None and len(aligned) == 6
    assert None not in found.paraphrases("synbkd", "train")


def test_layout_of_the_authors_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOURCES, "small", Source("small", ("no", "yes"), 1, COUNTS))
    there = tmp_path / "BadActs/poison_data/small/1"
    for split, stem in (("train", "train"), ("validation", "dev"), ("test", "test")):
        write(there / f"badnets/{stem}-clean.csv", rows(split))
        write(there / f"stylebkd/{stem}-poison.csv", [(f"thus {i}", 1) for i in range(COUNTS[split] // 2)])
    found = load_texts("small", tmp_path)
    assert len(found.train) == 12 and found.paraphrases("stylebkd", "test")[2] == "thus 1"


@pytest.mark.parametrize(("damage", "message"), [
    (lambda folder: (folder / "clean/test.csv.xz").unlink(), r"test.csv.* is missing: clone github.com"),
    (lambda folder: (folder / "clean/test.csv.xz").write_bytes(b"no xz"), "is not a readable file"),
    (lambda folder: write(folder / "clean/test.csv", rows("test")[:5]), "has 5 rows, the released file 6"),
    (lambda folder: write(folder / "clean/test.csv", [*rows("test")[:5], ("x", 2)]), "row 5 .* has label 2"),
    (lambda folder: write(folder / "clean/test.csv", [*rows("test")[:5], (" ", 1)]), "row 5 .* is an empty sentence"),
])
def test_a_faulty_file_is_one_line(root: Path, damage, message: str) -> None:
    damage(root / "text/small/badacts")
    with pytest.raises(UserError, match=message):
        load_texts("small", root)


def test_paraphrases_that_do_not_fit_their_sources(root: Path) -> None:
    write(root / "text/small/badacts/synbkd/test-poison.csv", [("x", 1)] * 4)
    found = load_texts("small", root)
    with pytest.raises(UserError, match=r"has 4 rows, which do not fit the 3 clean"):
        found.paraphrases("synbkd", "test")
    with pytest.raises(UserError, match=r"stylebkd/test-poison.*is missing"):
        found.paraphrases("stylebkd", "test")


def test_images_and_texts_are_told_apart(tmp_path: Path) -> None:
    assert (data.modality("cifar10"), data.modality("sentences")) == (data.IMAGE, data.TEXT)
    with pytest.raises(UserError, match="unknown data set 'imdb'"):
        data.modality("imdb")
    with pytest.raises(UserError, match="holds texts, not images"):
        data.load("sst-2", tmp_path)
    with pytest.raises(UserError, match="holds images, not texts"):
        data.load_text("digits", tmp_path)
    assert data.attacker_target("sst-2") == 1 and data.attacker_target("agnews-small") == 0


def test_clean_sst2_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, split: str) -> list[dict]:
        asked.append((name, split))
        return [{"text": f"{split} {i}", "label": i % 2} for i in range(SOURCES["sst-2"].counts[split])]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset, __spec__=object()))
    monkeypatch.setattr(texts, "hub_answers", lambda: True)
    found = load_texts("sst-2", tmp_path)
    assert len(found.train) == 6920 and found.test.texts[3] == "test 3" and len(asked) == 3
    monkeypatch.setattr(texts, "hub_answers", lambda: False)
    with pytest.raises(UserError, match="is missing"):
        load_texts("sst-2", tmp_path)


def test_embedded_sentences() -> None:
    found = data.load_text("sentences", Path("nowhere"))
    for split, count in (("train", 800), ("validation", 240), ("test", 240)):
        part = found.split(split)
        assert len(part) == count and int(part.labels.sum()) == count // 2
        assert len(found.paraphrases("stylebkd", split)) == count
    assert not set(found.validation.texts) & set(found.test.texts[:5]) or len(set(found.test.texts)) > 200


@pytest.mark.data
def test_real_splits(data_root: Path) -> None:
    hsol, released = (data.load_text(name, data_root) for name in ("hsol", "hsol-released"))
    assert released.validation.texts == released.test.texts, "the released validation set is the test set"
    assert sorted((*hsol.train.texts, *hsol.validation.texts)) == sorted(released.train.texts)
    assert (len(hsol.train), len(hsol.validation)) == (4658, 1165)
    for name in ("sst-2", "yelp", "hsol", "hsol-released", "agnews-small"):
        loaded = data.load_text(name, data_root)
        assert data.sentences_in(name) == (len(loaded.train), len(loaded.validation), len(loaded.test))
    rewritten = dict(zip(released.train.texts, released.paraphrases("stylebkd", "train"), strict=True))
    cut = zip(hsol.train.texts, hsol.paraphrases("stylebkd", "train"), strict=True)
    assert sum(rewritten[text] == new for text, new in cut) > 4600   # a few sources occur twice
    news = data.load_text("agnews-small", data_root)
    assert (len(news.train), len(news.validation), len(news.test)) == (10_000, 2000, 7600)
    missing = torch.tensor([text is None for text in news.paraphrases("synbkd", "train")])
    assert missing.equal(news.train.labels == 0)
