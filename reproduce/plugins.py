"""Finding attacks and defenses: a plug-in is a file in `attacks/` or `defenses/`, found by its name."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from reproduce.errors import UserError

PROJECT = Path(__file__).resolve().parent.parent

def names(folder: Path) -> list[str]:
    """The plug-ins a folder holds, in alphabetical order."""
    return sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))


def settings_of(what: str, module: ModuleType, paper: str, variant: str, option: str = "--variant") -> Any:
    """The settings of a paper's variant, which `option` names. Where there are none raises UserError with those there
    are."""
    if (paper, variant) not in module.SETTINGS:
        known = ", ".join(f"--paper {p} {option} {v}" for p, v in module.SETTINGS)
        raise UserError(f"{what} has no settings for --paper {paper} {option} {variant}: choose {known}")
    return module.SETTINGS[paper, variant]


def plugins(package: str) -> list[ModuleType]:
    """All of "attacks" or "defenses"."""
    return [load_plugin(package, name) for name in names(PROJECT / package)]


def load_plugin(package: str, name: str) -> ModuleType:
    """Import `package.name`. An unknown name raises UserError with the known ones."""
    known = names(PROJECT / package)
    if name not in known:
        raise UserError(f"unknown {package[:-1]} {name!r}: choose one of {', '.join(known)}")
    return importlib.import_module(f"{package}.{name}")
