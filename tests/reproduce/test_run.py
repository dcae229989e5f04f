"""The driver as its users run it: whole, killed, twice at once, damaged, failing, and with bad arguments."""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from attacks import badnets
from defenses import ft, mcldef
from reproduce import engine
from reproduce.cells import Cell, Task, Victim
from reproduce.cli import main
from reproduce.engine import Workers, execute, unfinished
from reproduce.runner import Runner
from reproduce.store import Store
from reproduce.training import Recipe

ROOT = Path(__file__).parent.parent.parent
RUN = ["run", "--profile", "quick", "--item", "beta", "--seeds", "1", "--jobs", "2"]
RECIPE = Recipe(epochs=1, rates=((0, 0.1),))
VICTIM = Victim("digits", "wrn-10-0.5", RECIPE, 0, "badnets", badnets.Config())
CELL = Cell(VICTIM, "ft", ft.Config(RECIPE), 0.05)


def start(folder: Path, *more: str) -> subprocess.Popen:
    """A driver that can be killed, or run beside another."""
    return subprocess.Popen([sys.executable, "-m", "reproduce", *RUN, "--results", str(folder), *more], cwd=ROOT,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "CI": "true"}, start_new_session=True)


def drive(folder: Path, *more: str) -> tuple[int, str, str]:
    """A driver in this process, which has imported everything already: exit code, output, errors."""
    done = CliRunner().invoke(main, [*RUN, "--results", str(folder), *more], env={"CI": "true"})
    return done.exit_code, done.stdout, done.stderr


def published(folder: Path) -> dict[str, bytes]:
    """Every table, and each run's predictions and history: what must not depend on interruptions.

    The cost table is left out: it shows measured seconds.
    """
    files = [path for pattern in ("tables/**/*.csv", "runs/*/predictions.npz", "runs/*/history.jsonl")
             for path in folder.glob(pattern)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if "cost" not in path.name}


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, "ended before it could be killed: " + process.stderr.read()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    code, out, err = drive(folder)
    assert code == 0, err
    assert err.count("done   ") == 3 and "Traceback" not in err
    assert str(folder / "report.html") in out
    return folder


def test_killed_twice_and_resumed_by_two_at_once_gives_the_same_bytes(undisturbed: Path, tmp_path: Path) -> None:
    def killed_when(condition: Callable[[], bool]) -> None:
        process = start(tmp_path)
        wait_for(condition, process)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()

    progress = tmp_path / "progress"
    killed_when(lambda: progress.is_dir() and any("victim" in p.name and "." not in p.name for p in progress.iterdir()))
    saved = next(p for p in progress.iterdir() if "victim" in p.name)
    epochs = saved.read_bytes().count(b'"epoch"')
    assert 0 < epochs < 6
    killed_when(lambda: any(tmp_path.glob("runs/victim*")))
    both = [start(tmp_path, "--jobs", "1") for _ in range(2)]
    for process in both:
        _out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
    assert published(tmp_path) == published(undisturbed)
    assert len(published(tmp_path)) == 7, "a table, and of three runs the predictions and the history"
    assert not (tmp_path / "replaced").exists(), "nothing was computed twice"


def test_nothing_goes_on_after_the_driver_is_killed(tmp_path: Path) -> None:
    process = start(tmp_path)
    wait_for(lambda: any(tmp_path.glob("progress/victim*")), process)

    def alive() -> int:
        """Processes of its session, which is its own, that are more than a name."""
        listed = subprocess.run(["ps", "-o", "stat=", "--sid", str(process.pid)], capture_output=True, text=True)
        return sum(not state.startswith("Z") for state in listed.stdout.split())

    assert alive() >= 3, "itself and its workers"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 30     # the one that workers fork from takes seconds to unload torch
    while (left := alive()) and time.monotonic() < end:
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    assert left == 0


def test_again_computes_nothing(undisturbed: Path) -> None:
    before = published(undisturbed)
    code, _out, err = drive(undisturbed)
    assert code == 0 and "0 computed, 3 reused, 0 failed" in err
    assert published(undisturbed) == before


def test_a_damaged_run_is_set_aside_and_computed_again(undisturbed: Path) -> None:
    before = published(undisturbed)
    path = next(undisturbed.glob("runs/nad-*/metrics.json"))
    path.write_text(path.read_text().replace('"asr": ', '"asr": 1'))
    code, _out, err = drive(undisturbed)
    assert code == 0 and "1 computed, 2 reused" in err
    assert [p.name.startswith(path.parent.name) for p in (undisturbed / "damaged").iterdir()] == [True]
    assert published(undisturbed) == before


def test_a_failing_run_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    bad = replace(VICTIM, settings=badnets.Config(pattern=((255,) * 40,)))  # wider than the image
    cells = [CELL, replace(CELL, victim=bad)]
    lines: list[str] = []
    outcome = execute([VICTIM, bad, *cells], Workers(tmp_path, tmp_path, 1), lines.append)
    assert set(outcome.done) == {VICTIM.name, CELL.name}
    assert set(outcome.failed) == {bad.name, cells[1].name}
    assert f"needs {bad.name}" in outcome.failed[cells[1].name]
    store = Store(tmp_path)
    assert store.status(bad.name) == "failed" and "RuntimeError" in store.failure(bad.name)
    assert len(lines) == 4


