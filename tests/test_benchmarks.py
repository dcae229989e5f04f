"""The benchmark runs, finds its slow and fast paths equal, and fails loudly where they are not."""

import json
import types
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import stages
from benchmarks.bench import ALL_STAGES, main, measure
from benchmarks.stages import QUICK, STAGES, Bench, Stage


@pytest.mark.parametrize("name", list(ALL_STAGES))
def test_every_stage_yields_positive_rates(name: str, tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    result = CliRunner().invoke(main, ["--quick", "--windows", "1", "--stages", name, "--json", str(output)],
                                catch_exceptions=False)
    assert result.exit_code == 0
    rows = json.loads(output.read_text())["rows"]
    assert rows and all(row["baseline_rate"] > 0 and row["our_rate"] > 0 and row["ratio"] > 0 for row in rows)
    assert all(row["must"] is None for row in rows), "tiny sizes say nothing about the goals"
    assert len(result.output.splitlines()) == 1 + len(rows)


def test_rates_are_medians_per_cpu_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 0.0}
    costs = {"slow": iter([99, 4, 8, 6]), "fast": iter([99, 2, 1, 3])}   # the first of each is the warm-up

    def side(name: str) -> None:
        clock["now"] += next(costs[name])

    monkeypatch.setattr("benchmarks.bench.time", types.SimpleNamespace(process_time=lambda: clock["now"]))
    stage = Stage("s", 120, {"NAD": lambda: side("slow")}, {"fp32": lambda: side("fast")}, {"fp32": (2.5, 3.5)})
    row, = measure(stage, windows=3)
    assert (row.baseline_rate, row.our_rate, row.ratio, row.verdict) == (20, 60, 3, "met")
    costs |= {"slow": iter([99, 4]), "fast": iter([99, 2])}
    without_goals = Stage("s", 120, {"NAD": lambda: side("slow")}, {"fp32": lambda: side("fast")}, {})
    assert measure(without_goals, windows=1)[0].verdict == ""


@pytest.mark.parametrize(("name", "function"), [("poison", stages.badnets), ("augment", stages)])
def test_a_wrong_fast_path_is_not_timed(monkeypatch: pytest.MonkeyPatch, name: str, function: object) -> None:
    right = function.apply
    monkeypatch.setattr(function, "apply", lambda images, *rest: right(images, *rest) ^ torch.tensor(1).byte())
    with pytest.raises(AssertionError, match="differ from the slow path"):
        next(STAGES[name](Bench(QUICK)))


def test_a_folder_without_the_checkout_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--quick", "--nad-checkout", str(tmp_path)])
    assert result.exit_code == 2 and "data_loader.py" in result.output
