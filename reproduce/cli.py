"""The command line: `python -m reproduce run | report | status | export | compare | evaluate | defend | purify`.

A wrong argument, file or configuration is one line on stderr and exit code 2. A run that failed is exit code 1.
"""

import dataclasses
import errno
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from reproduce import data, models
from reproduce.agreement import agreement
from reproduce.cells import NONE, Task, Victim, with_dependencies
from reproduce.data.texts import SOURCES, SPLITS
from reproduce.engine import Workers, check_data, execute, expected, unfinished
from reproduce.errors import UserError
from reproduce.models.encoder import LAYERS
from reproduce.models.paraphraser import TOP_P
from reproduce.paraphrase import Paraphrasing
from reproduce.paraphrase import paraphrase as paraphrase_texts
from reproduce.plugins import PROJECT
from reproduce.poisoning import attack_module
from reproduce.protocols import PAPERS, PROFILES, Entry, Profile, entries
from reproduce.purify import Purification
from reproduce.purify import purify as purify_sentences
from reproduce.repair import Repair, Suspect, evaluate_suspect, repair_suspect, usable_devices
from reproduce.repair_texts import evaluate_text_suspect, repair_text_suspect
from reproduce.report import write_report
from reproduce.results import Results
from reproduce.store import Store

GPU_JOBS = 4  # a WRN-16-1 leaves most of a modern card idle
_FULL = "make room there; finished runs are kept, and the same command goes on from here"
_CLOSED = "name another place, or change who may read and write there"
ADVICE = {errno.ENOSPC: _FULL, errno.EDQUOT: _FULL, errno.EACCES: _CLOSED, errno.EPERM: _CLOSED, errno.EROFS: _CLOSED}


class Commands(click.Group):
    """Prints a UserError, or an argument click refuses, as one line; exit code 2."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        try:
            code = super().main(*arguments, **{**options, "standalone_mode": False})
        except getattr(click.exceptions, "NoArgsIsHelpError", ()) as error:     # since click 8.2
            click.echo(error.format_message(), err=True)
            sys.exit(2)
        except (UserError, click.ClickException) as error:
            message = error.format_message() if isinstance(error, click.ClickException) else str(error)
            if found := getattr(error, "found", None):
                click.echo(json.dumps(found))
            click.echo(f"error: {' '.join(message.split())}", err=True)
            sys.exit(2)
        except OSError as error:
            # A full disk, or a reader that went away: nothing more can be said there, not even by Python at its end.
            advice = ADVICE.get(error.errno, "")
            click.echo(f"error: {' '.join(str(error).split())}{advice and ': '}{advice}", err=True)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(2)
        except (KeyboardInterrupt, click.Abort):
            click.echo("interrupted: finished runs are kept; the same command goes on from here", err=True)
            sys.exit(130)
        sys.exit(code if isinstance(code, int) else 0)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Do backdoor defenses really work? Reproduce the papers, or repair a checkpoint of your own."""


@dataclass(frozen=True)
class Selection:
    """Which part of which protocol, and where its results are."""

    profile_name: str | None = None
    papers: tuple[str, ...] = ()
    items: tuple[str, ...] = ()
    attacks: tuple[str, ...] = ()
    defenses: tuple[str, ...] = ()
    seeds: int | None = None
    folder: Path | None = None
    precision: str = "fp32"
    encoder: str | None = None

    @property
    def why(self) -> str:
        """Why this profile."""
        if self.profile_name:
            return "chosen"
        return "the default where CUDA is present" if torch.cuda.is_available() else "the default without CUDA"

    @property
    def profile(self) -> Profile:
        name = self.profile_name or ("paper" if torch.cuda.is_available() else "quick")
        profile = dataclasses.replace(PROFILES[name], precision=self.precision)
        if self.encoder and self.encoder != profile.encoder:
            note = f"{profile.note}, but for {self.encoder} as the encoder of texts"
            profile = dataclasses.replace(profile, encoder=self.encoder, note=note)
        if alone := "; ".join((*self.attacks, *self.defenses)):
            profile = dataclasses.replace(profile, only=f"nothing but {alone}", note=f"{profile.note}; only {alone}")
        return dataclasses.replace(profile, seeds=tuple(range(self.seeds))) if self.seeds else profile

    def entries(self, profile: Profile) -> list[Entry]:
        return entries(profile, list(self.papers or PAPERS), self.items, self.attacks, self.defenses)

    @property
    def place(self) -> Path:
        return self.folder or PROJECT / "results" / self.profile.name


