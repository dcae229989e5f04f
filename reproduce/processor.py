"""What kind of CPU this is, and that a GPU computes the same again."""

import os
import platform
from functools import cache
from pathlib import Path

import torch


def repeatable(device: torch.device) -> None:
    """On a GPU from now on: of an operation's kernels the one that gives the same bits every time, where there is one,
    and float32 in convolutions too, which would otherwise round their inputs to 10 bits (TF32). A CPU does both
    anyway."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # read when cuBLAS starts
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False     # a search for faults, which costs time
        torch.backends.cudnn.allow_tf32 = False


@cache
def cpu_name() -> str:
    """The processor's name as it gives it itself; "unknown" where it does not."""
    return _cpu_facts().get("model name") or platform.processor() or "unknown"


@cache
def cpu_generation() -> str:
    """Which of the processors of one name it is, which may round otherwise; "unknown" where it does not say."""
    facts = _cpu_facts()
    return ", ".join(f"{name.removeprefix('cpu ')} {facts[name]}" for name in ("cpu family", "model", "stepping")
                     if name in facts) or "unknown"


def _cpu_facts() -> dict[str, str]:
    """What Linux says of the first core."""
    try:
        first, _, _ = Path("/proc/cpuinfo").read_text().partition("\n\n")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
