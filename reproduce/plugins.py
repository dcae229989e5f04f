"""Finding attacks and defenses: a plug-in is a file in `attacks/` or `defenses/`, found by its name."""

import importlib
from pathlib import Path
from types import ModuleType

from reproduce.errors import UserError


def names(folder: Path) -> list[str]:
    """The plug-ins a folder holds, in alphabetical order."""
    return sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))


def load_plugin(package: str, name: str, folder: Path) -> ModuleType:
    """Import `package.name`. An unknown name raises UserError with the known ones."""
    known = names(folder)
    if name not in known:
        raise UserError(f"unknown {package[:-1]} {name!r}: choose one of {', '.join(known)}")
    return importlib.import_module(f"{package}.{name}")