def options(*decorators: Callable) -> Callable:
    """Several click options as one decorator."""
    def decorate(function: Callable) -> Callable:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function
    return decorate


SELECTION = options(
    click.option("--profile", "profile_name", type=click.Choice(list(PROFILES)), help="Scale; default: paper where "
                 "CUDA is present, else quick."),
    click.option("--paper", "papers", multiple=True, type=click.Choice(list(PAPERS)), help="Only these; repeatable."),
    click.option("--item", "items", multiple=True, help="Only these tables (main, clean-fraction, ...); repeatable."),
    click.option("--attack", "attacks", multiple=True, help="Only these attacks, as tables name them; repeatable."),
    click.option("--defense", "defenses", multiple=True, help="Only these defenses, as tables name them, and the "
                 "victims before any; repeatable."),
    click.option("--seeds", type=click.IntRange(1, 100), help="Seeds 0 to N-1; default: the profile's."),
    click.option("--results", "folder", type=click.Path(file_okay=False, path_type=Path),
                 help="Where results go; default: results/<profile>."),
    click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True,
                 help="bf16: about 1.5 times faster; other numbers, kept apart from fp32's."),
    click.option("--encoder", help=f"Encoder of the text papers: {', '.join(LAYERS)}, or another on the hub or in "
                 "<data root>/models; default: the profile's."),
)
DATA_ROOT = click.option("--data-root", type=click.Path(file_okay=False, path_type=Path),
                         help="Where data sets are; default: $BACKDOOR_DATA, else ./data.")
HARDWARE = options(
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
    click.option("--threads", type=click.IntRange(1, 256), default=1, show_default=True, help="CPU threads of a "
                 "process; more than one pays only where nothing else runs, and rounds differently."),
)


@main.command()
@SELECTION
@DATA_ROOT
@HARDWARE
@click.option("--jobs", type=click.IntRange(1, 1024), help="Processes; default: as many as cores have --threads, 4 "
              "per GPU.")
