"""What a run records of where its numbers come from: versions, hardware, commit, hash of the source."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from reproduce import data, models
from reproduce.cells import NONE, Cell, Task
from reproduce.models import encoder
from reproduce.plugins import PROJECT
from reproduce.processor import cpu_generation, cpu_name

SHARED = ("poisoning.py", "defending.py", "rng.py")
OF = {data.IMAGE: ("training.py", "data/augment.py"), data.TEXT: ("finetuning.py",)}


def environment(task: Task, device: torch.device, made_from: dict[str, str]) -> dict[str, Any]:
    """Versions, hardware, commit, a hash of the source that made the run, and what it was made from: {name of a run it
    needed: digest of that run's predictions}."""
    text = {"transformers": importlib.metadata.version("transformers")} \
        if data.modality(task.victim.dataset) == data.TEXT else {}
    return {**_machine(), **text, "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(), "source": source_hash(task), "made_from": made_from,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def source_hash(task: Task) -> str:
    """SHA-256 over the files a run's numbers depend on most: its attack, its defense, training, model."""
    victim = task.victim
    modality = data.modality(victim.dataset)
    files = [PROJECT / "reproduce" / name for name in (*SHARED, *OF[modality])]
    files.append(models.source(victim.model) if modality == data.IMAGE else Path(encoder.__file__))
    if victim.attack != NONE:
        files.append(PROJECT / "attacks" / f"{victim.attack}.py")
    if isinstance(task, Cell):
        files.append(PROJECT / "defenses" / f"{task.defense}.py")
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


@lru_cache(maxsize=1)
def _machine() -> dict[str, Any]:
    import numpy
    return {"python": platform.python_version(), "torch": torch.__version__,
            "torchvision": importlib.metadata.version("torchvision"), "numpy": numpy.__version__,
            "platform": platform.platform(), "cpu": cpu_name(), "cpu_generation": cpu_generation(),
            "cores": os.cpu_count(), "commit": _commit()}


def _commit() -> str | None:
    """The project's commit, with "+" where tracked files differ from it; None outside a git checkout."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(PROJECT), *arguments], capture_output=True, text=True,
                              check=True).stdout.strip()
    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
