"""Measures every stage: python -m benchmarks.bench [--stages NAME ...] [--device cuda] [--nad-checkout DIR]

One process, one thread, the allocator settings of a worker of ours for every side; the sides of a stage take turns,
and each number is the median over windows of images (or sentences) per second of this process's own CPU time, so that
other jobs on the machine disturb it little. On a GPU, where what trains victims is measured, seconds are the wall's.
Beside what trains is the device's limit: what it would reach, did it nothing but multiply at the fastest seen.
"""

import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import median

import click
import torch

from benchmarks.limits import clock, peak
from benchmarks.stages import GPU, ON_GPU, QUICK, STAGES, Bench, Sizes, Stage
from benchmarks.text_stages import TEXT_STAGES
from reproduce.engine import threaded
from reproduce.errors import UserError
from reproduce.processor import repeatable

ALL_STAGES = STAGES | TEXT_STAGES


@dataclass(frozen=True)
class Row:
    """One comparison; rates in images, sentences or (FMP) feature maps per second of `limits.clock`.

    must, stretch: goals for the ratio; limit: what the device could reach at best in ours' precision; None where not
    set.
    """

    stage: str
    ours: str
    against: str
    baseline_rate: float
    our_rate: float
    ratio: float
    must: float | None
    stretch: float | None
    limit: float | None = None

    @property
    def verdict(self) -> str:
        if self.must is None:
            return ""
        return "stretch" if self.ratio >= self.stretch else "met" if self.ratio >= self.must else "MISSED"


def measure(stage: Stage, windows: int, seconds_now: Callable[[], float], with_goals: bool = True,
            peak_of: Callable[[str], float] | None = None) -> list[Row]:
    """Every side in turn, `windows` times, after one round that only warms up.

    seconds_now: the clock, as of `limits.clock`.
    peak_of: operations a second in the precision that a side of ours is named by, for the limit of what trains.
    """
    seconds: dict[str, list[float]] = {name: [] for name in (*stage.baselines, *stage.ours)}
    for window in range(windows + 1):
        for name, work in (*stage.baselines.items(), *stage.ours.items()):
            start = seconds_now()
            work()
            if window:
                seconds[name].append(seconds_now() - start)
    rates = {name: stage.images / median(values) for name, values in seconds.items()}
    rows = []
    for against in stage.baselines:
        for ours in stage.ours:
            goal_set = with_goals and against == stage.goal_against
            must, stretch = stage.goals.get(ours, (None, None)) if goal_set else (None, None)
            limit = peak_of(ours.partition(",")[0]) / stage.flops if peak_of and stage.flops else None
            rows.append(Row(stage.name, ours, against, rates[against], rates[ours], rates[ours] / rates[against],
                            must, stretch, limit))
    return rows


def line(row: Row) -> str:
    limit = f"{row.limit:>11,.0f} {row.our_rate / row.limit:>6.0%}" if row.limit else f"{'':>18}"
    goals = f"{row.must:>6g} {row.stretch:>8g}  {row.verdict}" if row.must is not None else ""
    return (f"{row.stage:<18} {row.ours:<16} {row.against:<6} {row.baseline_rate:>11,.0f} {row.our_rate:>11,.0f} "
            f"{row.ratio:>6.2f} {limit} {goals}").rstrip()


HEADER = (f"{'stage':<18} {'ours':<16} {'versus':<6} {'its img/s':>11} {'our img/s':>11} {'ratio':>6} "
          f"{'limit img/s':>11} {'of it':>6} {'must':>6} {'stretch':>8}")


@click.command(help=__doc__.partition("\n\n")[2])
@click.option("--stages", multiple=True, type=click.Choice(list(ALL_STAGES)), help="Only these; may be repeated.")
@click.option("--nad-checkout", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="A checkout of the NAD authors' repository, to be measured as well.")
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]),
              help=f"cuda: what trains victims, at full size: {', '.join(ON_GPU)}.")
@click.option("--windows", default=5, show_default=True, type=click.IntRange(1), help="Timed rounds per stage.")
@click.option("--quick", is_flag=True, help="Tiny sizes: shows that it runs, its rates mean nothing.")
@click.option("--json", "output", type=click.Path(dir_okay=False, path_type=Path), help="Write the rows here too.")
def main(stages: tuple[str, ...], nad_checkout: Path | None, device: str, windows: int, quick: bool,
         output: Path | None) -> None:
    torch.set_num_threads(1)
    place = torch.device(device)
    if device == "cuda":
        if not torch.cuda.is_available():
            raise click.UsageError("no CUDA device here: leave --device out")
        if nad_checkout or set(stages) - set(ON_GPU):
            raise click.UsageError(f"on a GPU there are the stages {', '.join(ON_GPU)}, without the authors' code")
        stages = stages or ON_GPU
    repeatable(place)
    bench = Bench(QUICK if quick else GPU if device == "cuda" else Sizes(), nad_checkout, place)
    peak_of = cache(lambda precision: peak(place, precision, 64 if quick else None))
    rows: list[Row] = []
    click.echo(HEADER)
    try:
        for name in stages or ALL_STAGES:
            for stage in ALL_STAGES[name](bench):
                measured = measure(stage, windows, clock(place), not quick and device == "cpu", peak_of)
                rows += measured
                click.echo("\n".join(map(line, measured)))
    except UserError as error:
        raise click.UsageError(str(error)) from error
    if output:
        environment = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine(),
                       "capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
                       "device": torch.cuda.get_device_name() if device == "cuda" else device}
        output.write_text(json.dumps({"environment": environment, "quick": quick, "windows": windows,
                                      "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:      # read when a process starts, so this one starts again
        with threaded():
            os.execv(sys.executable, sys.orig_argv)
    main()
