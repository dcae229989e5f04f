"""Run folders: whole or not at all, checksummed, safe to load."""

import shutil
import time
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import numpy as np
import pytest
import torch

from reproduce.engine import start_method
from reproduce.store import Run, Store, damage, identity


def write(store: Store, name: str = "run", first: int = 0, config: dict | None = None,
          made_from: dict[str, str] | None = None) -> Run:
    """A run of four samples. first: the first prediction; made_from: None as in runs of before it was recorded."""
    predictions = {key: np.arange(4) for key in ("labels", "clean", "index", "wanted", "triggered")}
    predictions["clean"] = np.array([first, 1, 2, 3])
    environment = {} if made_from is None else {"made_from": made_from}
    return store.write(name, config=config or {"a": 1}, environment=environment, metrics={"acc": 1.0},
                       history=[{"epoch": 1}], arrays={"predictions": predictions},
                       tensors={"model": {"w": torch.ones(2, 3)}})


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    write(store)
    run = store.find("run")
    assert run.json("config") == {"a": 1} and run.history() == [{"epoch": 1}]
    assert torch.equal(run.tensors("model")["w"], torch.ones(2, 3))
    assert run.predictions().clean.tolist() == [0, 1, 2, 3]
    assert store.status("run") == "done" and store.status("other") == "missing"
    assert not list((tmp_path / "partial").iterdir())


@pytest.mark.parametrize("file", ["metrics.json", "predictions.npz", "model.safetensors", "manifest.json",
                                  "done"])
@pytest.mark.parametrize("harm", ["flip", "cut", "delete"])
def test_any_damage_is_noticed_named_and_set_aside(tmp_path: Path, file: str, harm: str) -> None:
    store = Store(tmp_path)
    path = write(store).path / file
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 0x80
        path.write_bytes(content)
    elif harm == "cut":
        path.write_bytes(content[:-2])
    else:
        path.unlink()
    assert store.find("run") is None and store.status("run") == "damaged"
    assert (file if file != "done" or harm == "delete" else "manifest.json") in store.set_aside("run")
    assert store.status("run") == "missing" and len(list((tmp_path / "damaged").iterdir())) == 1


def test_a_run_under_another_ones_name_does_not_count(tmp_path: Path) -> None:
    store = Store(tmp_path)
    one, other = ({"rate": rate} for rate in (0.1, 0.2))
    names = [f"ft-badnets-s0-{identity(config)}" for config in (one, other)]
    write(store, names[0], config=one)
    assert store.status(names[0]) == "done"
    shutil.copytree(tmp_path / "runs" / names[0], tmp_path / "runs" / names[1])
    assert store.find(names[1]) is None and store.set_aside(names[1]) == "config.json is that of another run"
    assert store.find(names[0])


def test_what_could_not_be_written_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object, **_arrays: object) -> None:
        raise OSError(28, "No space left on device")
    store = Store(tmp_path)
    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space left"):
        write(store)
    assert not list((tmp_path / "partial").iterdir())
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        store.fail("run", "why")
    assert not list((tmp_path / "failed").iterdir())


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


def _hold(root: Path, seconds: float, order: "SimpleQueue[str]") -> None:
    with Store(root).lock("run"):
        order.put("in")
        time.sleep(seconds)
        order.put("out")


def test_a_lock_excludes_other_processes_and_dies_with_its_holder(tmp_path: Path) -> None:
    context = start_method()
    order = context.SimpleQueue()       # what is put is there at once, however busy the machine
    holders = [context.Process(target=_hold, args=(tmp_path, 0.3, order)) for _ in range(2)]
    for holder in holders:
        holder.start()
    for holder in holders:
        holder.join()
        assert holder.exitcode == 0
    assert [order.get() for _ in range(4)] == ["in", "out", "in", "out"]
    sleeper = context.Process(target=_hold, args=(tmp_path, 600, order))
    sleeper.start()
    while order.empty() and sleeper.is_alive():
        time.sleep(0.01)
    assert order.get() == "in"
    sleeper.kill()
    with Store(tmp_path).lock("run"):
        pass