def test_what_an_export_left_out_is_computed_again_where_it_is_needed(tmp_path: Path) -> None:
    execute([VICTIM, CELL], Workers(tmp_path / "whole", tmp_path, 1), lambda line: None)
    whole, exported = Store(tmp_path / "whole"), Store(tmp_path / "exported")
    for task in (VICTIM, CELL):
        exported.adopt(whole.find(task.name), ("model.safetensors",))
    assert list(unfinished([VICTIM, CELL], exported)) == []
    assert execute([VICTIM, CELL], Workers(exported.root, tmp_path, 1), print).reused == [VICTIM.name, CELL.name]
    another = replace(CELL, clean_fraction=0.1)
    assert list(unfinished([VICTIM, CELL, another], exported)) == [VICTIM.name, another.name]
    assert execute([VICTIM, CELL, another], Workers(exported.root, tmp_path, 1), print).failed == {}
    again = exported.find(VICTIM.name, "model")
    assert again.json("metrics")["info"]["same_as_before"] == 100
    assert (again.path / "model.safetensors").read_bytes() == (whole.find(VICTIM.name).path
                                                               / "model.safetensors").read_bytes()
    assert exported.find(CELL.name, "model") is None, "nothing needs the weights of a cell"


def test_how_many_predictions_changed_is_noted(tmp_path: Path) -> None:
    notes: list[str] = []
    runner = Runner(Store(tmp_path / "a"), tmp_path, torch.device("cpu"), note=notes.append)
    run = runner.run(VICTIM)
    with np.load(run.path / "predictions.npz") as archive:
        arrays = dict(archive)
    arrays["clean"][:10] += 1
    store = Store(tmp_path / "b")
    store.write(VICTIM.name, config=run.json("config"), environment={}, metrics=run.json("metrics"), history=[],
                arrays={"predictions": arrays}, tensors={})
    Runner(store, tmp_path, torch.device("cpu"), note=notes.append).run(VICTIM, "model")
    total = len(arrays["clean"]) + len(arrays["triggered"])
    assert notes == [f"{VICTIM.name}: computed again, because its model.safetensors had been left out; "
                     f"{100 - 1000 / total:.2f} % of its predictions are as before"]


def test_cells_of_a_victim_that_came_out_otherwise_are_computed_again(tmp_path: Path) -> None:
    other = replace(VICTIM, attack="none", settings=None)
    elsewhere = replace(CELL, victim=other)
    another = replace(CELL, clean_fraction=0.1)
    tasks, workers = [VICTIM, other, CELL, elsewhere, another], Workers(tmp_path / "whole", tmp_path, 1)
    execute(tasks, workers, lambda line: None)
    whole, published = Store(tmp_path / "whole"), Store(tmp_path / "published")
    for task in (VICTIM, other, CELL, elsewhere):
        published.adopt(whole.find(task.name), ("model.safetensors",))
    told = published.find(CELL.name)
    assert list(told.json("environment")["made_from"]) == [VICTIM.name]
    # As if made from a victim that another processor trained.
    published.write(CELL.name, config=told.json("config"), environment={"made_from": {VICTIM.name: "otherwise"}},
                    metrics=told.json("metrics"), history=[], arrays={"predictions": told.arrays("predictions")},
                    tensors={})
    outcome = execute(tasks, Workers(published.root, tmp_path, 1), lambda line: None)
    assert sorted(outcome.done) == sorted([VICTIM.name, CELL.name, another.name]) and not outcome.failed
    assert outcome.reused == [other.name, elsewhere.name], "made from another victim"
    assert published.find(CELL.name).json("environment")["made_from"] == told.json("environment")["made_from"]
    assert (published.find(CELL.name).path / "predictions.npz").read_bytes() == (
        whole.find(CELL.name).path / "predictions.npz").read_bytes()


