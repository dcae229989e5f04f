"""The report: tables, figures and claims as files, and one self-contained HTML page that shows them all.

Everything is computed from run folders and is the same, bit for bit, for the same runs: no clock, no random state.
"""

import base64
import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from reproduce import claims
from reproduce.cells import Victim, with_dependencies
from reproduce.engine import belong, start_method, threaded
from reproduce.protocols import PAPERS, Profile
from reproduce.results import Results
from tables import render
from tables.layout import legend

STATUSES = ("done", "failed", "damaged", "missing")
# Fields of environment.json that differ between runs of one machine and so do not tell environments apart.
PER_RUN = ("source", "finished", "made_from")


@dataclass(frozen=True)
class ReportSummary:
    """What the command line prints. main: the first paper's main table, empty without one; verdicts: claim, verdict;
    others: files beside its tables and figures that are not of this report, an earlier one's of more papers say."""

    page: Path
    main: str
    verdicts: tuple[tuple[str, str], ...]
    others: tuple[str, ...]
    done: int
    failed: int
    damaged: int
    missing: int

    @property
    def complete(self) -> bool:
        """Every run of the protocol is there."""
        return not (self.failed or self.damaged or self.missing)


@dataclass(frozen=True)
class Drawn:
    """A figure that is in its files."""

    name: str
    title: str
    caption: str


def write_report(results: Results, profile: Profile, folder: Path, command: str, processes: int = 1) -> ReportSummary:
    """Write tables/, figures/, claims.json and report.html below `folder`. command: what reproduces all this.

    processes: how many draw the figures, which takes most of the time, beside this one; 1 for none but this one.
    """
    papers = [paper for paper in PAPERS if any(entry.paper == paper for entry in results.entries)]
    with _drawing(results, papers, profile.smoke, folder / "figures", min(processes, len(papers))) as figures:
        chapters: list[dict[str, Any]] = []
        for paper in papers:
            built = importlib.import_module(f"tables.{paper}").tables(results, profile.smoke)
            for table in built:
                render.write(table, folder / "tables", profile)
            chapters.append({"paper": paper, "name": PAPERS[paper], "tables": built})
        found = claims.claims(results, profile)
        for chapter in chapters:
            chapter["figures"] = figures[chapter["paper"]]()
    claims.write(found, folder / "claims.json")
    runs = _runs(results)
    counted = Counter(run["status"] for run in runs)
    page = folder / "report.html"
    page.write_text(_page(folder, profile, command, chapters, found, runs, counted, results), encoding="utf-8")
    main = next((table for chapter in chapters for table in chapter["tables"]
                 if table.name == f"{chapter['paper']}-main"), None)
    own = {shown.name for chapter in chapters for kind in ("tables", "figures") for shown in chapter[kind]}
    others = tuple(sorted(path.name for kind in ("tables", "figures") for path in (folder / kind).glob("*")
                          if path.stem not in own))
    return ReportSummary(page, render.text(main, brief=True) if main else "",
                         tuple((claim.statement, claim.verdict) for claim in found), others,
                         *(counted[status] for status in STATUSES))


@contextmanager
def _drawing(results: Results, papers: list[str], smoke: bool, folder: Path,
             processes: int) -> Iterator[dict[str, Callable[[], list[Drawn]]]]:
    """By paper, what waits for its figures; they are drawn by other processes from now on, or only then by this one."""
    if processes < 2:
        yield {paper: partial(_draw, paper, results, smoke, folder) for paper in papers}
        return
    fresh = Results(results.store, results.entries)     # without what was read, which would have to travel
    with threaded(), ProcessPoolExecutor(processes, start_method(), belong) as pool:
        try:
            yield {paper: pool.submit(_draw, paper, fresh, smoke, folder).result for paper in papers}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _draw(paper: str, results: Results, smoke: bool, folder: Path) -> list[Drawn]:
    drawn = importlib.import_module(f"figures.{paper}").figures(results, smoke)
    for figure in drawn:
        figure.write(folder, smoke)
    return [Drawn(figure.name, figure.title, figure.caption) for figure in drawn]


