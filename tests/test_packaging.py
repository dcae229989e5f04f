"""The environment and the scripts: what a stranger's machine meets first."""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ("run_all.sh", "run_tests.sh", ".ci/run")
CONDA_NAMES = {"torch": "pytorch"}
LOCK = (ROOT / "requirements.lock").read_text()


def requirement(line: str) -> tuple[str, tuple[int, ...]]:
    """("torch", (2, 11)) for "torch>=2.11": ranges here are lower bounds."""
    name, bound = re.fullmatch(r"([a-z0-9-]+)>=([0-9.]+)", line).groups()
    return name, version(bound)


def version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def declared() -> dict[str, tuple[int, ...]]:
    """Direct dependencies with lower bounds, from pyproject.toml; `hub` is left out of the lock on purpose."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return dict(map(requirement, project["dependencies"] + project["optional-dependencies"]["test"]))


def locked() -> dict[str, str]:
    """Exact versions by name, from requirements.lock."""
    return dict(re.findall(r"^([a-z0-9-]+)==([^\s;]+)", LOCK, re.M))


def tracked_text() -> list[tuple[str, str]]:
    """(path, text) of each text file of the project: the tracked ones, or all of them outside a git checkout."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    names = [n for n in listing.stdout.decode().split("\0") if n] if listing.returncode == 0 else []
    if not names:
        hidden = {".git", ".venv", "data", "results", "__pycache__"}
        names = [str(p.relative_to(ROOT)) for p in ROOT.rglob("*")
                 if p.is_file() and not hidden.intersection(p.relative_to(ROOT).parts)]
    texts = []
    for name in names:
        path = ROOT / name
        if path.is_file() and path.stat().st_size < 5_000_000:
            content = path.read_bytes()
            if b"\0" not in content[:4096]:
                texts.append((name, content.decode("utf-8", "replace")))
    return texts


# ---------------------------------------------------------------- dependencies

def test_lock_satisfies_pyproject() -> None:
    for name, bound in declared().items():
        assert name in locked(), f"{name} is not in requirements.lock"
        assert version(locked()[name]) >= bound, name
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert all(line in LOCK for line in project["optional-dependencies"]["minilm"])


def test_environment_yml_has_the_same_ranges() -> None:
    text = (ROOT / "environment.yml").read_text()
    lines = re.findall(r"^  - (\S+)$", text, re.M)
    conda = dict(requirement(line) for line in lines if line not in ("conda-forge", "pip", "pip:"))
    python = conda.pop("python")
    assert conda == {CONDA_NAMES.get(name, name): bound for name, bound in declared().items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={python[0]}.{python[1]}"
    # What conda does not have is installed by pip inside of it.
    assert re.findall(r"^      - (\S+)$", text, re.M) == project["optional-dependencies"]["minilm"]


def test_every_lock_entry_is_pinned_once_and_hashed() -> None:
    entries = [e for e in re.split(r"(?m)^(?=[a-z0-9])", LOCK) if not e.startswith("#")]
    assert len(entries) == len(locked())
    for entry in entries:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry.splitlines()[0]


def test_no_package_index_is_named_anywhere() -> None:
    # Spelt in two halves so that this file passes its own test.
    forbidden = re.compile("|".join((r"index" r"-url\s*[= ]\s*\S*:", r"file" r"thonhosted", r"pypi" r"\.org/simple",
                                     r"find" r"-links", r"download\.py" r"torch\.org")))
    found = {name: m.group() for name, text in tracked_text() if (m := forbidden.search(text))}
    assert not found


# ---------------------------------------------------------------- scripts

@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_executable_and_parse(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / script], check=True)
    assert "set -euo pipefail" in (ROOT / script).read_text()