def test_what_crashes_takes_nothing_else_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tasks were in flight when a process died: each is tried alone, and only the culprit fails."""
    culprit, innocent = VICTIM, replace(VICTIM, seed=1)
    pool = Breaking({culprit.name})
    monkeypatch.setattr(engine, "_Pool", lambda workers: pool)
    outcome = execute([culprit, innocent], Workers(tmp_path, tmp_path, 2), lambda line: None)
    assert outcome.done == [innocent.name] and list(outcome.failed) == [culprit.name]
    assert "died twice" in outcome.failed[culprit.name] and pool.together == [2, 1, 1]


class Breaking:
    """A pool whose processes die of some tasks, and with one all in flight; together: how many were, each time."""

    def __init__(self, deadly: set[str]) -> None:
        self.deadly, self.flying, self.together, self.messages = deadly, [], [], queue.Queue()

    def __enter__(self) -> "Breaking":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, task: Task, holding: str | None) -> Future:
        future: Future = Future()
        self.flying.append((task, future))
        threading.Timer(0.2, self._land).start()
        return future

    def _land(self) -> None:
        landing, self.flying = self.flying, []
        if landing:
            self.together.append(len(landing))
        broken = any(task.name in self.deadly for task, _future in landing)
        for _task, future in landing:
            future.set_exception(BrokenProcessPool()) if broken else future.set_result("")

    def restart_after(self, broken: Future) -> None:
        pass


def test_a_pool_that_broke_since_the_last_look_is_started_anew(tmp_path: Path) -> None:
    with engine._Pool(Workers(tmp_path, tmp_path, 1)) as pool:
        pool.executor.submit(os.getpid).result()
        for process in pool.executor._processes.values():
            process.kill()
            process.join()
        time.sleep(0.5)
        assert "ACC" in pool.submit(VICTIM, None).result(timeout=120)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_worker_has_the_threads_that_were_asked_for(tmp_path: Path, threads: int) -> None:
    with engine._Pool(Workers(tmp_path, tmp_path, 1, threads=threads)) as pool:
        assert pool.executor.submit(torch.get_num_threads).result() == threads


@pytest.mark.parametrize(("threads", "said"), [(1, ", 9 processes on"), (4, ", 2 processes of 4 threads on"),
                                               (16, ", 1 process of 16 threads on")])
def test_cores_are_shared_out_among_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int,
                                              said: str) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 9)
    done = CliRunner().invoke(main, ["run", "--profile", "quick", "--paper", "nad", "--device", "cpu", "--dry-run",
                                     "--threads", str(threads), "--results", str(tmp_path)])
    assert done.exit_code == 0 and said in done.stdout


def test_what_a_defense_shows_is_stored_with_its_run(tmp_path: Path) -> None:
    runner = Runner(Store(tmp_path), tmp_path, torch.device("cpu"))
    inverting = mcldef.Config(target=0, pixel=mcldef.Pixel(steps=1), recipe=RECIPE)
    shown = runner.run(Cell(VICTIM, "mcldef", inverting, 0.05))
    assert runner.store.find(shown.name).tensors("defense")["trigger"].shape[0] == 3
    assert shown.json("metrics")["info"]["target"] == 0
    assert not (runner.run(CELL).path / "defense.safetensors").exists()


@pytest.mark.parametrize(("arguments", "said"), [
    (["run", "--profile", "huge"], "--profile"),
    (["run", "--paper", "argo"], "--paper"),
    (["run", "--item", "everything"], "unknown item everything"),
    (["run", "--paper", "nad", "--attack", "addsent"], "unknown attack addsent: choose from BadNets; "),
    (["run", "--defense", "magic"], "unknown defense magic: choose from FT; "),
    (["run", "--seeds", "0"], "--seeds"),
    (["run", "--jobs", "many"], "--jobs"),
    (["run", "--nonsense"], "--nonsense"),
    (["run", "--profile", "quick", "--results", "/proc/nowhere"], "cannot be written"),
    (["run", "--profile", "cpu", "--data-root", "/nonexistent/place"], "CIFAR-10 is not at"),
    (["run", "--results", "README.md"], "--results"),
    (["frobnicate"], "frobnicate"),
    (["report", "--results", "nowhere/at/all"], "holds no runs"),
    (["report", "--profile", "quick", "--results", "reference/authors-victims"], "none of the 133 runs in"),
    (["export", "--results", "nowhere/at/all", "--into", "/tmp/never"], "holds no runs"),
    (["export", "--profile", "paper", "--seeds", "3", "--item", "authors-victim", "--results",
      "reference/authors-victims", "--into", "/proc/nope"], "--into /proc/nope cannot be written"),
    (["evaluate", "--checkpoint", "none.pth", "--model", "wrn-16-1", "--dataset", "digits"], "no such checkpoint"),
    (["evaluate", "--checkpoint", "none.pth", "--model", "wrn-16-1"], "--dataset"),
    (["evaluate", "--checkpoint", "none.pth", "--model", "wrn-16-1", "--dataset", "mnist"], "unknown data set"),
])
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], said: str,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2, done.output
    *_before, last = done.output.splitlines()
    assert last.startswith("error: ") and said in last and done.output.count("error: ") == 1


def test_bad_input_goes_to_standard_error() -> None:
    done = CliRunner().invoke(main, ["run", "--item", "everything"])
    assert done.exit_code == 2 and done.stdout == ""
    assert done.stderr.startswith("error: unknown item everything") and len(done.stderr.splitlines()) == 1


def test_a_reader_that_went_away_is_no_traceback() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "reproduce", "status", "--profile", "quick", "--item", "curves"],
                              cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "No space left" in done.stderr and done.stderr.endswith("the same command goes on from here\n")


def test_without_a_command_the_commands_are_listed() -> None:
    done = CliRunner().invoke(main, [])
    assert done.exit_code == 2 and len(done.stderr.splitlines()) > 10 and "purify" in done.stderr


def test_dry_run_lists_and_writes_nothing(tmp_path: Path) -> None:
    code, out, _err = drive(tmp_path / "new", "--dry-run")
    assert code == 0 and out.count("missing") == 3 and "about" in out
    assert not (tmp_path / "new").exists()