def _runs(results: Results) -> list[dict[str, Any]]:
    """Every run of the protocol once, those included that others are made from: name, status, its places in the tables,
    seconds, and why it failed."""
    found: dict[str, dict[str, Any]] = {}
    for task in with_dependencies([entry.task for entry in results.entries]):
        run, status = results.run(task), results.status(task.name)
        lost = [need.name for need in task.needs() if found[need.name]["status"] == "failed"]
        if status == "missing" and lost:
            status, error = "failed", f"needs {lost[0]}, which failed"
        else:
            error = _error_line(results.store.failure(task.name) or "") if status == "failed" else ""
        found[task.name] = {"name": task.name, "status": status, "items": [], "error": error,
                            "seconds": run.json("metrics")["seconds"] if run else None,
                            "environment": run.json("environment") if run else {}}
    for entry in results.entries:
        labels = " / ".join(str(value) for value in entry.labels.values())
        found[entry.task.name]["items"].append(f"{entry.item}: {labels}, seed {entry.task.seed}")
    return list(found.values())


def _error_line(traceback: str) -> str:
    """The line of a traceback that names the error: the first unindented one after its last frame; what follows belongs
    to the message."""
    lines = traceback.splitlines()
    frame = max((i for i, line in enumerate(lines) if line.startswith(("  File ", "Traceback"))), default=-1)
    return next((line for line in lines[frame + 1:] if line.strip() and not line.startswith((" ", "\t"))), "")


def _environments(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Distinct environments of the finished runs, with how many runs, their seconds and the days they finished on."""
    groups: dict[tuple[tuple[str, str], ...], list[dict[str, Any]]] = {}
    for run in runs:
        if run["environment"]:
            key = tuple((field, str(value)) for field, value in sorted(run["environment"].items())
                        if field not in PER_RUN)
            groups.setdefault(key, []).append(run)
    found = []
    for fields, members in groups.items():
        dates = sorted(str(run["environment"].get("finished", "")) for run in members)
        found.append({"fields": dict(fields), "count": len(members), "first": dates[0], "last": dates[-1],
                      "seconds": sum(run["seconds"] for run in members)})
    return found


def _victims(results: Results) -> list[Victim]:
    """The victim of each of the protocol's runs."""
    return [victim for entry in results.entries if (victim := getattr(entry.task, "victim", None))]


def _page(folder: Path, profile: Profile, command: str, chapters: list[dict[str, Any]], found: list[claims.Claim],
          runs: list[dict[str, Any]], counted: Counter, results: Results) -> str:
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True, undefined=StrictUndefined)

    def shown(figure: Drawn) -> dict[str, str]:
        png = base64.b64encode((folder / "figures" / f"{figure.name}.png").read_bytes()).decode()
        return {"name": figure.name, "title": figure.title, "caption": figure.caption, "png": png}

    victims = _victims(results)
    measures = {measure for chapter in chapters for table in chapter["tables"]
                for measure in table.data.get("measure", ())}
    return environment.get_template("report.html.j2").render(
        profile=profile, smoke=profile.smoke, command=command, claims=found,
        subjects=list(dict.fromkeys((victim.dataset, victim.model) for victim in victims)) or [
            (profile.dataset, profile.model)],
        trained=not victims or any(victim.published is None for victim in victims),
        seeds=sorted({entry.task.seed for entry in results.entries}),
        chapters=[{"name": chapter["name"], "paper": chapter["paper"],
                   "tables": [{"name": table.name, "title": table.title,
                               "html": Markup(render.html(table, profile, legend=False))}
                              for table in chapter["tables"]],
                   "figures": [shown(figure) for figure in chapter["figures"]]}
                  for chapter in chapters],
        runs=runs, counted={status: counted[status] for status in STATUSES}, environments=_environments(runs),
        total=len(runs), legend=legend(measures))