def run(script: Path, *arguments: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([script, *arguments], cwd=cwd, env=environment(**variables), text=True, capture_output=True,
                          stdin=subprocess.DEVNULL)


def environment(**variables: str) -> dict[str, str]:
    """Ours without what the scripts look at, and `variables`."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "BACKDOOR_VENV", "PYTHONPATH")}
    return {**kept, **variables}


def stub(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The scripts with a program that prints its arguments and exits with 7, and nothing to install."""
    root = tmp_path / "a path with spaces"
    (root / "reproduce").mkdir(parents=True)
    for name in ("run_all.sh", "run_tests.sh", "scripts"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, root / name)
    (root / "requirements.lock").touch()
    (root / "reproduce" / "__init__.py").touch()
    (root / "reproduce" / "__main__.py").write_text("import sys\nprint(*sys.argv[1:], sep='|')\nsys.exit(7)\n")
    return root


@pytest.fixture
def quick_python(tmp_path: Path) -> str:
    """A Python whose environments hold, instead of pip (seconds to unpack), one that installs nothing and refuses
    lines without a hash."""
    pip = "import sys; sys.exit('no-hash' in open(sys.argv[-1]).read())"
    return stub(tmp_path / "quick python", f"""
case "$1 $2" in
    "-m venv")
        "{sys.executable}" -m venv --without-pip "$3"
        for site in "$3"/lib/python3.*/site-packages; do echo "{pip}" > "$site/pip.py"; done ;;
    *) exec "{sys.executable}" "$@" ;;
esac""")


def stamp(project: Path) -> str:
    return (project / ".venv" / "backdoor-erasure.lock").read_text().strip()


def lock_digest(project: Path) -> str:
    return hashlib.sha256((project / "requirements.lock").read_bytes()).hexdigest()


def test_first_run_builds_the_environment_and_the_second_reuses_it(project: Path, tmp_path: Path) -> None:
    (tmp_path / "reproduce.py").write_text("raise SystemExit('the wrong reproduce')")
    first = run(project / "run_all.sh", "--paper", "nad argd", "--dry-run", "--graph", cwd=tmp_path)
    assert (first.returncode, first.stdout) == (7, "run|--paper|nad argd|--dry-run|--graph\n")
    assert len(first.stderr.splitlines()) == 1 and "Installing" in first.stderr
    assert stamp(project) == lock_digest(project)
    second = run(project / "run_all.sh", cwd=tmp_path)
    assert (second.returncode, second.stdout, second.stderr) == (7, "run\n", "")


def test_help_installs_nothing(project: Path) -> None:
    shutil.copy(ROOT / "README.md", project)
    for script, option, said in (("run_all.sh", "--help", "--dry-run"), ("run_tests.sh", "-h", "marked `slow`")):
        done = run(project / script, option)
        assert done.returncode == 0 and said in done.stdout and not (project / ".venv").exists()


def test_changed_lock_or_interrupted_install_is_rebuilt(project: Path, quick_python: str) -> None:
    assert run(project / "run_all.sh", PYTHON=quick_python).returncode == 7
    leftover = project / ".venv" / "leftover"
    for spoil in (lambda: (project / "requirements.lock").write_text("# newer\n"),
                  lambda: (project / ".venv" / "backdoor-erasure.lock").write_text(""),
                  lambda: (project / ".venv" / "bin" / "python").unlink()):
        leftover.touch()
        spoil()
        assert "Installing" in run(project / "run_all.sh", PYTHON=quick_python).stderr
        assert stamp(project) == lock_digest(project) and not leftover.exists()


def test_environment_made_by_hand_is_completed_in_place(project: Path, quick_python: str) -> None:
    subprocess.run([quick_python, "-m", "venv", project / ".venv"], check=True)
    kept = project / ".venv" / "kept"
    kept.touch()
    assert run(project / "run_all.sh").returncode == 7
    assert kept.exists() and stamp(project) == lock_digest(project)


def test_failed_install_is_reported_and_not_taken_for_complete(project: Path, quick_python: str) -> None:
    (project / "requirements.lock").write_text("no-hash-here==1.0\n")
    failed = run(project / "run_all.sh", PYTHON=quick_python)
    assert failed.returncode == 1 and "installation failed" in failed.stderr.splitlines()[-1]
    (project / "requirements.lock").write_text("")
    assert run(project / "run_all.sh", PYTHON=quick_python).returncode == 7


def test_simultaneous_first_runs_build_once(project: Path, quick_python: str) -> None:
    runs = [subprocess.Popen([project / "run_all.sh"], env=environment(PYTHON=quick_python), text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    messages = [process.communicate()[1] for process in runs]
    assert [process.returncode for process in runs] == [7, 7, 7], messages
    assert sum("Installing" in message for message in messages) == 1


def test_a_folder_that_is_no_environment_is_left_alone(project: Path, tmp_path: Path) -> None:
    precious = tmp_path / "home" / "thesis.tex"
    precious.parent.mkdir()
    precious.touch()
    refused = run(project / "run_all.sh", BACKDOOR_VENV=str(precious.parent))
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1 and precious.exists()


@pytest.mark.parametrize("script", ["run_all.sh", "run_tests.sh"])
@pytest.mark.parametrize("option", [(), ("--no-install",)])
def test_old_python_is_refused_in_one_line(project: Path, tmp_path: Path, script: str, option: tuple[str, ...]) -> None:
    old = stub(tmp_path / "python3.8", "exit 1")
    refused = run(project / script, *option, PYTHON=old)
    assert refused.returncode == 2 and not (project / ".venv").exists()
    assert len(refused.stderr.splitlines()) == 1 and "3.11" in refused.stderr


@pytest.mark.parametrize("script", ["run_all.sh", "run_tests.sh"])
def test_no_install_names_what_is_missing(project: Path, tmp_path: Path, script: str) -> None:
    bare = stub(tmp_path / "bare", f'exec "{sys.executable}" -I -S "$@"')
    refused = run(project / script, "--no-install", PYTHON=bare)
    assert refused.returncode == 2 and not (project / ".venv").exists()
    assert len(refused.stderr.splitlines()) == 1 and "torch" in refused.stderr


def test_no_install_runs_where_nothing_is_missing(project: Path, tmp_path: Path) -> None:
    modules = re.search(r'modules="([^"]*)"', (ROOT / "scripts" / "environment.sh").read_text()).group(1).split()
    assert all(importlib.util.find_spec(name) for name in modules)
    empty = tmp_path / "empty"      # in their place, for these take seconds to import
    empty.mkdir()
    for name in modules:
        (empty / f"{name}.py").touch()
    done = run(project / "run_all.sh", "--no-install", "--nonsense", PYTHON=sys.executable, PYTHONPATH=str(empty))
    assert (done.returncode, done.stdout, done.stderr) == (7, "run|--nonsense\n", "")


def test_the_driver_does_without_what_takes_seconds_to_import() -> None:
    listing = ["run", "--profile", "quick", "--dry-run", "--results", "nowhere"]
    seen = (f"import atexit, sys, reproduce.cli; slow = {{'torchvision', 'torch._dynamo', 'transformers'}}; "
            f"atexit.register(lambda: print(sorted(slow & set(sys.modules)))); reproduce.cli.main({listing})")
    done = subprocess.run([sys.executable, "-c", seen], cwd=ROOT, text=True, capture_output=True, check=True)
    assert "about" in done.stdout and done.stdout.splitlines()[-1] == "[]"
