"""Measures every stage: python -m benchmarks.bench [--stages NAME ...] [--nad-checkout DIR] [--json FILE]

One process, one thread, the allocator settings of a worker of ours for every side; the sides of a stage take turns,
and each number is the median over windows of images (or sentences) per second of this process's own CPU time, so that
other jobs on the machine disturb it little.
"""

import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import click
import torch

from benchmarks.stages import QUICK, STAGES, Bench, Sizes, Stage
from benchmarks.text_stages import TEXT_STAGES
from reproduce.engine import threaded
from reproduce.errors import UserError

ALL_STAGES = STAGES | TEXT_STAGES


@dataclass(frozen=True)
class Row:
    """One comparison; rates in images, sentences or (FMP) feature maps per CPU-second; must and stretch are goals for
    the ratio, None where not set."""

    stage: str
    ours: str
    against: str
    baseline_rate: float
    our_rate: float
    ratio: float
    must: float | None
    stretch: float | None

    @property
    def verdict(self) -> str:
        if self.must is None:
            return ""
        return "stretch" if self.ratio >= self.stretch else "met" if self.ratio >= self.must else "MISSED"


def measure(stage: Stage, windows: int, with_goals: bool = True) -> list[Row]:
    """Every side in turn, `windows` times, after one round that only warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in (*stage.baselines, *stage.ours)}
    for window in range(windows + 1):
        for name, work in (*stage.baselines.items(), *stage.ours.items()):
            start = time.process_time()
            work()
            if window:
                seconds[name].append(time.process_time() - start)
    rates = {name: stage.images / median(values) for name, values in seconds.items()}
    rows = []
    for against in stage.baselines:
        for ours in stage.ours:
            goal_set = with_goals and against == stage.goal_against
            must, stretch = stage.goals.get(ours, (None, None)) if goal_set else (None, None)
            rows.append(Row(stage.name, ours, against, rates[against], rates[ours], rates[ours] / rates[against],
                            must, stretch))
    return rows


def line(row: Row) -> str:
    goals = (f"{row.must:>6g} {row.stretch:>8g}  {row.verdict}" if row.must is not None else "").rstrip()
    return (f"{row.stage:<18} {row.ours:<16} {row.against:<6} {row.baseline_rate:>11,.0f} {row.our_rate:>11,.0f} "
            f"{row.ratio:>6.2f} {goals}").rstrip()


HEADER = (f"{'stage':<18} {'ours':<16} {'versus':<6} {'its img/s':>11} {'our img/s':>11} {'ratio':>6} {'must':>6} "
          f"{'stretch':>8}")


@click.command(help=__doc__.partition("\n\n")[2])
@click.option("--stages", multiple=True, type=click.Choice(list(ALL_STAGES)), help="Only these; may be repeated.")
@click.option("--nad-checkout", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="A checkout of the NAD authors' repository, to be measured as well.")
@click.option("--windows", default=5, show_default=True, type=click.IntRange(1), help="Timed rounds per stage.")
@click.option("--quick", is_flag=True, help="Tiny sizes: shows that it runs, its rates mean nothing.")
@click.option("--json", "output", type=click.Path(dir_okay=False, path_type=Path), help="Write the rows here too.")
def main(stages: tuple[str, ...], nad_checkout: Path | None, windows: int, quick: bool, output: Path | None) -> None:
    torch.set_num_threads(1)
    bench = Bench(QUICK if quick else Sizes(), nad_checkout)
    rows: list[Row] = []
    click.echo(HEADER)
    try:
        for name in stages or ALL_STAGES:
            for stage in ALL_STAGES[name](bench):
                measured = measure(stage, windows, with_goals=not quick)
                rows += measured
                click.echo("\n".join(map(line, measured)))
    except UserError as error:
        raise click.UsageError(str(error)) from error
    if output:
        environment = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine(),
                       "capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
        output.write_text(json.dumps({"environment": environment, "quick": quick, "windows": windows,
                                      "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:      # read when a process starts, so this one starts again
        with threaded():
            os.execv(sys.executable, sys.orig_argv)
    main()
