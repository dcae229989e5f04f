"""The benchmark runs, finds its slow and fast paths equal, and fails loudly where they are not."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from benchmarks import limits, stages
from benchmarks.bench import ALL_STAGES, line, main, measure
from benchmarks.limits import training_flops
from benchmarks.stages import CPU, QUICK, STAGES, Bench, Stage


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


def test_rates_are_medians_per_second() -> None:
    now = {"now": 0.0}
    costs = {"slow": iter([99, 4, 8, 6]), "fast": iter([99, 2, 1, 3])}   # the first of each is the warm-up

    def side(name: str) -> None:
        now["now"] += next(costs[name])

    stage = Stage("s", 120, {"NAD": lambda: side("slow")}, {"fp32": lambda: side("fast")}, {"fp32": (2.5, 3.5)})
    row, = measure(stage, 3, lambda: now["now"])
    assert (row.baseline_rate, row.our_rate, row.ratio, row.verdict) == (20, 60, 3, "met")
    costs |= {"slow": iter([99, 4]), "fast": iter([99, 2])}
    without_goals = Stage("s", 120, {"NAD": lambda: side("slow")}, {"fp32": lambda: side("fast")}, {})
    assert measure(without_goals, 1, lambda: now["now"])[0].verdict == ""


def test_beside_what_trains_is_what_the_device_could_reach_in_its_precision() -> None:
    peaks = {"fp32": 900.0, "bf16": 2400.0}
    work = {"fp32": lambda: None, "bf16, graph": lambda: None}
    tick = iter(range(1000))
    stage = Stage("s", 60, {"usual": lambda: None}, work, {}, flops=3.0)
    plain, graph = measure(stage, 1, lambda: float(next(tick)), peak_of=peaks.__getitem__)
    assert (plain.our_rate, plain.limit, graph.limit) == (60, 300, 800)
    assert " 300    20%" in line(plain) and "   8%" in line(graph)
    without, *_ = measure(replace(stage, flops=None), 1, lambda: float(next(tick)), peak_of=peaks.get)
    assert without.limit is None and "%" not in line(without)


def test_the_work_of_a_training_step_is_counted_by_hand() -> None:
    images = torch.rand(2, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 1), nn.Flatten(), nn.Linear(320, 10))
    first, second, last = 3 * 4 * 9 * 64, 4 * 5 * 64, 320 * 10      # multiply-adds of one image
    # Forwards, for the weights, and for what came in, which nobody asks of the first layer.
    assert training_flops(model, images) == 2 * (2 * first + 3 * second + 3 * last)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_peak_is_that_of_the_faster_of_the_two(monkeypatch: pytest.MonkeyPatch) -> None:
    product, convolution = 2 * 64 ** 3, 2 * 2 * 9 * 64 ** 2 * 32 ** 2       # operations, at size 64
    for seconds, wanted in (((1.0, 1000.0), product), ((1000.0, 1.0), convolution)):
        durations = iter(seconds)
        monkeypatch.setattr(limits, "_least_seconds", lambda work, clock, durations=durations: next(durations))
        assert limits.peak(CPU, "fp32", 64) == wanted
    monkeypatch.undo()
    assert limits.peak(CPU, "bf16", 64) > 1e6


def test_of_several_tries_the_fastest_counts_and_the_first_does_not() -> None:
    done, tick = [], iter([0.0, 5.0, 5.0, 8.0, 10.0, 12.0, 20.0, 24.0, 24.0, 27.0])
    assert limits._least_seconds(lambda: done.append(0), lambda: next(tick)) == 2.0
    assert len(done) == 1 + limits.REPEATS


def test_seconds_are_of_the_own_process_on_a_cpu() -> None:
    seconds, before = limits.clock(CPU), time.process_time()
    time.sleep(0.05)
    assert 0 <= seconds() - before < 0.04, "who sleeps takes none"


def test_a_gpu_is_asked_for_where_there_is_one() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    result = CliRunner().invoke(main, ["--device", "cuda"])
    assert result.exit_code == 2 and "no CUDA device" in result.output


@pytest.mark.parametrize(("name", "function"), [("poison", stages.badnets), ("augment", stages)])
def test_a_wrong_fast_path_is_not_timed(monkeypatch: pytest.MonkeyPatch, name: str, function: object) -> None:
    right = function.apply
    monkeypatch.setattr(function, "apply", lambda images, *rest: right(images, *rest) ^ torch.tensor(1).byte())
    with pytest.raises(AssertionError, match="differ from the slow path"):
        next(STAGES[name](Bench(QUICK)))


def test_a_folder_without_the_checkout_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--quick", "--nad-checkout", str(tmp_path)])
    assert result.exit_code == 2 and "data_loader.py" in result.output