@click.option("--graph/--no-graph", default=False, help="Capture training steps in CUDA graphs (GPU only).")
@click.option("--dry-run", is_flag=True, help="List what would run, what is cached, and the estimated time.")
def run(data_root: Path | None, device: str, threads: int, jobs: int | None, graph: bool, dry_run: bool,
        **selected: Any) -> int:
    """Run what is missing of a profile, then write its tables, figures, claims and report."""
    selection = Selection(**selected)
    profile, folder = dataclasses.replace(selection.profile, graph=graph), selection.place
    devices = usable_devices(device)
    jobs = jobs or (max((os.cpu_count() or 1) // threads, 1) if devices == ("cpu",) else GPU_JOBS * len(devices))
    results = Results(Store(folder), selection.entries(profile))
    tasks = with_dependencies([entry.task for entry in results.entries])
    click.echo(f"profile {profile.name} ({selection.why}): {profile.note}")
    click.echo(f"{len(tasks)} runs, seeds {', '.join(map(str, profile.seeds))}, {_processes(jobs)}"
               f"{f' of {threads} threads' if threads > 1 else ''} on {', '.join(devices)}, results in {folder}")
    if dry_run:
        _list(tasks, results.store, jobs)
        return 0
    root = data.data_root(data_root)
    check_data(tasks, root)
    _check_writable(folder, "--results")
    results.store.sweep()
    started = time.monotonic()
    outcome = execute(tasks, Workers(folder, root, jobs, devices, threads), lambda line: click.echo(line, err=True))
    click.echo(f"{len(outcome.done)} computed, {len(outcome.reused)} reused, {len(outcome.failed)} failed in "
               f"{_duration(time.monotonic() - started)}", err=True)
    return _report(results, profile, folder)


@main.command()
@SELECTION
def report(**selected: Any) -> int:
    """Write tables, figures, claims and report from the runs that are there; computes nothing."""
    selection = Selection(**selected)
    results = Results(Store(selection.place), selection.entries(selection.profile))
    _check_holds_runs(results)
    _check_writable(selection.place, "--results")
    return _report(results, selection.profile, selection.place)


@main.command()
@SELECTION
def status(**selected: Any) -> None:
    """Say of every run whether it is done, failed, damaged or missing."""
    selection = Selection(**selected)
    store = Store(selection.place)
    for task in with_dependencies([entry.task for entry in selection.entries(selection.profile)]):
        click.echo(f"{store.status(task.name):8} {task.name}")


@main.command()
@SELECTION
@click.option("--into", required=True, type=click.Path(file_okay=False, path_type=Path), help="Where the copy goes.")
@click.option("--no-weights", is_flag=True, help="Leave out the victims' weights and triggers too.")
def export(into: Path, no_weights: bool, **selected: Any) -> int:
    """Copy finished runs, victims with their weights and defenses without, and write their report: for publishing.

    Triggers that only the victim's training needed are left out: they are large, and the seed gives them again.
    """
    selection = Selection(**selected)
    profile = selection.profile
    results = Results(Store(selection.place), selection.entries(profile))
    _check_holds_runs(results)
    _check_writable(into, "--into")
    for task in with_dependencies([entry.task for entry in results.entries]):
        found = results.store.find(task.name)
        if found:
            left_out = ["model.safetensors", "trigger.safetensors"]
            if isinstance(task, Victim) and not no_weights:
                trained = task.attack != NONE and hasattr(attack_module(task.attack), "TRAINING_ONLY")
                left_out = ["trigger.safetensors"] if trained else []
            Store(into).adopt(found, tuple(left_out))
    return _report(Results(Store(into), results.entries), profile, into)


@main.command()
@click.option("--results", "here", required=True, type=click.Path(file_okay=False, path_type=Path),
              help="A results folder, yours for example.")
@click.option("--with", "there", required=True, type=click.Path(file_okay=False, path_type=Path),
              help="Another one, such as reference/nad.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def compare(here: Path, there: Path, as_json: bool) -> None:
    """Set the runs that two results folders share side by side: ACC, ASR, and how many predictions are the same."""
    found = agreement(here, there)
    click.echo(json.dumps(dataclasses.asdict(found)) if as_json else "\n".join(found.lines()))


PLACES = ("--results", "--into", "--data-root")


def _list(tasks: list[Task], store: Store, jobs: int) -> None:
    took, left, waiting = expected(tasks, store), 0.0, unfinished(tasks, store)
    for task in tasks:
        state, seconds = store.status(task.name), took[task.name]
        if task.name in waiting:
            left += seconds
        if state == "done":
            state = "stripped" if task.name in waiting else "cached"
        click.echo(f"{state:8} {_duration(seconds):>8}  {task.name}")
    click.echo(f"about {_duration(left / jobs)} left with {_processes(jobs)}")


def _processes(jobs: int) -> str:
    return "1 process" if jobs == 1 else f"{jobs} processes"


def _report(results: Results, profile: Profile, folder: Path) -> int:
    summary = write_report(results, profile, folder, shlex.join(["./run_all.sh", *_portable(sys.argv[2:])]),
                           os.cpu_count() or 1)
    if summary.main:
        click.echo(f"\n{summary.main}")
    for claim, verdict in summary.verdicts:
        click.echo(f"{verdict}: {claim}")
    click.echo(f"\ntables  {folder / 'tables'}\nfigures {folder / 'figures'}\nclaims  {folder / 'claims.json'}\n"
               f"report  {summary.page}")
    if summary.others:
        click.echo(f"beside them are {len(summary.others)} files of another report ({summary.others[0]}, say), which "
                   "this one leaves as they are", err=True)
    if not summary.complete:
        click.echo(f"{summary.failed} runs failed, {summary.damaged} are damaged, {summary.missing} are missing: the "
                   "report lists them", err=True)
        return 1
    return 0


def _portable(arguments: list[str]) -> list[str]:
    """The arguments that somebody else needs for the same runs: without this machine's folders."""
    kept, skip = [], False
    for argument in arguments:
        name = argument.split("=")[0]
        if not skip and name not in PLACES and name != "--no-weights":
            kept.append(argument)
        skip = not skip and name in PLACES and "=" not in argument
    return kept


def _check_holds_runs(results: Results) -> None:
    """A report of nothing would take the place of the one that is there."""
    store = results.store
    there = {*store.names(), *store.failures()}
    if not there:
        raise UserError(f"{store.root} holds no runs: name the --results folder of a run_all.sh")
    tasks = with_dependencies([entry.task for entry in results.entries])
    if there.isdisjoint(task.name for task in tasks):
        raise UserError(f"none of the {len(there)} runs in {store.root} is one of these {len(tasks)}: name the "
                        "--profile, --paper, --item, --attack, --defense, --encoder and --precision that they were "
                        "made with")


def _check_writable(folder: Path, option: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(f"{option} {folder} cannot be written ({error.strerror}); name another folder") from error


def _duration(seconds: float) -> str:
    seconds = round(seconds)
    if seconds < 120:
        return f"{seconds} s"
    return f"{seconds // 60} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class Finite(click.FloatRange):
    """A number in a range; "nan", which compares with nothing, and "inf" are not."""

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> float:
        number = super().convert(value, param, context)
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number.", param, context)
        return number


SUSPECT = options(
    click.option("--checkpoint", required=True, type=click.Path(path_type=Path),
                 help=".pth.tar, .pth or .safetensors; loaded without executing code."),
    click.option("--model", required=True, help=f"Its architecture: {', '.join((*models.ARCHITECTURES, *LAYERS))}."),
    click.option("--dataset", required=True, help=f"What it classifies: {', '.join(data.NUM_CLASSES)}."),
    click.option("--attack", help="The attack to test with: badnets, blend, ...; on texts addsent, stylebkd, ..."),
    click.option("--paper", default="nad", show_default=True, help="Whose settings of the attack and the defense."),
    click.option("--variant", default="released", show_default=True, help="described or released settings."),
    click.option("--target", type=int, help="Target label; default: the settings'."),
    click.option("--normalize", type=click.Choice(list(models.CHECKPOINT_NORMALISATIONS)),
                 help="Input normalisation the checkpoint was trained with; default: BackdoorBench's for its "
                 "architectures, preact-resnet-* and vgg-*, none for the others."),
    click.option("--clean-model", type=click.Path(path_type=Path), help="A clean checkpoint of the same architecture, "
                 "for attacks and teachers that need one."),
    click.option("--trigger", type=click.Path(path_type=Path), help="The attack's trigger.safetensors out of the "
                 "victim's run folder; default: prepared from --seed."),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else."),
    DATA_ROOT, HARDWARE,
)


@main.command()
@SUSPECT
def evaluate(as_json: bool, **suspect: Any) -> None:
    """ACC, ASR and RA of a checkpoint of your own."""
    wanted = Suspect(**suspect)
    _print((evaluate_text_suspect if _texts(wanted) else evaluate_suspect)(wanted), as_json)


@main.command()
@SUSPECT
@click.option("--defense", required=True, help="ft, fp, mcr, nad, ...")
@click.option("--defense-variant", help="Settings of the defense; default: as --variant.")
@click.option("--clean-fraction", type=Finite(0, 1, min_open=True),
              help="Share of the clean training images, default 0.05 (of --images: all are used), or of the validation "
                   "sentences, default 1.")
@click.option("--images", type=click.Path(path_type=Path), help="Your own clean images, one sub-folder per class, "
              "in place of the data set's.")
@click.option("--output", required=True, type=click.Path(dir_okay=False, path_type=Path),
              help="Where the repaired weights go, or what a defense of texts keeps (.safetensors).")
def defend(as_json: bool, defense: str, defense_variant: str | None, clean_fraction: float, images: Path | None,
           output: Path, **suspect: Any) -> None:
    """Repair a checkpoint of your own with a few clean images or sentences, and say what that did."""
    wanted, repair = Suspect(**suspect), Repair(defense, output, defense_variant, clean_fraction, images)
    _print((repair_text_suspect if _texts(wanted) else repair_suspect)(wanted, repair), as_json)


@main.command()
@click.option("--checkpoint", required=True, type=click.Path(path_type=Path),
              help="Folder of a fine-tuned BERT-style classifier as save_pretrained writes it; no code of it is run.")
@click.option("--clean", required=True, type=click.Path(path_type=Path),
              help="Clean sentences: a line each, sentence, tab, label.")
@click.option("--input", required=True, type=click.Path(path_type=Path), help="Sentences to look at, a line each.")
@click.option("--output", required=True, type=click.Path(dir_okay=False, path_type=Path),
              help="One JSON object per sentence goes here (.jsonl).")
@click.option("--frr", type=Finite(0, 1, min_open=True, max_open=True), default=0.2, show_default=True,
              help="Share of clean sentences that may be flagged.")
@click.option("--deviations", type=Finite(0, min_open=True), default=3.0, show_default=True,
              help="An activation further from its mean than so many standard deviations is abnormal.")
@click.option("--epochs", type=click.IntRange(1), default=50, show_default=True, help="Of the search for intervals.")
@click.option("--truncate", is_flag=True, help="Cut sentences that are too long for the model.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@HARDWARE
def purify(as_json: bool, epochs: int, **wanted: Any) -> None:
    """Score and purify sentences of your own with BadActs: label before, suspicion, flagged or not, label after."""
    quiet = as_json or not sys.stderr.isatty()
    with tqdm(total=epochs, disable=quiet, desc="searching intervals", unit="epoch") as bar:
        def observe(phase: str, epoch: int, count: int, _model: Any, _row: dict[str, float]) -> None:
            bar.set_description(phase)
            bar.update(epoch - bar.n)
        found = purify_sentences(Purification(epochs=epochs, **wanted), observe)
    _print(found, as_json)


@main.command()
@click.option("--generator", required=True, type=click.Path(path_type=Path),
              help="Folder of an encoder-decoder (T5, BART, ...) or of a style transfer GPT-2, as save_pretrained "
              "writes it; no code of it is run.")
@click.option("--attack", required=True, help="Whose trigger the paraphrases are: stylebkd or synbkd.")
@click.option("--dataset", required=True, help=f"The sentences: {', '.join(SOURCES)}.")
@click.option("--split", "splits", type=click.Choice(SPLITS), multiple=True, default=["test"], show_default=True,
              help="Repeatable; evaluating takes test alone.")
@click.option("--prompt", default="{text}", show_default=True, help="What an encoder-decoder is asked; {text} is the "
              "sentence.")
@click.option("--top-p", type=Finite(0, 1), default=TOP_P, show_default=True, help="0: the most probable token always.")
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@DATA_ROOT
@HARDWARE
def paraphrase(as_json: bool, **wanted: Any) -> None:
    """Rewrite a data set by a generator of your own, for the variant "generated" of an attack by paraphrases."""
    with tqdm(disable=as_json or not sys.stderr.isatty(), desc="rewriting", unit="sentence") as bar:
        def observe(done: int, count: int) -> None:
            bar.total = count
            bar.update(done - bar.n)
        found = paraphrase_texts(Paraphrasing(**wanted), observe)
    _print(found, as_json)


def _texts(suspect: Suspect) -> bool:
    return data.modality(suspect.dataset) == data.TEXT


def _print(values: dict[str, Any], as_json: bool) -> None:
    """One JSON object, or one line per value for people."""
    if as_json:
        click.echo(json.dumps(values))
        return
    for name, value in values.items():
        text = ", ".join(f"{key} {_short(v)}" for key, v in value.items()) if isinstance(value, dict) else _short(value)
        click.echo(f"{name:14} {text}")


def _short(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2f}" if value == 0 or abs(value) >= 0.1 else f"{value:.2g}"
