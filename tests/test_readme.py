"""Every command that the README and docs/results.md give is run, as written but for what is named below; their tables
are those under reference/."""

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from reproduce import report
from reproduce.cells import with_dependencies
from reproduce.cli import main
from reproduce.engine import expected
from reproduce.models import build
from reproduce.protocols import PAPERS, PROFILES, entries
from reproduce.store import Store
from tests.defenses.text_victim import save_suspect
from tests.reproduce.generators import save_style_transfer
from tests.reproduce.small_texts import save_small_texts

ROOT = Path(__file__).parent.parent
README, RESULTS = (ROOT / name for name in ("README.md", "docs/results.md"))
WRITTEN = README.read_text() + RESULTS.read_text()
FINDINGS = (ROOT / "docs" / "findings.md").read_text()
COMMANDS = [line for block in re.findall(r"```\n(.*?)```", WRITTEN, re.DOTALL) for line in block.splitlines() if line]
DRIVER = [command for command in COMMANDS if command.startswith("./run_all.sh")]
CHECKPOINT = [command for command in COMMANDS if re.match(r"python -m reproduce (evaluate|defend)", command)]
PURIFY = [command for command in COMMANDS if command.startswith("python -m reproduce purify")]
REBUILD = [command for command in COMMANDS if command.startswith("python -m reproduce report")]
PARAPHRASE = [command for command in COMMANDS if command.startswith("python -m reproduce paraphrase")]
COMPARE = [command for command in COMMANDS if command.startswith("python -m reproduce compare")]
# This file is part of what the last one runs.
ALL = [*DRIVER, *CHECKPOINT, *PURIFY, *PARAPHRASE, *REBUILD, *COMPARE, "./run_tests.sh"]


def run(command: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """The command in a shell's words, with this Python: in this process and in `folder` if it is Python's, else where
    the scripts are, with an environment in `folder` that is there already."""
    words = shlex.split(command)
    if words[0] == "python":
        assert words[1:3] == ["-m", "reproduce"]
        with contextlib.chdir(folder):
            done = CliRunner().invoke(main, [*words[3:], *more], env={"CI": "true"})
        return subprocess.CompletedProcess(words, done.exit_code, done.stdout, done.stderr)
    environment = {**os.environ, "BACKDOOR_VENV": str(made_for_this_python(folder)), "CI": "true"}
    return subprocess.run([*words, *more], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)


def made_for_this_python(folder: Path) -> Path:
    """What `run_all.sh` takes for the environment that it made earlier; its Python is this one."""
    venv = folder / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (venv / "bin" / "python").chmod(0o755)
    lock = (ROOT / "requirements.lock").read_bytes()
    (venv / "backdoor-erasure.lock").write_text(hashlib.sha256(lock).hexdigest())
    return venv


def test_no_command_is_forgotten() -> None:
    assert sorted(COMMANDS) == sorted(ALL) and all((DRIVER, CHECKPOINT, PURIFY, PARAPHRASE, REBUILD, COMPARE))


@pytest.mark.parametrize("command", DRIVER)
def test_driver_commands_are_understood(command: str, tmp_path: Path) -> None:
    """With --dry-run, for some of them take a night; as what the script makes of them."""
    more = [] if "--help" in command or "--dry-run" in command else ["--dry-run"]
    done = run(command.replace("./run_all.sh", "python -m reproduce run"), tmp_path, *more)
    assert done.returncode == 0, done.stderr
    assert ("--profile" if "--help" in command else "runs, seeds") in done.stdout


def test_how_long_a_paper_takes(tmp_path: Path) -> None:
    def written(paper: str, profile: str) -> str:
        chosen = PROFILES[profile] if profile != "paper" else replace(PROFILES[profile], seeds=(0,))
        tasks = with_dependencies([entry.task for entry in entries(chosen, [paper])])
        hours = sum(expected(tasks, Store(tmp_path)).values()) / 3600
        return f"{len(tasks)} runs" + (f", {float(f'{hours:.2g}'):g} h" if profile != "quick" else "")

    for paper, title in PAPERS.items():
        assert " | ".join([f"| {title}", *(written(paper, profile) for profile in PROFILES)]) + " |" in WRITTEN


def test_the_first_command_on_a_few_runs(tmp_path: Path) -> None:
    """Of sentences; those of images are driven by `tests/reproduce/test_run.py`."""
    done = run("./run_all.sh", tmp_path, "--profile", "quick", "--seeds", "1", "--item", "deviations",
               "--results", str(tmp_path / "results"))
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "results" / "report.html").read_text()
    assert "badacts-deviations" in page


