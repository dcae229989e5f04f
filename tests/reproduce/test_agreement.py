"""Two results folders side by side."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from reproduce.agreement import Pair, agreement
from reproduce.cli import main
from reproduce.errors import UserError
from reproduce.metrics import Predictions, metrics
from reproduce.store import Store

LABELS = np.arange(10)


def write(root: Path, name: str, clean: list[int], triggered: list[int], machine: str) -> None:
    index = np.arange(len(triggered))
    predictions = Predictions(LABELS, np.array(clean), index, np.full(len(index), 9), np.array(triggered, dtype=int))
    Store(root).write(name, config={}, environment={"cpu": machine}, metrics={**metrics(predictions), "seconds": 1.0},
                      history=[], arrays={"predictions": vars(predictions)}, tensors={})


def two(folder: Path) -> tuple[Path, Path]:
    here, there = folder / "here", folder / "there"
    for root, machine in ((here, "one"), (there, "another")):
        write(root, "b-same", list(range(10)), [9] * 5, machine)
        write(root, "copied", list(range(10)), [9] * 5, "one")
        write(root, f"only-{machine}", list(range(10)), [9] * 5, machine)
    write(here, "a-different", list(range(10)), [9, 9, 9, 9, 9], "one")
    write(there, "a-different", [0, 1, 2, 3, 4, 5, 6, 7, 8, 0], [9, 9, 9, 0, 0], "another")
    for root in (here, there):
        write(root, "clean", list(range(10)), [], root.name)
    return here, there


def test_shared_runs_are_compared_and_copies_only_counted(tmp_path: Path) -> None:
    found = agreement(*two(tmp_path))
    assert found.copies == 1
    assert found.pairs == [Pair("a-different", (100.0, 90.0), (100.0, 60.0), pytest.approx(80.0)),
                           Pair("b-same", (100.0, 100.0), (100.0, 100.0), 100.0),
                           Pair("clean", (100.0, 100.0), None, 100.0)]
    assert found.lines()[-1] == (
        "3 runs computed twice: ACC differs by 3.33 points (at most 10.00), ASR by 20.00 points (at most 40.00); "
        "93.33 % of the predictions are the same")
    assert found.lines()[1].split() == ["a-different", "100.00", "90.00", "100.00", "60.00", "80.00", "%"]


def test_the_command_prints_lines_or_one_object(tmp_path: Path) -> None:
    here, there = two(tmp_path)
    arguments = ["compare", "--results", str(here), "--with", str(there)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0 and done.output.splitlines() == agreement(here, there).lines()
    printed = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).output)
    assert printed["copies"] == 1 and [pair["run"] for pair in printed["pairs"]] == ["a-different", "b-same", "clean"]


def test_damaged_runs_are_counted_and_said(tmp_path: Path) -> None:
    here, there = two(tmp_path)
    (there / "runs" / "a-different" / "metrics.json").write_text("{}")
    found = agreement(here, there)
    assert found.damaged == 1 and found.lines()[-1].endswith("left out: 1")
    for name in ("b-same", "copied", "clean"):
        (here / "runs" / name / "done").unlink()
    with pytest.raises(UserError, match="4 of the runs that both have are damaged"):
        agreement(here, there)


def test_nothing_to_compare_is_said(tmp_path: Path) -> None:
    here, _there = two(tmp_path)
    write(tmp_path / "other", "unknown", list(range(10)), [9], "one")
    with pytest.raises(UserError, match="no finished run in common"):
        agreement(here, tmp_path / "other")
    with pytest.raises(UserError, match="holds no runs"):
        agreement(here, tmp_path / "nowhere")
    write(tmp_path / "copy", "copied", list(range(10)), [9] * 5, "one")
    assert agreement(here, tmp_path / "copy").lines() == ["no run was computed twice; 1 are copies of one another"]
