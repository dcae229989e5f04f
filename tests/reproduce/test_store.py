"""Run folders: whole or not at all, checksummed, safe to load."""

import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from reproduce.store import Run, Store, damage


def write(store: Store, name: str = "run") -> Run:
    predictions = {key: np.arange(4) for key in ("labels", "clean", "index", "wanted", "triggered")}
    return store.write(name, config={"a": 1}, environment={}, metrics={"acc": 1.0}, history=[{"epoch": 1}],
                       arrays={"predictions": predictions}, tensors={"model": {"w": torch.ones(2, 3)}})


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    write(store)
    run = store.find("run")
    assert run.json("config") == {"a": 1} and run.history() == [{"epoch": 1}]
    assert torch.equal(run.tensors("model")["w"], torch.ones(2, 3))
    assert run.predictions().clean.tolist() == [0, 1, 2, 3]
    assert store.status("run") == "done" and store.status("other") == "missing"
    assert not list((tmp_path / "partial").iterdir())


@pytest.mark.parametrize("file", ["metrics.json", "predictions.npz", "model.safetensors", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "delete"])
def test_any_damage_is_noticed_named_and_set_aside(tmp_path: Path, file: str, harm: str) -> None:
    store = Store(tmp_path)
    path = write(store).path / file
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif harm == "cut":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    assert store.find("run") is None and store.status("run") == "damaged"
    assert file in store.set_aside("run")
    assert store.status("run") == "missing" and len(list((tmp_path / "damaged").iterdir())) == 1


def test_a_run_without_its_last_file_does_not_count(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (write(store).path / "done").unlink()
    assert damage(tmp_path / "runs" / "run") == "done is missing"


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "predictions.npz", labels=np.array([object()], dtype=object))
    with pytest.raises(ValueError, match="pickle"):
        Run(tmp_path).arrays("predictions")


def test_a_failure_is_kept_until_the_run_succeeds(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.fail("run", "Traceback ...")
    assert store.status("run") == "failed" and store.failure("run") == "Traceback ..."
    write(store)
    assert store.status("run") == "done" and store.failure("run") is None


def _hold(root: Path, seconds: float, order: "multiprocessing.Queue") -> None:
    with Store(root).lock("run"):
        order.put("in")
        time.sleep(seconds)
        order.put("out")


def test_a_lock_excludes_other_processes_and_dies_with_its_holder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    order = context.Queue()
    holders = [context.Process(target=_hold, args=(tmp_path, 0.3, order)) for _ in range(2)]
    for holder in holders:
        holder.start()
    for holder in holders:
        holder.join()
    assert [order.get(timeout=5) for _ in range(4)] == ["in", "out", "in", "out"]
    sleeper = context.Process(target=_hold, args=(tmp_path, 600, order))
    sleeper.start()
    assert order.get(timeout=30) == "in"
    sleeper.kill()
    with Store(tmp_path).lock("run"):
        pass


def test_a_run_adopted_without_its_weights_is_whole(tmp_path: Path) -> None:
    run, copy = write(Store(tmp_path / "a")), Store(tmp_path / "b")
    copy.adopt(run, ("model.safetensors",))
    copy.adopt(run)  # already there: left alone
    found = copy.find("run")
    assert found.json("config") == {"a": 1} and not (found.path / "model.safetensors").exists()


def test_a_run_without_its_weights_is_replaced_by_one_that_has_them(tmp_path: Path) -> None:
    store = Store(tmp_path / "b")
    store.adopt(write(Store(tmp_path / "a")), ("model.safetensors",))
    assert store.find("run") and store.find("run", "model") is None
    write(store)
    assert store.find("run", "model") and store.find("run", "defense") is None
    assert [path.name[:4] for path in (tmp_path / "b" / "replaced").iterdir()] == ["run-"]