@pytest.mark.slow
def test_the_first_command_for_real(tmp_path: Path) -> None:
    done = run("./run_all.sh", tmp_path, "--profile", "quick", "--results", str(tmp_path / "results"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results" / "report.html").stat().st_size > 100_000


@pytest.mark.parametrize("command", CHECKPOINT)
def test_checkpoint_commands(command: str, tmp_path: Path) -> None:
    """On digits and a small untrained network, for CIFAR-10 is not everywhere."""
    torch.save({"state_dict": build("wrn-10-1", 10, 0).state_dict()}, tmp_path / "suspect.pth.tar")
    done = run(command.replace("cifar10", "digits").replace("wrn-16-1", "wrn-10-1"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{") and len(done.stdout.splitlines()) == 1
    assert (tmp_path / "repaired.safetensors").exists() == ("defend" in command)


@pytest.mark.parametrize("command", PURIFY)
def test_purify_command(command: str, tmp_path: Path) -> None:
    save_suspect(tmp_path)
    (tmp_path / "input.txt").rename(tmp_path / "suspicious.txt")
    done = run(command.replace("DIR", "model") + " --epochs 1", tmp_path)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "purified.jsonl").read_text().splitlines()) == 40


@pytest.mark.parametrize("command", PARAPHRASE)
def test_paraphrase_command(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a few sentences and a tiny generator."""
    save_style_transfer(tmp_path / "DIR")
    save_small_texts(tmp_path / "data", monkeypatch)
    done = run(command.replace("sst-2", "small"), tmp_path, "--data-root", str(tmp_path / "data"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sentences"] == 3


@pytest.mark.parametrize("command", REBUILD)
def test_reference_tables_and_verdicts_follow_from_the_stored_predictions(command: str, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the figures, which take longest and are drawn by other tests."""
    monkeypatch.setattr(report, "_drawing", lambda _results, papers, *_rest: contextlib.nullcontext(
        dict.fromkeys(papers, list)))
    folder = Path(shlex.split(command)[-1])
    tables, verdicts = folder / "tables", folder / "claims.json"
    shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.rmtree(tmp_path / tables)
    (tmp_path / verdicts).unlink()
    done = run(command, tmp_path)
    # 1 where the protocol lists more than was run; the report says so.
    assert done.returncode in (0, 1), done.stderr
    committed = {path.name: path.read_bytes() for path in (ROOT / tables).iterdir()}
    assert committed
    assert {path.name: path.read_bytes() for path in (tmp_path / tables).iterdir()} == committed
    assert (tmp_path / verdicts).read_text() == (ROOT / verdicts).read_text()


@pytest.mark.parametrize("command", COMPARE)
def test_results_are_compared_with_the_reference(command: str) -> None:
    done = run(command, ROOT)
    assert done.returncode == 0 and "runs computed twice" in done.stdout, done.stderr


def test_links_and_pictures_exist() -> None:
    for page in (README, RESULTS):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), target


def test_tables_are_the_reference_ones() -> None:
    """Every row of a table that has the headings of one of these."""
    known = {line for path in (ROOT / "reference").glob("*/tables/*.md") for line in path.read_text().splitlines()}
    tables = [lines for block in re.findall(r"(?:^\|.*\n)+", WRITTEN, re.MULTILINE)
              if (lines := block.splitlines())[0] in known]
    assert len(tables) == 8, "of three published checkpoints, the cross table and BadActs', both also in excess, FMP's"
    assert {line for lines in tables for line in lines} <= known


def test_published_values_and_what_they_became_are_the_reference_ones() -> None:
    known = set()
    for path in (ROOT / "reference" / "authors-victims" / "tables").glob("*-published.csv"):
        rows = pd.read_csv(path, comment="#").sort_values("measure", kind="stable")     # accuracy, then ASR
        for (source, what), part in rows.groupby(["source", "what"]):
            cells = [f"{row.published:.2f} | {row.text} | {row.verdict}" for row in part.itertuples()]
            known.add(f"| {source} | {what} | {' | '.join(cells)} |")
    shown = re.findall(r"^\| README of .*\|$", WRITTEN, re.MULTILINE)
    assert len(shown) == 8 and set(shown) <= known


def by_seed(runs: str, folder: Path, measure: str) -> dict[int, float]:
    """{seed: the measure} of these runs."""
    return {int(re.search(r"-s(\d+)-", name)[1]):
            json.loads((folder / "runs" / name / "metrics.json").read_text())[measure] for name in runs.split()}


def test_numbers_seed_by_seed_in_the_findings_are_the_reference_ones() -> None:
    """Of the table over two seeds of one victim, and of FMP's on a narrow network but for another machine's column."""
    def rows(heading: str) -> list[list[str]]:
        block = FINDINGS[FINDINGS.index(heading):].split("\n\n")[0]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()[2:]]

    folder = ROOT / "reference" / "cross"
    table = pd.read_csv(folder / "tables" / "cross-asr.csv", comment="#", keep_default_na=False)
    runs = table[table.attack == "BadNets"].set_index("defense").runs
    shown = rows("| ASR (ACC) at seeds 0 and 1 |")
    assert len(shown) == 10
    for defense, *cells in shown:
        asr, acc = (by_seed(runs[defense], folder, measure) for measure in ("asr", "acc"))
        assert cells[:2] == [f"{asr[seed]:.1f} ({acc[seed]:.1f})" for seed in (0, 1)], defense

    folder = ROOT / "reference" / "fmp"
    table = pd.read_csv(folder / "tables" / "fmp-main-complete.csv", comment="#", keep_default_na=False)
    runs = table[table.measure == "asr"].set_index(["attack", "defense", "settings"]).runs
    rows_of = {"before": ("Before", "-"), "FP as released by the bench": ("FP", "released"),
               "FT-SAM": ("FT-SAM", "released"), "RNP": ("RNP", "released"),
               "fine-tuning alone (FMP without its pruning)": ("FMP, no pruning", "described"),
               "as many maps at random": ("FMP, random maps", "described"),
               "as many maps, the least active ones": ("FMP, least active maps", "described"),
               "FMP as described": ("FMP", "described"), "FMP as released": ("FMP", "released"),
               "its fine-tuning alone, as released": ("FMP, no pruning", "released")}
    shown = rows("| | BadNets, seeds 0, 1, 2: ASR | ACC |")
    assert len(shown) == 16
    elsewhere = ROOT / "reference" / "fmp-second"
    for label, *cells in shown:
        first = runs[("BadNets", *rows_of.get(label, (label, "described")))].split()[0]
        there = elsewhere / "runs" / first / "metrics.json"
        assert cells[2] == (f"{json.loads(there.read_text())['asr']:.1f}" if there.exists() else ""), label
        for attack, seeds, (asr, acc) in (("BadNets", (0, 1, 2), cells[:2]), ("Blended", (0, 2), cells[3:])):
            name = runs.get((attack, *rows_of.get(label, (label, "described"))), "")
            values = by_seed(name, folder, "asr")
            wanted = ", ".join(f"{values[seed]:.1f}" if seed in values else "-" for seed in seeds) if values else ""
            accuracy = list(by_seed(name, folder, "acc").values())
            assert asr == wanted, (label, attack)
            assert acc == (f"{sum(accuracy) / len(accuracy):.1f}" if accuracy else ""), (label, attack)


def test_verdicts_are_the_reference_ones() -> None:
    shown = re.findall(r"^\| .* \| (?:supported|not supported|inconclusive) \|$", WRITTEN, re.MULTILINE)
    found = [claim for path in (ROOT / "reference").glob("*/claims.json") for claim in json.loads(path.read_text())]
    known = {f"| {claim['statement']} | {claim['evidence']} | {claim['verdict']} |" for claim in found}
    assert shown and set(shown) <= known