def test_a_run_adopted_without_its_weights_is_whole(tmp_path: Path) -> None:
    run, copy = write(Store(tmp_path / "a")), Store(tmp_path / "b")
    copy.adopt(run, ("model.safetensors",))
    inode = (tmp_path / "b" / "runs" / "run").stat().st_ino
    copy.adopt(run, ("model.safetensors",))
    assert (tmp_path / "b" / "runs" / "run").stat().st_ino == inode, "already there: left alone"
    found = copy.find("run")
    assert found.json("config") == {"a": 1} and not (found.path / "model.safetensors").exists()


def test_a_run_without_its_weights_is_replaced_by_one_that_has_them(tmp_path: Path) -> None:
    store = Store(tmp_path / "b")
    store.adopt(write(Store(tmp_path / "a")), ("model.safetensors",))
    assert store.find("run") and store.find("run", "model") is None
    write(store)
    assert store.find("run", "model") and store.find("run", "defense") is None
    assert [path.name[:4] for path in (tmp_path / "b" / "replaced").iterdir()] == ["run-"]


def test_tensors_that_the_checksums_do_not_know_are_not_there(tmp_path: Path) -> None:
    store = Store(tmp_path / "b")
    store.adopt(write(Store(tmp_path / "a")), ("model.safetensors",))
    (tmp_path / "b" / "runs" / "run" / "model.safetensors").write_bytes(b"anything")
    assert store.find("run") and store.find("run", "model") is None


@pytest.mark.parametrize("there", ["whole", "damaged", "gone"])
def test_what_was_made_from_a_run_that_predicted_otherwise_is_moved_aside(tmp_path: Path, there: str) -> None:
    store = Store(tmp_path)
    config = {"kind": "victim"}
    former = write(store, "victim", config=config).predictions()
    renewed = write(Store(tmp_path / "elsewhere"), first=3).predictions()
    cell = {"kind": "cell", "victim": config}
    write(store, "cell-same", config=cell, made_from={"victim": former.digest()})
    write(store, "cell-new", config=cell, made_from={"victim": renewed.digest()})
    write(store, "cell-silent", config=cell)
    write(store, "cell-elsewhere", config={"kind": "cell", "victim": {"kind": "another"}}, made_from={"other": "x"})
    write(store, "cell-elsewhere-silent", config={"kind": "cell", "victim": {"kind": "another"}})
    if there == "damaged":
        (tmp_path / "runs" / "victim" / "done").write_text("?")
    elif there == "gone":
        shutil.rmtree(tmp_path / "runs" / "victim")
    # The same again: only a cell that does not say what it was made from is in doubt, where nothing is left to tell.
    doubtful = [] if there == "whole" else ["cell-silent"]
    assert store.outdate("victim", config, former) == sorted(["cell-new", *doubtful])
    assert store.outdate("victim", config, renewed) == sorted(["cell-same", *([] if doubtful else ["cell-silent"])])
    assert [name for name in store.names() if name != "victim"] == ["cell-elsewhere", "cell-elsewhere-silent"]


def test_a_run_adopted_again_is_the_one_that_is_adopted(tmp_path: Path) -> None:
    source, target = Store(tmp_path / "a"), Store(tmp_path / "b")
    target.adopt(write(source, "victim", config={"kind": "victim"}), ("model.safetensors",))
    victim = target.find("victim")
    write(target, "cell", config={"kind": "cell"}, made_from={"victim": victim.predictions().digest()})
    target.adopt(source.find("victim"))
    assert target.find("victim", "model") and target.find("cell"), "with its weights this time"
    target.adopt(write(source, "victim", first=3, config={"kind": "victim"}), ("model.safetensors",))
    assert target.find("victim").predictions().clean[0] == 3 and target.find("cell") is None
