"""The report: complete, self-contained, honest about gaps, and the same bytes for the same runs."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from reproduce import cli, report
from reproduce.protocols import PROFILES
from reproduce.protocols import entries as protocol_entries
from reproduce.report import ReportSummary, write_report
from reproduce.results import Results
from reproduce.store import Store
from tests.synthetic import results

COMMAND = "./run_all.sh --profile quick <&>"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results(tmp_path_factory.mktemp("runs"), seeds=2, full=False)


@pytest.fixture(scope="module")
def summary(runs: Results, tmp_path_factory: pytest.TempPathFactory) -> ReportSummary:
    runs.store.fail("main-Refool-FP-described-s0",
                    "Traceback (most recent call last):\n  File \"x\"\nValueError: no <such> layer\n")
    return write_report(runs, PROFILES["quick"], tmp_path_factory.mktemp("report"), COMMAND)


def test_summary_counts_and_shows_the_main_table(summary: ReportSummary) -> None:
    assert (summary.done, summary.failed, summary.damaged, summary.missing) == (106, 1, 0, 1)
    assert not summary.complete
    assert "BadNets" in summary.main and "NAD (beta = 0)" in summary.main
    assert {verdict for _claim, verdict in summary.verdicts} == {"smoke scale: no verdict on the paper"}


def test_page_is_self_contained_and_well_formed(summary: ReportSummary) -> None:
    page = summary.page.read_text()
    for reference in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert reference.startswith(("data:image/png;base64,", "#")), reference[:60]
    assert "url(" not in page and "@import" not in page and "<script" not in page
    identifiers = re.findall(r'\bid="([^"]*)"', page)
    assert len(identifiers) == len(set(identifiers))
    assert {link[1:] for link in re.findall(r'href="(#[^"]*)"', page)} <= set(identifiers)
    Balanced().feed(page)


class Balanced(HTMLParser):
    """Fails on a tag closed out of turn."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag not in ("meta", "img", "br"):
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def test_page_names_gaps_profile_and_command(summary: ReportSummary) -> None:
    page = summary.page.read_text()
    assert "ValueError: no &lt;such&gt; layer" in page and "main-CL-MCR-described-s0" in page
    assert "./run_all.sh --profile quick &lt;&amp;&gt;" in page
    assert "Smoke scale" in page and "embedded digits" in page and "2026-01-01T00:00:00Z" in page
    assert "victims to 6 epochs" in page


def test_a_failed_run_that_others_need_is_shown_with_what_it_took_along(tmp_path: Path) -> None:
    entries = [entry for entry in protocol_entries(PROFILES["quick"], ["nad"], ["main"])
               if entry.labels["attack"] == "CL" and entry.task.seed == 0]
    found = Results(Store(tmp_path), entries)
    clean = entries[0].task.clean()
    found.store.fail(clean.name, "Traceback\nRuntimeError: no memory\n")
    summary = write_report(found, PROFILES["quick"], tmp_path, COMMAND)
    assert summary.failed == len({entry.task.name for entry in entries}) + 1 and summary.missing == 0
    page = summary.page.read_text()
    assert "RuntimeError: no memory" in page and f"needs {clean.name}, which failed" in page


def test_an_error_is_named_by_the_first_line_of_its_message() -> None:
    traceback = ("Traceback (most recent call last):\n  File \"a.py\", line 1, in f\n    g()\n  File \"b.py\", line 2, "
                 "in g\n    raise RuntimeError\nRuntimeError: out of memory\nCompile with `TORCH_USE_CUDA_DSA`\n\n")
    assert report._error_line(traceback) == "RuntimeError: out of memory" and report._error_line("") == ""


def test_files_are_written(summary: ReportSummary) -> None:
    folder = summary.page.parent
    assert (folder / "claims.json").exists()
    assert {path.suffix for path in (folder / "tables").iterdir()} == {".csv", ".md", ".tex", ".html"}
    assert {path.suffix for path in (folder / "figures").iterdir()} == {".pdf", ".png", ".csv"}


def test_same_runs_same_bytes_by_however_many_processes(runs: Results, tmp_path: Path) -> None:
    both = [other for entry in runs.entries if entry.item == "main" and entry.labels["attack"] == "BadNets"
            for other in (entry, replace(entry, paper="argd"))]
    for processes in (1, 2):
        write_report(Results(runs.store, both), PROFILES["quick"], tmp_path / str(processes), COMMAND, processes)
    alone, together = ({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
                       for folder in (tmp_path / "1", tmp_path / "2"))
    assert alone == together
    assert {path.stem.split("-")[0] for path in alone if path.suffix == ".png"} == {"nad", "argd"}


def test_files_of_another_report_are_left_and_named(summary: ReportSummary, tmp_path: Path, runs: Results) -> None:
    assert summary.others == ()
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/argd-main.md").write_text("mine")
    assert write_report(Results(runs.store, []), PROFILES["quick"], tmp_path, COMMAND).others == ("argd-main.md",)
    assert (tmp_path / "tables/argd-main.md").read_text() == "mine"


def test_empty_results_still_make_a_page(tmp_path: Path, runs: Results) -> None:
    summary = write_report(Results(runs.store, []), PROFILES["paper"], tmp_path, COMMAND)
    assert summary.main == "" and summary.complete and "No finished run" in summary.page.read_text()


def test_the_command_to_reproduce_names_no_folder_of_this_machine() -> None:
    arguments = ["--paper", "nad", "--results", "/mine", "--data-root=/data", "--into", "/there", "--no-weights",
                 "--seeds", "1"]
    assert cli._portable(arguments) == ["--paper", "nad", "--seeds", "1"]
